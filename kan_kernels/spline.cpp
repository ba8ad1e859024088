/*
The spline layer on a CPU: forward and backward as look-ups, at the speed of a matrix product.

    u = (x[f] + width / 2) * (N - 1) / width      i = clamp(trunc(u), 0, N - 2)      t = u - i
    y[o] = sum_f (1 - t) * C[f, i, o] + t * C[f, i + 1, o]

A core loads about one vector per multiply-add from its first-level cache, so a look-up that loads two rows for its two
multiply-adds is bound by its loads. Therefore tokens are sorted by their interval, and the two rows of an interval stay
in registers while its tokens pass. What is left is to add to each token's sums, which come from the second-level cache
and go back to it; so features go in pairs where N is small, sorted by both intervals, (N - 1)^2 of them. With

    C1[i1] + t1 * (C1[i1 + 1] - C1[i1]) + C2[i2] + t2 * (C2[i2 + 1] - C2[i2])

and C1[i1] + C2[i2] in registers, a look-up is one multiply-add and half an addition: fewer than a matrix product that
does the same flops. Outputs are computed tile by tile, as wide as the registers hold. A handful of tokens reads less
than the whole table; there threads split the features and add up rows where they are (direct_forward).

The backward is sorted too, feature by feature. For all tokens of an interval the difference of its two rows and two sums
stay in registers, so that one load of g = dL/dy serves all three gradients:

    S[i] = sum g    U[i] = sum t * g    dC[k] = S[k] - U[k] + U[k - 1]    dx = <g, C[i + 1] - C[i]> * (N - 1) / width

Where N is small and intervals have tokens enough, pairs of features take less here too: three sums stay in registers
while g passes once for both (paired_backward), and dx is made in a pass of its own, token by token, from the differences
of rows (dots_of). With 16 registers instead of 32 tiles are narrow, and what is done once a token and tile weighs more:
dx has its own pass at any N, if tokens suffice. The forward, where N is too large for pairs but rows are few, leaves the
tokens in their order and copies rows close together, into the first-level cache or the second (gathered_forward).

Threads split the features: no atomics, and the result does not depend on their number. The forward's is the same for a
given number of threads. What is saved between forward and backward is x alone.

Compiled for the machine it runs on, with the vector types of GCC and Clang: 64 bytes wide with AVX-512, 32 with AVX2,
else 16.

Legend
    B tokens, F features, N control points, O outputs        x (B, F)    C, dC (F, N, O)    y, g (B, O)
    L numbers in a vector, V vectors in a tile of outputs    i interval, t position in it, both of one token and feature
    S number type of x, y and all sums (float or double), T of the table (S or BFloat16)
*/
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "look_up.h"

namespace {

using namespace splinegpt;
using c10::BFloat16;

// ---------------------------------------------------------------------------------------------------------------------
// Vectors and memory

// The paired dot product of bfloat16, acc += a.low * b.low + a.high * b.high, is one look-up.
#ifdef __AVX512BF16__
constexpr bool HAS_PAIRS = true;
// acc (32 outputs) += weights.low * below + weights.high * above
INLINE void paired_look_up(vec<float>* acc, const BFloat16* below, const BFloat16* above, vec<float> weights) {
  const __m512i a = _mm512_loadu_si512(below), b = _mm512_loadu_si512(above);
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                         39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i rows[2] = {_mm512_permutex2var_epi16(a, first, b),
                           _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b)};
  for (int k : {0, 1}) acc[k] = (vec<float>)_mm512_dpbf16_ps((__m512)acc[k], (__m512bh)rows[k], (__m512bh)weights);
}
#else
constexpr bool HAS_PAIRS = false;
INLINE void paired_look_up(vec<float>*, const BFloat16*, const BFloat16*, vec<float>) {}
#endif

// Gives back what is kept between calls.
void release_memory() {
#pragma omp parallel num_threads(at::get_num_threads())
  own.release();
  common.release();
  pool->release();
}

// ---------------------------------------------------------------------------------------------------------------------
// Where does x fall?

template <class S, class... Rest> void sort_tokens(bool pair, const int32_t* i, const S* t, Rest... rest) {
  pair ? sort_features<2, S>(i, t, rest...) : sort_features<1, S>(i, t, rest...);
}

constexpr int V_most = ROOMY ? 8 : 4;            // three registers a vector
constexpr int V_narrow = 4;                      // where rows of several features should stay in the cache
constexpr int ROWS_AHEAD = 5, TOKENS_AHEAD = 3;  // what is prefetched; measured on Zen 4, and rows on Zen 3
// Measured on Zen 4 with AVX-512 and on Zen 3 with AVX2: up to which N features go in pairs, forward and backward, and
// from there to which they are gathered, so many at a time; how many tokens for each control point let the gradient of x
// have a pass of its own.
constexpr int PAIRED_FORWARD = ROOMY ? 21 : 13, PAIRED_BACKWARD = ROOMY ? 17 : 13, GATHERED_MOST = ROOMY ? 40 : 64;
constexpr int GATHERED_AT_ONCE = 8, TOKENS_FOR_TWO = ROOMY ? 40 : 24;

