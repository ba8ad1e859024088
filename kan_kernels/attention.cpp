/*
Causal self-attention on a CPU, forward and backward, from one matrix product's output to the next one's input:

    q, k, v = qkv[b, t, 0 .. 2, h]    q and k turned by their position (RoPE), then divided by the root mean square of
                                      each (QK-norm), then q times its head's gain; any of these or none
    y[b, i, h] = sum_j P[i, j] v[j]   P[i] = softmax over j <= i of <q[i], k[j]> / sqrt(D)

PyTorch's operators make a pass over memory each to turn, copy and add up gradients, and compute the half of P that is
zero. Here a head's rows are read where they are and turned on the way, and the rest happens in the second-level cache:
0.9 ms instead of 2.9, forward and backward, 12 sequences of 64 tokens, 4 heads of 32, one core of a Zen 3 with AVX2.

What is saved for the backward is qkv and the gains alone. It makes P again, and with g = dL/dy

    dv = P^T g    dP = g v^T    dS = P * (dP - row sums of P * dP)    dq = dS k / sqrt(D)    dk = dS^T q / sqrt(D)
    dgain = the sum of dq q before the gain, over all tokens and channels

Threads split the heads of all sequences: the result does not depend on their number.

When sampling, a cache keeps the keys, turned and normed, and the values of the tokens so far; attention_cached adds
those of the T tokens at hand, mostly one, and has no gradient. It replaces some 25 calls of PyTorch, which for one token
take far longer than what they compute.

Legend
    B sequences, T tokens, H heads, D channels of a head, C = H D    qkv (B, T, 3, H, D)    y, g (B, T, H, D)
    gain, dgain (H)
    L numbers in a vector, R rows of a matrix product at a time; TP and DP: T and D rounded up to both, to L
    i a query, j a key    S tokens that a cache has room for, start of which it holds; keys, values (B, H, S, D)
*/
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "vectors.h"