// W numbers, `ahead` numbers further on: apart, since GCC makes of a single pointer what took 8% longer at N = 128.
template <int W, int to_write = 0, class T> INLINE void prefetch_row(const T* row, int64_t ahead) {
  UNROLL for (int o = 0; o < W; o += 64 / sizeof(T)) __builtin_prefetch(row + ahead + o, to_write);
}

// Rows of a tile of outputs, W wide, copied close together as S; what lies beyond O is zero.
template <class S, class T, int V>
INLINE void pack(const T* rows, int64_t count, int64_t O, int width, S* to) {
  constexpr int L = lanes<S>, W = V * L;
  for (int64_t r = 0; r < count; r++, rows += O, to += W) {
    prefetch_row<W>(rows, ROWS_AHEAD * O);
    if (width == W) UNROLL for (int v = 0; v < V; v++) *(vec<S>*)(to + v * L) = load<S>(rows + v * L);
    else for (int o = 0; o < W; o++) to[o] = o < width ? S(rows[o]) : S(0);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// The rows of one feature in a tile: where they are if they can be used as they are, else a copy in tile.
template <class S, class T, int V>
INLINE const S* rows_of(const T* table, const Layer<S>& layer, int64_t f, int64_t o0, S* tile, int64_t& stride) {
  constexpr int W = V * lanes<S>;
  const T* rows = table + f * layer.N * layer.O + o0;
  if constexpr (std::is_same_v<S, T>)
    if (o0 + W <= layer.O) return stride = layer.O, rows;
  pack<S, T, V>(rows, layer.N, layer.O, std::min<int64_t>(W, layer.O - o0), tile);
  return stride = W, tile;
}

// Tokens as sort_tokens leaves them, or, for gathered_forward, order (n, L) are their offsets, and t (n, L).
template <class S> struct Sorted {
  int32_t *order, *start;
  S* t;
};

// One feature (R = 1) or a pair (R = 2), one tile of outputs, n tokens: y_tile (n, W) += their curves. For a pair, the
// rows of the first change in the outer loop, those of the second in the inner one.
template <class S, class T, int V, int R>
void sorted_forward(const Layer<S>& layer, const T* table, int64_t f, int64_t o0, const Sorted<S>& tokens, S* tile,
                    S* y_tile) {
  constexpr int L = lanes<S>, W = V * L;
  const int64_t N = layer.N, O = layer.O;
  int64_t stride;
  const S* outer = rows_of<S, T, V>(table, layer, f, o0, tile, stride);
  const S* inner = R == 1 ? outer : rows_of<S, T, V>(table, layer, f + 1, o0, tile + N * W, stride);
  const int32_t *order = tokens.order, *start = tokens.start;
  const S* t = tokens.t;
  for (int j = 0; j < (R == 1 ? 1 : N - 1); j++, start += N - 1, outer += stride) {
    vec<S> outer_rise[V];
    UNROLL for (int v = 0; v < V; v++) outer_rise[v] = load<S>(outer + stride + v * L) - load<S>(outer + v * L);
    const T* next = table + ((f + 2) * N + 2 * j) * O + o0;  // rows of the next pair
    if (R == 2 && f + 4 <= layer.F)
      for (int o = 0; o < 2 * W; o += 64 / sizeof(T)) __builtin_prefetch(o < W ? next + o : next + O + o - W, 0, 2);
    const S* c = inner;
    for (int i = 0; i < N - 1; i++, c += stride) {
      if (R == 1) prefetch_row<W>(c, ROWS_AHEAD * stride);
      if (start[i] == start[i + 1]) continue;
      vec<S> below[V], rise[V];
      UNROLL for (int v = 0; v < V; v++) {
        below[v] = load<S>(c + v * L);
        rise[v] = load<S>(c + stride + v * L) - below[v];
        if (R == 2) below[v] += load<S>(outer + v * L);
      }
      for (int q = start[i]; q < start[i + 1]; q++) {
        if (ROOMY) prefetch_row<W, 1>(y_tile, (int64_t)order[q + TOKENS_AHEAD] * W);
        S* y = y_tile + (int64_t)order[q] * W;
        const vec<S> outer_t = broadcast<S>(t[R * q]), inner_t = broadcast<S>(t[R * q + R - 1]);
        UNROLL for (int v = 0; v < V; v++) {
          vec<S> sum = *(vec<S>*)(y + v * L) + below[v];
          sum += inner_t * rise[v];
          if (R == 2) sum += outer_t * outer_rise[v];
          *(vec<S>*)(y + v * L) = sum;
        }
      }
    }
  }
}

// L features or fewer (count), one tile, n tokens in their own order: y (n, W) += their curves. The two rows of token b
// and feature k begin at offsets[b L + k] of rows (count, N, W).
template <class S, int V>
void gathered_forward(int n, int count, const int32_t* offsets, const S* t, const S* rows, S* y) {
  constexpr int L = lanes<S>, W = V * L;
  for (int b = 0; b < n; b++, offsets += L, t += L, y += W) {
    vec<S> sum[V];
    UNROLL for (int v = 0; v < V; v++) sum[v] = *(vec<S>*)(y + v * L);
    UNROLL for (int k = 0; k < L; k++) {
      if (k == count) break;
      const S* below = rows + offsets[k];
      const vec<S> ts = broadcast<S>(t[k]);
      UNROLL for (int v = 0; v < V; v++) sum[v] += (1 - ts) * *(vec<S>*)(below + v * L);
      UNROLL for (int v = 0; v < V; v++) sum[v] += ts * *(vec<S>*)(below + W + v * L);
    }
    UNROLL for (int v = 0; v < V; v++) *(vec<S>*)(y + v * L) = sum[v];
  }
}

// Features [f0, f1) of all tokens, added up in sum (B, padded). Four features at a time, so that the sums pass through
// the registers once for eight rows of the table. paired: weights are rounded to bfloat16, the larger one to the nearest
// and the smaller so that they still sum to one, which is exact for |t| < 256; so the error is that of a t rounded to
// 2^-9. Of tokens further out nothing is rounded.
template <class S, class T, bool paired>
void direct_forward(const Layer<S>& layer, const T* table, const S* x, int64_t f0, int64_t f1, S* sum, int64_t padded) {
  constexpr int L = lanes<S>, GANG = 4, step = paired ? 2 * L : L;
  const int64_t N = layer.N, O = layer.O, whole = O / step * step;
  std::fill(sum, sum + layer.B * padded, S(0));
  for (int64_t f = f0; f < f1; f += GANG) {
    const int gang = std::min<int64_t>(GANG, f1 - f);
    for (int64_t b = 0; b < layer.B; b++) {
      S above[GANG] = {}, below[GANG] = {};
      alignas(VECTOR_BYTES) S ts[L];
      alignas(VECTOR_BYTES) int32_t i[L];
      int64_t in_vectors = whole;
      vec<S> weights[GANG] = {};
      const T* c[GANG];
      for (int k0 = 0; k0 < gang; k0 += L) {
        locate_group(x + b * layer.F + f + k0, layer, std::min(gang - k0, L), 1, i, ts);
        for (int k = k0; k < std::min(gang, k0 + L); k++) {
          c[k] = table + ((f + k) * N + i[k - k0]) * O;
          above[k] = ts[k - k0];
          below[k] = 1 - above[k];
          if constexpr (paired) {
            if (!(std::abs(above[k]) < 256)) {
              in_vectors = 0;
              continue;
            }
            if (above[k] < S(0.5)) above[k] = 1 - (below[k] = BFloat16(below[k]));
            else below[k] = 1 - (above[k] = BFloat16(above[k]));
            const BFloat16 both[2] = {BFloat16(below[k]), BFloat16(above[k])};
            S bits;
            memcpy(&bits, both, sizeof(S));
            weights[k] = broadcast<S>(bits);
          }
        }
      }
      for (int k = gang; k < GANG; k++) c[k] = c[0];  // with weight zero
      S* y = sum + b * padded;
      for (int64_t o = 0; o < in_vectors; o += step) {
        vec<S> acc[2] = {*(vec<S>*)(y + o), *(vec<S>*)(y + o + step - L)};
        UNROLL for (int k = 0; k < GANG; k++) {
          if (k < gang) {
            if constexpr (paired) {
              paired_look_up(acc, c[k] + o, c[k] + O + o, weights[k]);
            } else {
              acc[0] += broadcast<S>(below[k]) * load<S>(c[k] + o);
              acc[0] += broadcast<S>(above[k]) * load<S>(c[k] + O + o);
            }
          }
        }
        *(vec<S>*)(y + o) = acc[0];
        if (paired) *(vec<S>*)(y + o + L) = acc[1];
      }
      for (int64_t o = in_vectors; o < O; o++)
        for (int k = 0; k < gang; k++) y[o] += below[k] * S(c[k][o]) + above[k] * S(c[k][O + o]);
    }
  }
}

// Calls f with V as a compile-time constant.
template <class F> INLINE void with_tile(int V, F f) {
  switch (V) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 6: return f(std::integral_constant<int, 6>());
    default: return f(std::integral_constant<int, 8>());
  }
}
constexpr int TILES[] = {8, 6, 4, 3, 2, 1};

template <class S, class T, bool paired> void forward(const Layer<S>& layer, const S* x, const T* table, S* y) {
  constexpr int L = lanes<S>;
  const int64_t B = layer.B, F = layer.F, O = layer.O, N = layer.N;
  const int threads = thread_count(2.0 * B * F * O);

  if (B <= std::clamp<int64_t>(2 * N, 8, 256)) {  // measured: up to 2 N to 3 N tokens, at C = 128 and 768, N = 8 to 256
    const int64_t padded = round_up(O, L) + L;
    common.clear();
    S* share = common.take<S>(threads * B * padded);
#pragma omp parallel num_threads(threads)
    {
      // As many as there are: OpenMP may give fewer than were asked for.
      const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      direct_forward<S, T, paired>(layer, table, x, F * me / team, F * (me + 1) / team, share + me * B * padded, padded);
#pragma omp barrier
      for (int64_t b = 0; b < B; b++)
        for (int64_t o = O * me / team; o < O * (me + 1) / team; o++) {
          S sum = share[b * padded + o];
          for (int k = 1; k < team; k++) sum += share[(k * B + b) * padded + o];
          y[b * O + o] = sum;
        }
    }
    return;
  }

  // Threads share out tiles of outputs and, where there are too few of them, groups of tokens. In cycles, per feature:
  const int64_t limit =
      std::min(tokens_in_cache<S>(8 * L, 2, N > 32 ? 16 * N : 0), std::max<int64_t>(128, (1 << 24) / F));
  const int64_t blocks = (B + limit - 1) / limit, block = (B + blocks - 1) / blocks;
  const bool gathered = N > PAIRED_FORWARD && N <= GATHERED_MOST;
  // Many tokens of many intervals: where the sums of the widest tiles overflow the second-level cache, their way hides
  // all else that is done for a token, and smaller tiles are quicker (Zen 4, from 256 outputs on: 0.72 to 0.94).
  const bool overflows = ROOMY && O >= 16 * L && block > tokens_in_cache<S>(8 * L, 2, 0);
  int V = 1, R = 1;
  int64_t parts = 1;
  double best = 1e300;
  for (int v : TILES)
    for (int64_t p : {1, threads})
      for (int r : {1, 2}) {
        if ((r == 2 && (N > PAIRED_FORWARD || F == 1)) || v > (gathered ? V_narrow : V_most)) continue;
        const int64_t tasks = (O + v * L - 1) / (v * L) * p;
        const double n = block / double(p), M = intervals(N, r);
        const double vector = v * VECTOR_BYTES / 16;
        const double filled = n * v * VECTOR_BYTES / second_level_cache();  // how much of it
        const double token = overflows ? 2 + vector * std::max(0.0, filled - 0.5) / 3 : 4 + 10 * r;
        const double sorting = n * token + std::min(M, n) * (1.5 * vector + 30) + r * N * 4 * vector;
        const double pass = n * vector + (gathered ? 2 * n + N * vector : sorting);
        const double cost = (tasks + threads - 1) / threads * pass / r;
        if (cost < best) best = cost, V = v, R = r, parts = p;
      }
  if (gathered) R = L;
  const int64_t W = V * L, tiles = (O + W - 1) / W, n_max = (block + parts - 1) / parts, groups = (F + R - 1) / R;
  const int64_t m = sorted_size(n_max);

  common.clear();
  std::vector<Sorted<S>> sorted(parts * groups);
  for (auto& s : sorted)
    if (gathered) s = {common.take<int32_t>(R * m), nullptr, common.take<S>(R * m)};
    else s = {common.take<int32_t>(m), common.take<int32_t>(intervals(N, R) + 1), common.take<S>(R * m)};

#pragma omp parallel num_threads(threads)
  {
    own.clear();
    S *tile = own.take<S>(R * N * W), *y_tile = own.take<S>(n_max * W), *t = own.take<S>(L * m);
    int32_t *i = own.take<int32_t>(L * m), *interval = own.take<int32_t>(interval_size(n_max, intervals(N, R)));
    for (int64_t first = 0; first < B; first += block) {
      // Part k of this block has tokens [begins(k), begins(k + 1)).
      const int64_t n = std::min(block, B - first), gangs = (F + L - 1) / L;
      const auto begins = [&](int64_t k) { return first + n * k / parts; };
#pragma omp for schedule(static)
      for (int64_t z = 0; z < parts * gangs; z++) {
        const int64_t k = z / gangs, f = z % gangs * L, n = begins(k + 1) - begins(k);
        const int count = std::min<int64_t>(L, F - f);
        Sorted<S>* to = &sorted[k * groups + f / R];
        const S* xs = x + begins(k) * F + f;
        if (gathered) {
          locate_group(xs, layer, count, n, to->order, to->t);
          to_offsets<S>(to->order, n, N, W);
          continue;
        }
        locate_group(xs, layer, count, n, i, t);
        for (int r = 0; r < count; r += R, to++)
          sort_tokens(R == 2 && r + 2 <= count, i + r, t + r, n, N, to->order, to->start, to->t, interval);
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tiles * parts; task++) {
        const int64_t o0 = task / parts * W, k = task % parts, n = begins(k + 1) - begins(k);
        std::fill(y_tile, y_tile + n * W, S(0));
        with_tile(V, [&](auto v) {
          constexpr int V = decltype(v)::value;
          const Sorted<S>* tokens = &sorted[k * groups];
          for (int64_t f = 0; f < F; f += R, tokens++) {
            if (gathered) {
              const int count = std::min<int64_t>(L, F - f);
              for (int k = 0; k < count; k += GATHERED_AT_ONCE) {
                const int now = std::min(GATHERED_AT_ONCE, count - k);
                S* rows = tile + k * N * W;  // where the offsets look for them
                pack<S, T, V>(table + (f + k) * N * O + o0, now * N, O, std::min(W, O - o0), rows);
                gathered_forward<S, V>(n, now, tokens->order + k, tokens->t + k, tile, y_tile);
              }
            } else if (R == 2 && f + 2 <= F) {
              sorted_forward<S, T, V, 2>(layer, table, f, o0, *tokens, tile, y_tile);
            } else {
              sorted_forward<S, T, V, 1>(layer, table, f, o0, *tokens, tile, y_tile);
            }
          }
        });
        const int64_t width = std::min(W, O - o0);
        for (int64_t b = 0; b < n; b++) memcpy(y + (begins(k) + b) * O + o0, y_tile + b * W, width * sizeof(S));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

enum class Write { once, streamed, added };
using write_once = std::integral_constant<Write, Write::once>;
using write_streamed = std::integral_constant<Write, Write::streamed>;
using write_added = std::integral_constant<Write, Write::added>;

template <class S, Write write> INLINE void put(S* p, vec<S> value) {
  if constexpr (write == Write::streamed) stream(p, value);
  else store(p, write == Write::added ? load<S>(p) + value : value);
}

// dC of one feature, one tile of outputs, n tokens of g; if at_once, along too: of each token the vector whose sum over
// its numbers and all tiles is <g, C[i + 1] - C[i]>, begun in the first tile.
template <class S, int V, Write write, bool at_once>
void sorted_backward(int N, const S* c, int64_t c_stride, S* d, int64_t d_stride, const S* g, const int32_t* order,
                     const int32_t* start, const S* t, bool first, vec<S>* along) {
  constexpr int L = lanes<S>, W = V * L;
  vec<S> carry[V];  // U of the interval below
  UNROLL for (int v = 0; v < V; v++) carry[v] = vec<S>{};
  for (int i = 0; i < N - 1; i++, c += c_stride, d += d_stride) {
    if (at_once) prefetch_row<W>(c, ROWS_AHEAD * c_stride);
    vec<S> sum[V], weighted[V];  // S and U
    UNROLL for (int v = 0; v < V; v++) sum[v] = weighted[v] = vec<S>{};
    if (start[i] != start[i + 1]) {
      vec<S> rise[V];
      if (at_once) UNROLL for (int v = 0; v < V; v++) rise[v] = load<S>(c + c_stride + v * L) - load<S>(c + v * L);
      for (int q = start[i]; q < start[i + 1]; q++) {
        if (ROOMY) prefetch_row<W>(g, (int64_t)order[q + TOKENS_AHEAD] * W);
        const int b = order[q];
        const vec<S> ts = broadcast<S>(t[q]);
        vec<S> dot = {};
        if (at_once && !first) dot = along[b];
        UNROLL for (int v = 0; v < V; v++) {
          vec<S> gs = *(const vec<S>*)(g + (int64_t)b * W + v * L);
          KEEP(gs);
          sum[v] += gs;
          weighted[v] += ts * gs;
          if (at_once) dot += rise[v] * gs;
        }
        if (at_once) along[b] = dot;
      }
    }
    UNROLL for (int v = 0; v < V; v++) {
      put<S, write>(d + v * L, carry[v] + sum[v] - weighted[v]);
      carry[v] = weighted[v];
    }
  }
  UNROLL for (int v = 0; v < V; v++) put<S, write>(d + v * L, carry[v]);
}

// dC of a pair of features, sorted by both intervals, so that a load of g serves both; the second's is `between` after
// the first's. both (2, N - 1, 2, W) is for S and U of each.
template <class S, int V, Write write>
void paired_backward(int N, S* d, int64_t d_stride, int64_t between, const S* g, const int32_t* order,
                     const int32_t* start, const S* t, S* both) {
  constexpr int L = lanes<S>, W = V * L;
  std::fill(both, both + 4 * (N - 1) * W, S(0));
  S *outer = both, *inner = both + 2 * (N - 1) * W;
  for (int j = 0; j < N - 1; j++, start += N - 1, outer += 2 * W) {
    S* to = inner;
    for (int i = 0; i < N - 1; i++, to += 2 * W) {
      if (start[i] == start[i + 1]) continue;
      vec<S> sum[V] = {}, outer_weighted[V] = {}, inner_weighted[V] = {};
      for (int q = start[i]; q < start[i + 1]; q++) {
        const vec<S> outer_t = broadcast<S>(t[2 * q]), inner_t = broadcast<S>(t[2 * q + 1]);
        UNROLL for (int v = 0; v < V; v++) {
          vec<S> gs = *(const vec<S>*)(g + (int64_t)order[q] * W + v * L);
          KEEP(gs);
          sum[v] += gs;
          outer_weighted[v] += outer_t * gs;
          inner_weighted[v] += inner_t * gs;
        }
      }
      UNROLL for (int v = 0; v < V; v++) {
        *(vec<S>*)(outer + v * L) += sum[v];
        *(vec<S>*)(outer + W + v * L) += outer_weighted[v];
        *(vec<S>*)(to + v * L) += sum[v];
        *(vec<S>*)(to + W + v * L) += inner_weighted[v];
      }
    }
  }
  for (int r = 0; r < 2; r++, d += between) {
    vec<S> carry[V] = {};
    S* row = d;
    for (int i = 0; i < N - 1; i++, both += 2 * W, row += d_stride)
      UNROLL for (int v = 0; v < V; v++) {
        const vec<S> weighted = *(vec<S>*)(both + W + v * L);
        put<S, write>(row + v * L, carry[v] + *(vec<S>*)(both + v * L) - weighted);
        carry[v] = weighted;
      }
    UNROLL for (int v = 0; v < V; v++) put<S, write>(row + v * L, carry[v]);
  }
}

// The differences of one feature's rows in a tile, (N - 1, W); scratch is as large as the rows.
template <class S, class T, int V>
void rises_of(const T* table, const Layer<S>& layer, int64_t f, int64_t o0, S* scratch, S* rises) {
  constexpr int L = lanes<S>, W = V * L;
  int64_t stride;
  const S* c = rows_of<S, T, V>(table, layer, f, o0, scratch, stride);
  for (int i = 0; i < layer.N - 1; i++, c += stride, rises += W) {
    prefetch_row<W>(c, ROWS_AHEAD * stride);
    UNROLL for (int v = 0; v < V; v++) *(vec<S>*)(rises + v * L) = load<S>(c + stride + v * L) - load<S>(c + v * L);
  }
}

// <g, C[i + 1] - C[i]> of n tokens and one tile, for L features or fewer (count), added to dots (n, L). The difference
// for token b and feature k is at offsets[b L + k] of rises (count, N - 1, W).
template <class S, int V>
void dots_of(int n, int count, const int32_t* offsets, const S* rises, const S* g, bool first, S* dots) {
  constexpr int L = lanes<S>, W = V * L;
  for (int b = 0; b < n; b++, offsets += L, g += W, dots += L) {
    vec<S> gs[V], along[L] = {};
    UNROLL for (int v = 0; v < V; v++) {
      gs[v] = *(const vec<S>*)(g + v * L);
      KEEP(gs[v]);
    }
    UNROLL for (int k = 0; k < L; k++) {
      if (k == count) break;
      UNROLL for (int v = 0; v < V; v++) along[k] += gs[v] * *(const vec<S>*)(rises + offsets[k] + v * L);
    }
    vec<S> sum = sums<S>(along);
    if (!first) sum += *(vec<S>*)dots;
    *(vec<S>*)dots = sum;
  }
}

template <class S, class T>
void backward(const Layer<S>& layer, const S* g, const S* x, const T* table, S* dx, S* dtable) {
  constexpr int L = lanes<S>;
  const int64_t B = layer.B, F = layer.F, O = layer.O, N = layer.N;
  const int threads = thread_count(3.0 * B * F * O);

  const bool at_once = (ROOMY && N > PAIRED_BACKWARD) || B < TOKENS_FOR_TWO * N;
  int V = 1;
  double best = 1e300;
  for (int v : TILES) {
    const double cost = (O + v * L - 1) / (v * L) * (2.5 * v + 4);
    if (v <= (at_once ? V_most : V_narrow) && cost < best) best = cost, V = v;
  }
  const int64_t W = V * L, tiles = (O + W - 1) / W;
  const Blocks of_g = blocks_of<S>(B, N, tiles, W);
  const int64_t blocks = of_g.blocks, n_max = of_g.n_max, blocks_a_pass = of_g.a_pass;
  const bool aligned = O * sizeof(S) % VECTOR_BYTES == 0;
  const bool streamed = blocks == 1 && aligned && F * N * O * int64_t(sizeof(S)) >= 4 << 20;
  const int R = !at_once && N <= PAIRED_BACKWARD ? 2 : 1;
  // Features at a time: as many as a vector of dots has, or, at once, whose vectors (along) the second level holds.
  const int64_t FB = R * std::clamp<int64_t>(F / (4 * threads * R), 1, (at_once ? std::min(8, L) : L) / R);

  common.clear();
  S* packed = common.take<S>(blocks_a_pass * tiles * n_max * W);

#pragma omp parallel num_threads(threads)
  {
    const int64_t m = sorted_size(n_max), M = intervals(N, R) + 1;
    own.clear();
    int32_t *order = own.take<int32_t>(FB * m), *start = own.take<int32_t>(FB * M), *i = own.take<int32_t>(L * m);
    int32_t* interval = own.take<int32_t>(interval_size(n_max, intervals(N, R)));
    S *sorted_t = own.take<S>(FB * m), *t = own.take<S>(L * m);
    S* dots = own.take<S>(L * m);  // (FB, m) if at_once, else (m, L)
    S *tile = own.take<S>((at_once ? 1 : FB) * N * W), *d_tile = own.take<S>(R * N * W);
    S* both = R == 2 ? own.take<S>(4 * N * W) : nullptr;
    vec<S>* along = at_once ? own.take<vec<S>>(FB * m) : nullptr;

    for (int64_t first = 0; first < blocks; first += blocks_a_pass) {
      const int64_t in_pass = std::min(blocks_a_pass, blocks - first);
#pragma omp for schedule(static)
      for (int64_t z = 0; z < in_pass * tiles; z++) {
        const int64_t b0 = (first + z / tiles) * n_max, o0 = z % tiles * W;
        with_tile(V, [&](auto v) {
          pack<S, S, decltype(v)::value>(g + b0 * O + o0, std::min(n_max, B - b0), O, std::min(W, O - o0),
                                         packed + z * n_max * W);
        });
      }
#pragma omp for schedule(dynamic)
      for (int64_t f0 = 0; f0 < F; f0 += FB) {
        const int64_t fn = std::min(FB, F - f0);
        for (int64_t block = first; block < first + in_pass; block++) {
          const int64_t b0 = block * n_max, n = std::min(n_max, B - b0);
          locate_group(x + b0 * F + f0, layer, std::min<int64_t>(L, F - f0), n, i, t);
          for (int64_t f = 0; f < fn; f += R)
            sort_tokens(R == 2 && f + 2 <= fn, i + f, t + f, n, N, order + f * m, start + f * M, sorted_t + f * m,
                        interval);
          if (!at_once) to_offsets<S>(i, n, N - 1, W);
          for (int64_t k = 0; k < tiles; k++) {
            const int64_t o0 = k * W;
            const S* g_tile = packed + ((block - first) * tiles + k) * n_max * W;
            with_tile(V, [&](auto v) {
              constexpr int V = decltype(v)::value;
              if constexpr (V <= V_most) {
                if (!at_once) {
                  for (int64_t f = 0; f < fn; f++)
                    rises_of<S, T, V>(table, layer, f0 + f, o0, d_tile, tile + f * (N - 1) * W);
                  dots_of<S, V>(n, fn, i, tile, g_tile, k == 0, dots);
                }
                for (int64_t f = 0; f < fn; f += R) {
                  const bool pair = R == 2 && f + 2 <= fn;
                  S* d = dtable + (f0 + f) * N * O + o0;
                  const auto run = [&](auto write, S* d, int64_t d_stride) {
                    constexpr Write how = decltype(write)::value;
                    const int32_t *in_order = order + f * m, *starts = start + f * M;
                    const S* ts = sorted_t + f * m;
                    if (pair) {
                      paired_backward<S, V, how>(N, d, d_stride, N * d_stride, g_tile, in_order, starts, ts, both);
                    } else if (at_once) {
                      int64_t stride;
                      const S* c = rows_of<S, T, V>(table, layer, f0 + f, o0, tile, stride);
                      sorted_backward<S, V, how, true>(N, c, stride, d, d_stride, g_tile, in_order, starts, ts, k == 0,
                                                       along + f * m);
                    } else {
                      sorted_backward<S, V, how, false>(N, nullptr, 0, d, d_stride, g_tile, in_order, starts, ts, false,
                                                        nullptr);
                    }
                  };
                  if (o0 + W > O) {  // the last tile, if narrower
                    run(write_once(), d_tile, W);
                    for (int64_t r = 0; r < (1 + pair) * N; r++)
                      for (int64_t j = 0; j < O - o0; j++)
                        d[r * O + j] = (block ? d[r * O + j] : S(0)) + d_tile[r * W + j];
                  } else if (block) {
                    run(write_added(), d, O);
                  } else if (streamed) {
                    run(write_streamed(), d, O);
                  } else {
                    run(write_once(), d, O);
                  }
                }
              }
            });
          }
          if (at_once)
            for (int64_t f = 0; f < fn; f++)
              for (int64_t b = 0; b < n; b += L) store(dots + f * m + b, sums<S>(along + f * m + b));
          for (int64_t b = 0; b < n; b++)
            for (int64_t f = 0; f < fn; f++)
              dx[(b0 + b) * F + f0 + f] = dots[at_once ? f * m + b : b * L + f] * layer.inv;
        }
      }
    }
#ifdef __AVX2__
    _mm_sfence();  // streamed stores are not ordered by the barrier
#endif
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// From parameters to control points

// to (N, O) = matrix (N, N) times from (N, O).
template <class S> void multiply(const S* matrix, const S* from, S* to, int64_t N, int64_t O) {
  constexpr int L = lanes<S>;
  constexpr std::integral_constant<int, 4> wide;
  constexpr std::integral_constant<int, 1> narrow;
  // Two rows at a time, so that one load serves two multiply-adds.
  const auto rows = [&](int64_t o, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t n = 0; n < N; n += 2) {
      const S* weights[2] = {matrix + n * N, matrix + std::min(n + 1, N - 1) * N};
      vec<S> sum[2][V] = {};
      for (int64_t k = 0; k < N; k++) {
        const vec<S> w[2] = {broadcast<S>(weights[0][k]), broadcast<S>(weights[1][k])};
        UNROLL for (int v = 0; v < V; v++) {
          const vec<S> row = load<S>(from + k * O + o + v * L);
          UNROLL for (int r = 0; r < 2; r++) sum[r][v] += w[r] * row;
        }
      }
      for (int r = 0; r < std::min<int64_t>(2, N - n); r++)
        UNROLL for (int v = 0; v < V; v++) store<S>(to + (n + r) * O + o + v * L, sum[r][v]);
    }
  };
  int64_t o = 0;
  for (; o + wide * L <= O; o += wide * L) rows(o, wide);
  for (; o + L <= O; o += L) rows(o, narrow);
  if (o < O && O >= L) rows(O - L, narrow), o = O;  // some of it once more
  for (; o < O; o++)
    for (int64_t n = 0; n < N; n++) {
      S sum = 0;
      for (int64_t k = 0; k < N; k++) sum += matrix[n * N + k] * from[k * O + o];
      to[n * O + o] = sum;
    }
}

// c = matrix (N, N) times each feature's rows of p (F, N, O): control points from what is learned
// (kan_parameterizations.py). A batch of matrix products, but of small ones. Of surfaces, which have N rows of rows,
// p (F, N, N, O): along both axes, and what is between stays in the cache.
template <class S>
void multiply_all(const S* matrix, const S* p, S* c, int64_t F, int64_t N, int64_t O, bool both) {
  const int64_t size = (both ? N : 1) * N * O;
#pragma omp parallel for num_threads(thread_count((both ? 2.0 : 1.0) * F * N * size))
  for (int64_t f = 0; f < F; f++) {
    const S* from = p + f * size;
    if (both) {
      own.clear();
      S* between = own.take<S>(size);
      for (int64_t n = 0; n < N; n++) multiply(matrix, from + n * N * O, between + n * N * O, N, O);
      from = between;
    }
    multiply(matrix, from, c + f * size, N, size / N);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators

template <class Run> void with_types(const Tensor& x, const Tensor& table, Run run) {
  const auto s = x.scalar_type(), t = table.scalar_type();
  if (s == at::kDouble && t == at::kDouble) return run(double(), double());
  if (s == at::kFloat && t == at::kFloat) return run(float(), float());
  TORCH_CHECK(s == at::kFloat && t == at::kBFloat16,
              "spline: x and table must be both float32 or both float64, or float32 and bfloat16, got ", s, " and ", t);
  run(float(), BFloat16());
}

}  // namespace

namespace splinegpt {

// rounded: with a bfloat16 table, positions may be rounded to bfloat16 where that is faster.
Tensor spline(const Tensor& x_, const Tensor& table_, double width, bool rounded) {
  const Tensor x = x_.contiguous(), table = table_.contiguous();
  Tensor y = at::empty({x.size(0), table.size(2)}, x.options());
  with_types(x, table, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const auto layer = describe<S>(x, table, width);
    if (!y.numel()) return;
    const S* xs = x.const_data_ptr<S>();
    const T* c = table.const_data_ptr<T>();
    if constexpr (HAS_PAIRS && std::is_same_v<T, BFloat16>)
      if (rounded) return forward<S, T, true>(layer, xs, c, y.data_ptr<S>());
    forward<S, T, false>(layer, xs, c, y.data_ptr<S>());
  });
  return y;
}

// Gradients of x and of the table; a bfloat16 table's is float32.
std::tuple<Tensor, Tensor> spline_backward(const Tensor& g_, const Tensor& x_, const Tensor& table_, double width) {
  const Tensor g = g_.contiguous(), x = x_.contiguous(), table = table_.contiguous();
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dtable;
  with_types(x, table, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const auto layer = describe<S>(x, table, width);
    TORCH_CHECK(g.dim() == 2 && g.size(0) == layer.B && g.size(1) == layer.O && g.scalar_type() == x.scalar_type(),
                "spline_backward: g must be (", layer.B, ", ", layer.O, ") and of the type of x, got ", g.sizes());
    if (layer.B == 0) {
      dtable = at::zeros(table.sizes(), x.options());
      return;
    }
    dtable = pooled(table.sizes(), x.options());
    backward<S, T>(layer, g.const_data_ptr<S>(), x.const_data_ptr<S>(), table.const_data_ptr<T>(), dx.data_ptr<S>(),
                   dtable.data_ptr<S>());
  });
  return {dx, dtable};
}

}  // namespace splinegpt

namespace {

Tensor change_basis(const Tensor& matrix_, const Tensor& p_) {
  const Tensor matrix = matrix_.contiguous(), p = p_.contiguous();
  const bool both = p.dim() == 4;
  TORCH_CHECK((both ? p.size(1) == p.size(2) : p.dim() == 3) && matrix.dim() == 2 && matrix.size(0) == p.size(1) &&
                  matrix.size(1) == p.size(1) && matrix.scalar_type() == p.scalar_type(),
              "change_basis: p must be (F, N, O) and the matrix (N, N), of one type, or p (F, N, N, O), got ", p.sizes(),
              " and ", matrix.sizes());
  Tensor c = pooled(p.sizes(), p.options());
  with_types(p, p, [&](auto s, auto) {
    using S = decltype(s);
    multiply_all(matrix.const_data_ptr<S>(), p.const_data_ptr<S>(), c.data_ptr<S>(), p.size(0), p.size(1), p.size(-1),
                 both);
  });
  return c;
}

// How many threads a parallel region gets: 1 would mean that OpenMP was left out.
int64_t threads() {
  int64_t count = 1;
#pragma omp parallel num_threads(at::get_num_threads())
#pragma omp single
  count = omp_get_num_threads();
  return count;
}

std::string instruction_set() {
#if defined(__AVX512BF16__)
  return "AVX-512 with BF16";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return std::to_string(8 * VECTOR_BYTES) + "-bit vectors";
#endif
}

TORCH_LIBRARY(splinegpt_cpu, m) {
  m.def("threads() -> int", &threads);
  m.def("instruction_set() -> str", &instruction_set);
  m.def("release_memory() -> ()", &release_memory);
  m.def("spline(Tensor x, Tensor table, float width, bool rounded=False) -> Tensor");
  m.def("spline_backward(Tensor g, Tensor x, Tensor table, float width) -> (Tensor, Tensor)");
  m.def("change_basis(Tensor matrix, Tensor p) -> Tensor");
}
TORCH_LIBRARY_IMPL(splinegpt_cpu, CPU, m) {
  m.impl("spline", &spline);
  m.impl("spline_backward", &spline_backward);
  m.impl("change_basis", &change_basis);
}

}  // namespace