namespace {

using namespace splinegpt;
using at::Tensor;
using Optional = std::optional<Tensor>;
using V = vec<float>;
constexpr int L = lanes<float>;
constexpr int R = VECTOR_BYTES == 64 ? 8 : 4;  // R x 2 vectors of sums, and what they are made of, fit the registers
constexpr int64_t QUERIES = 64;                // of a block in the backward: so many rows of P and dP at a time

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products, R rows at a time

// c (R, W vectors) = a b, or += it. a's entry (r, s) is a[r * a_row + s * a_step], so it may be a transposed matrix.
template <int W, bool add>
INLINE void product_of(int64_t n, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                       float* c, int64_t c_row) {
  V sum[R][W];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int w = 0; w < W; w++) sum[r][w] = add ? load<float>(c + r * c_row + w * L) : V{};
  for (int64_t s = 0; s < n; s++, a += a_step, b += b_row) {
    V bs[W];
    UNROLL for (int w = 0; w < W; w++) {
      bs[w] = load<float>(b + w * L);
      KEEP(bs[w]);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const V ar = broadcast(a[r * a_row]);
      UNROLL for (int w = 0; w < W; w++) sum[r][w] += ar * bs[w];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int w = 0; w < W; w++) store(c + r * c_row + w * L, sum[r][w]);
}

// The same for any width that L divides.
template <bool add>
__attribute__((noinline)) void product(int64_t n, int64_t width, const float* a, int64_t a_row, int64_t a_step,
                                       const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t o = 0;
  for (; o + 2 * L <= width; o += 2 * L) product_of<2, add>(n, a, a_row, a_step, b + o, b_row, c + o, c_row);
  if (o < width) product_of<1, add>(n, a, a_row, a_step, b + o, b_row, c + o, c_row);
}

// ---------------------------------------------------------------------------------------------------------------------
// The softmax of a row

// row[j] = exp(row[j] - the largest) for j <= i, and 0 beyond, up to width, which is above i; returns their sum.
INLINE float exponentials(float* row, int64_t i, int64_t width) {
  V most = broadcast(-std::numeric_limits<float>::infinity());
  const V none = most;
  Types<float>::ints number;
  for (int l = 0; l < L; l++) number[l] = l;
  for (int64_t j = 0; j < width; j += L) {
    V v = load<float>(row + j);
    if (j + L > i + 1) store(row + j, v = number <= (int32_t)(i - j) ? v : none);
    most = v > most ? v : most;
  }
  const float largest = largest_of(most);
  V sum = {};
  for (int64_t j = 0; j < width; j += L) {
    const V e = exp_of(load<float>(row + j) - largest);
    store(row + j, e);
    sum += e;
  }
  return sum_of(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of a head

struct Heads {
  int64_t B, T, H, D, TP, DP, stride;  // stride: of a row of TP, odd in vectors
  const float *cos, *sin;              // (T, D), of every angle twice, the first half's sines negated; or null
  bool normed;
  float scale;        // 1 / sqrt(D)
  const float* gain;  // (H), or null
};

// The channels of a row are numbers of type E: vectors, or halves of them, if each half of the channels is some, or else
// floats, of which GCC has to be told (ivdep) that those of different rows are not the same. What comes from outside may
// begin anywhere.
typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));

template <class E> INLINE E get(const float* p, int64_t d) {
  E e;
  memcpy(&e, p + d * (sizeof(E) / sizeof(float)), sizeof(E));
  return e;
}
template <class E> INLINE void put(float* p, int64_t d, E e) {
  memcpy(p + d * (sizeof(E) / sizeof(float)), &e, sizeof(E));
}

// What lies beyond T and D is zero.
void clear_padding(const Heads& h, float* rows) {
  if (h.TP > h.T || h.DP > h.D) std::fill(rows, rows + h.TP * h.DP, 0.0f);
}
INLINE void copy_row(const float* x, const Heads& h, float* row) {
  if (h.D < h.DP) memcpy(row, x, h.D * sizeof(float));
  else for (int64_t d = 0; d < h.D; d += L) store(row + d, load<float>(x + d));
}
void copy_rows(const float* x, int64_t x_row, const Heads& h, float* rows) {
  clear_padding(h, rows);
  for (int64_t t = 0; t < h.T; t++, x += x_row, rows += h.DP) copy_row(x, h, rows);
}

// rows (TP, DP) = x turned, normed, and times factor; inverse (T): what each was multiplied with by its norm.
template <class E>
void turn_as(const float* x, int64_t x_row, const Heads& h, float factor, float* rows, float* inverse) {
  clear_padding(h, rows);
  const int64_t n = h.D * sizeof(float) / sizeof(E), half = n / 2;
  const float *c = h.cos, *s = h.sin;
  const float share = 1 / (factor * factor * h.D);
  for (int64_t t = 0; t < h.T; t++, x += x_row, rows += h.DP) {
    if (c) {
#pragma GCC ivdep
      for (int64_t d = 0; d < half; d++) {
        const E a = get<E>(x, d), b = get<E>(x, d + half);
        put<E>(rows, d, factor * (a * get<E>(c, d) + b * get<E>(s, d)));
        put<E>(rows, d + half, factor * (b * get<E>(c, d + half) + a * get<E>(s, d + half)));
      }
      c += h.D, s += h.D;
    } else {
      for (int64_t d = 0; d < n; d++) put<E>(rows, d, factor * get<E>(x, d));
    }
    if (h.normed) {
      E squares = {};
      for (int64_t d = 0; d < n; d++) squares += get<E>(rows, d) * get<E>(rows, d);
      const float mean = sum_of(squares) * share;
      inverse[t] = 1 / std::sqrt(mean + std::numeric_limits<float>::epsilon());
      for (int64_t d = 0; d < n; d++) put<E>(rows, d, inverse[t] * get<E>(rows, d));
    }
  }
}

// dx from the gradient of the rows that turn made, of which the factor has been taken out; dx's rows are dx_row apart.
template <class E>
void turn_back_as(float* d_rows, const float* rows, const float* inverse, const Heads& h, float factor, float* dx,
                  int64_t dx_row) {
  const int64_t n = h.D * sizeof(float) / sizeof(E), half = n / 2;
  const float *c = h.cos, *s = h.sin;
  const float share = 1 / (factor * factor * h.D);
  for (int64_t t = 0; t < h.T; t++, d_rows += h.DP, rows += h.DP, dx += dx_row) {
    float f = factor;
    if (h.normed) {  // what is along the row is lost
      E products = {};
      for (int64_t d = 0; d < n; d++) products += get<E>(d_rows, d) * get<E>(rows, d);
      const float along = sum_of(products) * share;
      for (int64_t d = 0; d < n; d++) put<E>(d_rows, d, get<E>(d_rows, d) - get<E>(rows, d) * along);
      f *= inverse[t];
    }
    if (c) {
#pragma GCC ivdep
      for (int64_t d = 0; d < half; d++) {
        const E a = get<E>(d_rows, d), b = get<E>(d_rows, d + half);
        put<E>(dx, d, f * (a * get<E>(c, d) + b * get<E>(s, d + half)));
        put<E>(dx, d + half, f * (b * get<E>(c, d + half) + a * get<E>(s, d)));
      }
      c += h.D, s += h.D;
    } else {
      for (int64_t d = 0; d < n; d++) put<E>(dx, d, f * get<E>(d_rows, d));
    }
  }
}

void turn(const float* x, int64_t x_row, const Heads& h, float factor, float* rows, float* inverse) {
  const auto turn = h.D % (2 * L) == 0 ? turn_as<V> : h.D % L == 0 ? turn_as<Half> : turn_as<float>;
  turn(x, x_row, h, factor, rows, inverse);
}
void turn_back(float* d_rows, const float* rows, const float* inverse, const Heads& h, float factor, float* dx,
               int64_t dx_row) {
  const auto turn_back = h.D % (2 * L) == 0 ? turn_back_as<V> : h.D % L == 0 ? turn_back_as<Half> : turn_back_as<float>;
  turn_back(d_rows, rows, inverse, h, factor, dx, dx_row);
}

// Two rows, half apart, exchange what is off the diagonal of their blocks of 2 x 2, whose sides are half.
template <int half, size_t... I> INLINE void exchange(V& a, V& b, std::index_sequence<I...>) {
  const V old = a;
  a = __builtin_shufflevector(old, b, (I & half ? L + I - half : I)...);
  b = __builtin_shufflevector(old, b, (I & half ? L + I : I + half)...);
}
template <int half = L / 2> INLINE void transpose_block(V* rows) {  // L x L
  if constexpr (half > 0) {
    UNROLL for (int r = 0; r < L; r++)
      if (!(r & half)) exchange<half>(rows[r], rows[r + half], std::make_index_sequence<L>());
    transpose_block<half / 2>(rows);
  }
}

// to (TP, DP) = rows times the gain of head z % H; which are rows themselves where there are no gains
const float* gained(const float* rows, const Heads& h, int64_t z, float* to) {
  if (!h.gain) return rows;
  const float gain = h.gain[z % h.H];
  for (int64_t i = 0; i < h.TP * h.DP; i++) to[i] = gain * rows[i];
  return to;
}

void transpose(const float* rows, const Heads& h, float* columns) {  // (TP, DP) to (DP, TP)
  for (int64_t d = 0; d < h.DP; d += L)
    for (int64_t t = 0; t < h.TP; t += L) {
      V block[L];
      UNROLL for (int r = 0; r < L; r++) block[r] = load<float>(rows + (t + r) * h.DP + d);
      transpose_block(block);
      UNROLL for (int r = 0; r < L; r++) store(columns + (d + r) * h.stride + t, block[r]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The passes

int threads_for(const Heads& h, int64_t seen) {
  return std::min<int64_t>(thread_count(double(h.B) * h.H * h.T * seen * h.D), h.B * h.H);
}

void forward(const Heads& h, const float* qkv, float* y) {
  const int64_t C = h.H * h.D, size = h.TP * h.DP, stride = h.stride;
#pragma omp parallel num_threads(threads_for(h, h.T))
  {
    own.clear();
    float *q = own.take<float>(size), *k = own.take<float>(size), *v = own.take<float>(size);
    float *kt = own.take<float>(h.DP * stride), *p = own.take<float>(R * stride), *out = own.take<float>(R * h.DP);
    float* norms = own.take<float>(h.T);
#pragma omp for schedule(static)
    for (int64_t z = 0; z < h.B * h.H; z++) {
      const int64_t b = z / h.H, first = z % h.H * h.D;
      const float* x = qkv + b * h.T * 3 * C + first;
      turn(x, 3 * C, h, h.scale, q, norms);
      gained(q, h, z, q);
      turn(x + C, 3 * C, h, 1, k, norms);
      copy_rows(x + 2 * C, 3 * C, h, v);
      transpose(k, h, kt);
      for (int64_t i = 0; i < h.T; i += R) {
        const int64_t rows = std::min<int64_t>(R, h.T - i), width = round_up(i + R, L);
        product<false>(h.D, width, q + i * h.DP, h.DP, 1, kt, stride, p, stride);
        float sums[R];
        for (int r = 0; r < R; r++) sums[r] = exponentials(p + r * stride, i + r, width);
        product<false>(i + rows, h.DP, p, stride, 1, v, h.DP, out, h.DP);
        for (int64_t r = 0; r < rows; r++) {
          float* __restrict to = y + (b * h.T + i + r) * C + first;
          const float inverse = 1 / sums[r];
          for (int64_t d = 0; d < h.D; d++) to[d] = out[r * h.DP + d] * inverse;
        }
      }
    }
  }
}

void forward_cached(const Heads& h, const float* qkv, float* keys, float* values, int64_t S, int64_t start, float* y) {
  const int64_t C = h.H * h.D, D = h.D, size = h.TP * h.DP;
#pragma omp parallel num_threads(threads_for(h, start + h.T))
  {
    own.clear();
    float *q = own.take<float>(size), *k = own.take<float>(size), *norms = own.take<float>(h.T);
    float* p = own.take<float>(round_up(start + h.T, L));
#pragma omp for schedule(static)
    for (int64_t z = 0; z < h.B * h.H; z++) {
      const int64_t b = z / h.H, first = z % h.H * D;
      const float* x = qkv + b * h.T * 3 * C + first;
      float *ks = keys + z * S * D, *vs = values + z * S * D;
      turn(x + C, 3 * C, h, 1, k, norms);
      for (int64_t t = 0; t < h.T; t++) {
        memcpy(ks + (start + t) * D, k + t * h.DP, D * sizeof(float));
        memcpy(vs + (start + t) * D, x + 2 * C + t * 3 * C, D * sizeof(float));
      }
      if (!start) continue;  // without a past forward() does the rest, in blocks
      turn(x, 3 * C, h, h.scale, q, norms);
      gained(q, h, z, q);
      for (int64_t i = 0; i < h.T; i++) {
        const int64_t last = start + i;
        const float* qi = q + i * h.DP;
        for (int64_t j = 0; j <= last; j++) {
          const float* kj = ks + j * D;
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t d = 0; d < D; d++) sum += qi[d] * kj[d];
          p[j] = sum;
        }
        const float inverse = 1 / exponentials(p, last, round_up(last + 1, L));
        float* __restrict to = y + (b * h.T + i) * C + first;
        std::fill(to, to + D, 0.0f);
        for (int64_t j = 0; j <= last; j++) {
          const float share = p[j] * inverse, *vj = vs + j * D;
          for (int64_t d = 0; d < D; d++) to[d] += share * vj[d];
        }
      }
    }
  }
  if (!start) forward(h, qkv, y);
}

// dgains (B, H): each sequence's part.
void backward(const Heads& h, const float* dy, const float* qkv, float* dqkv, float* dgains) {
  const int64_t C = h.H * h.D, size = h.TP * h.DP, stride = h.stride;
#pragma omp parallel num_threads(threads_for(h, h.T))
  {
    own.clear();
    float *ungained = own.take<float>(size), *with_gain = own.take<float>(size);
    float *k = own.take<float>(size), *g = own.take<float>(size);
    float *kt = own.take<float>(h.DP * stride), *vt = own.take<float>(h.DP * stride);
    float *dq = own.take<float>(size), *dk = own.take<float>(size), *dv = own.take<float>(size);
    float *p = own.take<float>(QUERIES * stride), *ds = own.take<float>(QUERIES * stride);
    float *of_q = own.take<float>(h.T), *of_k = own.take<float>(h.T);
#pragma omp for schedule(static)
    for (int64_t z = 0; z < h.B * h.H; z++) {
      const int64_t b = z / h.H, first = z % h.H * h.D;
      const float* x = qkv + b * h.T * 3 * C + first;
      copy_rows(x + 2 * C, 3 * C, h, g);  // v, for now
      transpose(g, h, vt);
      turn(x, 3 * C, h, h.scale, ungained, of_q);
      const float* q = gained(ungained, h, z, with_gain);
      turn(x + C, 3 * C, h, 1, k, of_k);
      transpose(k, h, kt);
      copy_rows(dy + b * h.T * C + first, C, h, g);
      for (int64_t i0 = 0; i0 < h.T; i0 += QUERIES) {
        const int64_t i1 = std::min(i0 + QUERIES, h.T);
        for (int64_t i = i0; i < i1; i += R) {
          const int64_t width = round_up(i + R, L);
          float *p_rows = p + (i - i0) * stride, *ds_rows = ds + (i - i0) * stride;
          product<false>(h.D, width, q + i * h.DP, h.DP, 1, kt, stride, p_rows, stride);
          product<false>(h.D, width, g + i * h.DP, h.DP, 1, vt, stride, ds_rows, stride);
          for (int r = 0; r < R; r++) {
            float *pr = p_rows + r * stride, *dr = ds_rows + r * stride;
            const float inverse = 1 / exponentials(pr, i + r, width);
            V sum = {};
            for (int64_t j = 0; j < width; j += L) sum += load<float>(pr + j) * load<float>(dr + j);
            const float mean = sum_of(sum) * inverse;
            for (int64_t j = 0; j < width; j += L) {
              const V share = load<float>(pr + j) * inverse;
              store(pr + j, share);
              store(dr + j, share * (load<float>(dr + j) - mean));
            }
          }
          product<false>(std::min(i + R, h.T), h.DP, ds_rows, stride, 1, k, h.DP, dq + i * h.DP, h.DP);
        }
        for (int64_t j = 0; j < i1; j += R) {
          const int64_t from = std::max(i0, j), n = i1 - from, at = (from - i0) * stride + j;
          const auto multiply = j < i0 ? product<true> : product<false>;
          multiply(n, h.DP, p + at, 1, stride, g + from * h.DP, h.DP, dv + j * h.DP, h.DP);
          multiply(n, h.DP, ds + at, 1, stride, q + from * h.DP, h.DP, dk + j * h.DP, h.DP);
        }
      }
      if (h.gain) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < h.T * h.DP; i++) sum += dq[i] * ungained[i];
        dgains[z] = sum;
        gained(dq, h, z, dq);
      }
      float* dx = dqkv + b * h.T * 3 * C + first;
      turn_back(dq, ungained, of_q, h, h.scale, dx, 3 * C);
      turn_back(dk, k, of_k, h, 1, dx + C, 3 * C);
      for (int64_t t = 0; t < h.T; t++) copy_row(dv + t * h.DP, h, dx + 2 * C + t * 3 * C);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators

Heads describe(const Tensor& qkv, int64_t heads, const Optional& cos, const Optional& sin, bool normed,
               const Optional& gain) {
  TORCH_CHECK(qkv.dim() == 3 && heads >= 1 && qkv.size(2) % (3 * heads) == 0 && qkv.scalar_type() == at::kFloat,
              "attention: qkv must be (B, T, 3 * heads * D) in float32, got ", qkv.sizes(), " and heads = ", heads);
  const int64_t T = qkv.size(1), D = qkv.size(2) / 3 / heads;
  for (const auto& angles : {cos, sin})
    TORCH_CHECK(!angles || (angles->dim() == 2 && angles->size(0) == T && angles->size(1) == D && D % 2 == 0 &&
                            angles->scalar_type() == at::kFloat && angles->is_contiguous()),
                "attention: cos and sin must be (", T, ", ", D, ") in float32, contiguous, D even, got ",
                angles->sizes(), " in ", angles->scalar_type());
  TORCH_CHECK(cos.has_value() == sin.has_value(), "attention: cos and sin come together");
  TORCH_CHECK(!gain || (gain->dim() == 1 && gain->size(0) == heads && gain->scalar_type() == at::kFloat &&
                        gain->is_contiguous()),
              "attention: gain must be (", heads, ",) in float32, contiguous, got ", gain->sizes(), " in ",
              gain->scalar_type());
  const int64_t TP = round_up(T, std::max(L, R)), DP = round_up(D, L);
  return {qkv.size(0), T, heads, D, TP, DP, (TP / L | 1) * L, cos ? cos->const_data_ptr<float>() : nullptr,
          sin ? sin->const_data_ptr<float>() : nullptr, normed, 1 / std::sqrt((float)D),
          gain ? gain->const_data_ptr<float>() : nullptr};
}

Tensor attention(const Tensor& qkv_, int64_t heads, const Optional& cos, const Optional& sin, bool normed,
                 const Optional& gain) {
  const Tensor qkv = qkv_.contiguous();
  const Heads h = describe(qkv, heads, cos, sin, normed, gain);
  Tensor y = at::empty({h.B, h.T, h.H * h.D}, qkv.options());
  if (y.numel()) forward(h, qkv.const_data_ptr<float>(), y.data_ptr<float>());
  return y;
}

Tensor attention_cached(const Tensor& qkv_, int64_t heads, const Optional& cos, const Optional& sin, bool normed,
                        const Optional& gain, Tensor keys, Tensor values, int64_t start) {
  const Tensor qkv = qkv_.contiguous();
  const Heads h = describe(qkv, heads, cos, sin, normed, gain);
  for (const Tensor& cached : {keys, values})
    TORCH_CHECK(cached.dim() == 4 && cached.size(0) == h.B && cached.size(1) == heads && cached.size(3) == h.D &&
                    cached.sizes() == keys.sizes() && cached.scalar_type() == at::kFloat && cached.is_contiguous(),
                "attention_cached: keys and values must be (", h.B, ", ", heads, ", S, ", h.D,
                ") in float32, contiguous, got ", cached.sizes(), " in ", cached.scalar_type());
  const int64_t S = keys.size(2);
  TORCH_CHECK(start >= 0 && start + h.T <= S, "attention_cached: ", start, " tokens and ", h.T, " more do not fit the ", S,
              " of the cache");
  Tensor y = at::empty({h.B, h.T, h.H * h.D}, qkv.options());
  if (y.numel())
    forward_cached(h, qkv.const_data_ptr<float>(), keys.data_ptr<float>(), values.data_ptr<float>(), S, start,
                   y.data_ptr<float>());
  return y;
}

// (dqkv, dgain), the second empty where there are no gains
std::tuple<Tensor, Tensor> attention_backward(const Tensor& g_, const Tensor& qkv_, int64_t heads, const Optional& cos,
                                              const Optional& sin, bool normed, const Optional& gain) {
  const Tensor g = g_.contiguous(), qkv = qkv_.contiguous();
  const Heads h = describe(qkv, heads, cos, sin, normed, gain);
  TORCH_CHECK(g.dim() == 3 && g.size(0) == h.B && g.size(1) == h.T && g.size(2) == h.H * h.D &&
                  g.scalar_type() == at::kFloat,
              "attention_backward: g must be (", h.B, ", ", h.T, ", ", h.H * h.D, ") in float32, got ", g.sizes());
  Tensor d = at::empty(qkv.sizes(), qkv.options());
  Tensor dgains = gain ? at::zeros({h.B, h.H}, qkv.options()) : at::empty({0}, qkv.options());
  if (d.numel())
    backward(h, g.const_data_ptr<float>(), qkv.const_data_ptr<float>(), d.data_ptr<float>(), dgains.data_ptr<float>());
  return {d, gain ? dgains.sum(0) : dgains};
}

TORCH_LIBRARY_FRAGMENT(splinegpt_cpu, m) {
  m.def("attention(Tensor qkv, int heads, Tensor? cos, Tensor? sin, bool qk_norm, Tensor? gain) -> Tensor");
  m.def("attention_cached(Tensor qkv, int heads, Tensor? cos, Tensor? sin, bool qk_norm, Tensor? gain, "
        "Tensor(a!) keys, Tensor(b!) values, int start) -> Tensor");
  m.def("attention_backward(Tensor g, Tensor qkv, int heads, Tensor? cos, Tensor? sin, bool qk_norm, Tensor? gain) "
        "-> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(splinegpt_cpu, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_cached", &attention_cached);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace
