/*
The spline layer in bfloat16, for CPUs with its paired dot product (AVX512-BF16), which of 16 pairs makes

    sum += a.low * b.low + a.high * b.high

in the time of one multiply-add. So it is a whole look-up, where a has the weights (1 - t, t) of a token and b two rows
of the table, number by number side by side. y, g = dL/dy, rows and weights are bfloat16, sums float32.

Forward: rows are laid out in pairs, of 16 features at a time, and the tokens pass in their order, with their sums in
registers meanwhile. To keep rows in registers and sort tokens, as spline.cpp does, would be bound by the sums' way to the
cache and back, and sorting.

Backward: a pair may also be two outputs, or two tokens.

    dx = <g, C[i + 1] - C[i]> * (N - 1) / width     pairs of outputs; the difference is rounded, not what it is of
    S[i] = sum g    U[i] = sum t * g                pairs of tokens, in order of their intervals, for two features at once
    dC[k] = S[k] - U[k] + U[k - 1]

Weights are rounded so that they sum to one: the larger one to the nearest, the other is what is left, which is exact for
|t| < 256. If a token lies further out, or tokens are few, and on all other CPUs, spline.cpp computes it in float32.

Legend
    B tokens, F features, N control points, O outputs        x (B, F), C (F, N, O), dC: float32    y, g (B, O): bfloat16
    i interval, t position in it, both of one token and feature        W outputs of a tile, Z vectors of them in bfloat16
*/
#include <c10/util/BFloat16.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "look_up.h"

namespace {

using namespace splinegpt;
using at::Tensor;
using c10::BFloat16;

#ifdef __AVX512BF16__

constexpr int L = lanes<float>;
typedef vec<float> floats;
typedef Types<float>::ints ints;
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES)));  // each two numbers in bfloat16
static_assert(L == 16);

INLINE floats add_products(floats sum, words a, words b) {
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE words repeat(uint32_t word) { return word - words{}; }

// 32 numbers in order, rounded.
INLINE words rounded(floats first, floats second) {
  return (words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// Of two times 16 numbers, one of each side by side.
INLINE words side_by_side(floats low, floats high) {
  const auto from = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                     23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (words)_mm512_permutexvar_epi16(from, (__m512i)rounded(low, high));
}
// 32 outputs so ordered that the halves of two such vectors, lane by lane, are their first 16 outputs and their last.
INLINE words for_halves(words outputs) {
  return (words)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), (__m512i)outputs);
}

// Of L features, or fewer (count), and n tokens: intervals, and weights, 1 - t in the lower half and t in the upper one,
// both (n, L). Returns whether all lie near enough.
bool locate_group(const float* x, const Layer<float>& layer, int count, int n, int32_t* i, uint32_t* weights) {
  ints far = {};
  for (int b = 0; b < n; b++, x += layer.F, i += L, weights += L) {
    floats t;
    ints interval;
    locate<float>((floats)_mm512_maskz_loadu_ps((1 << count) - 1, x), layer, interval, t);
    far |= ~((t < 256) & (t > -256));
    const auto low = t < 0.5f;
    const words bits = (words)(low ? 1 - t : t);
    const floats larger = (floats)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000), smaller = 1 - larger;
    *(ints*)i = interval;
    *(words*)weights = (words)(low ? larger : smaller) >> 16 | ((words)(low ? smaller : larger) & 0xffff0000);
  }
  return !_mm512_test_epi32_mask((__m512i)far, (__m512i)far);
}

// A tile of outputs is Z vectors of bfloat16, or 2 Z of float32.
template <class F> INLINE void with_tile(int Z, F f) {
  Z == 1 ? f(std::integral_constant<int, 1>()) : f(std::integral_constant<int, 2>());
}
int tile_of(int64_t O) { return O <= 2 * L ? 1 : 2; }

// Rows of a tile, c (N, O) from its first output on, of which there are so many (width); what lies beyond is zero.
template <int Z, class Visit> INLINE void for_rows(const float* c, int N, int64_t O, int width, Visit visit) {
  constexpr int V = 2 * Z;
  floats below[V], above[V];
  for (int k = 0; k < N; k++, c += O) {
    UNROLL for (int v = 0; v < V; v++) {
      const int left = std::clamp(width - v * L, 0, L);
      above[v] = (floats)_mm512_maskz_loadu_ps((1 << left) - 1, c + v * L);
    }
    if (k) visit(k - 1, below, above);
    UNROLL for (int v = 0; v < V; v++) below[v] = above[v];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Rows (N - 1, W) of one feature: those of each interval side by side.
template <int Z> void pair_rows(const float* c, int N, int64_t O, int width, uint32_t* rows) {
  for_rows<Z>(c, N, O, width, [&](int i, const floats* below, const floats* above) {
    UNROLL for (int v = 0; v < 2 * Z; v++) *(words*)(rows + (i * 2 * Z + v) * L) = side_by_side(below[v], above[v]);
  });
}

// y (n, W) += the curves of L features or fewer (count); the rows of token b and feature k begin at offsets[b L + k].
template <int Z>
void look_up(int n, int count, const int32_t* offsets, const uint32_t* weights, const uint32_t* rows, float* y) {
  constexpr int V = 2 * Z;
  for (int b = 0; b < n; b++, offsets += L, weights += L, y += V * L) {
    floats sum[V];
    UNROLL for (int v = 0; v < V; v++) sum[v] = *(floats*)(y + v * L);
    UNROLL for (int k = 0; k < L; k++) {
      if (k == count) break;
      const words both = repeat(weights[k]);
      UNROLL for (int v = 0; v < V; v++)
        sum[v] = add_products(sum[v], *(const words*)(rows + offsets[k] + v * L), both);
    }
    UNROLL for (int v = 0; v < V; v++) *(floats*)(y + v * L) = sum[v];
  }
}

// False, and y unfinished, if a token lies too far out.
bool forward(const Layer<float>& layer, const float* x, const float* table, BFloat16* y) {
  const int64_t B = layer.B, F = layer.F, N = layer.N, O = layer.O;
  const int threads = thread_count(2.0 * B * F * O), Z = tile_of(O), W = 2 * Z * L;
  const int64_t limit = std::min(tokens_in_cache<float>(W, 2, 0), std::max<int64_t>(128, (1 << 23) / F));
  const int64_t blocks = (B + limit - 1) / limit, block = (B + blocks - 1) / blocks, gangs = (F + L - 1) / L;
  // Threads share out tiles and, if those don't come out even, parts of the tokens.
  const int64_t tiles = (O + W - 1) / W, parts = tiles % threads ? threads : 1;

  common.clear();
  auto* offsets = common.take<int32_t>(gangs * block * L);
  auto* weights = common.take<uint32_t>(gangs * block * L);
  bool near = true;
#pragma omp parallel num_threads(threads)
  {
    own.clear();
    auto* rows = own.take<uint32_t>(L * (N - 1) * W);
    auto* y_tile = own.take<float>((block + parts - 1) / parts * W);
    for (int64_t first = 0; first < B; first += block) {
      const int64_t n = std::min(block, B - first);
#pragma omp for schedule(static) reduction(&& : near)
      for (int64_t z = 0; z < gangs; z++) {
        int32_t* i = offsets + z * block * L;
        const int count = std::min<int64_t>(L, F - z * L);
        near = locate_group(x + first * F + z * L, layer, count, n, i, weights + z * block * L) && near;
        to_offsets<float>(i, n, N - 1, W);
      }
      if (!near) break;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tiles * parts; task++) {
        const int64_t o0 = task / parts * W, width = std::min<int64_t>(W, O - o0);
        const int64_t from = n * (task % parts) / parts, to = n * (task % parts + 1) / parts;
        std::fill(y_tile, y_tile + (to - from) * W, 0.0f);
        with_tile(Z, [&](auto z) {
          constexpr int Z = decltype(z)::value;
          for (int64_t gang = 0; gang < gangs; gang++) {
            const int count = std::min<int64_t>(L, F - gang * L);
            for (int k = 0; k < count; k++)
              pair_rows<Z>(table + (gang * L + k) * N * O + o0, N, O, width, rows + k * (N - 1) * W);
            const int64_t at = (gang * block + from) * L;
            look_up<Z>(to - from, count, offsets + at, weights + at, rows, y_tile);
          }
          for (int64_t b = from; b < to; b++)
            for (int64_t o = 0; o < width; o += L) {
              const __mmask16 some = (1 << std::min<int64_t>(L, width - o)) - 1;
              const floats sum = *(floats*)(y_tile + (b - from) * W + o);
              _mm256_mask_storeu_epi16(y + (first + b) * O + o0 + o, some, (__m256i)_mm512_cvtneps_pbh((__m512)sum));
            }
        });
      }
    }
  }
  return near;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// n rows of a tile of g, (n, W), ordered for halves; rows are O apart, and what lies beyond width is zero.
template <int Z> void pack(const BFloat16* g, int n, int64_t O, int width, BFloat16* to) {
  for (int b = 0; b < n; b++, g += O)
    UNROLL for (int z = 0; z < Z; z++, to += 2 * L) {
      const int left = std::clamp(width - z * 2 * L, 0, 2 * L);
      const auto some = _mm512_maskz_loadu_epi16((__mmask32)((1ull << left) - 1), g + z * 2 * L);
      *(words*)to = for_halves((words)some);
    }
}

// The differences of one feature's rows, (N - 1, stride), ordered as g is.
template <int Z> void rises_of(const float* c, int N, int64_t O, int width, int stride, BFloat16* rises) {
  for_rows<Z>(c, N, O, width, [&](int i, const floats* below, const floats* above) {
    UNROLL for (int z = 0; z < Z; z++)
      *(words*)(rises + i * stride + z * 2 * L) =
          for_halves(rounded(above[2 * z] - below[2 * z], above[2 * z + 1] - below[2 * z + 1]));
  });
}

// <g, C[i + 1] - C[i]> of n tokens, for L features or fewer (count), in so many tiles at once, added to dots (n, L). The
// difference for token b and feature k is at offsets[b L + k], times tiles, of rises; tiles of g are `apart` rows apart.
// Two at once share the sums of L vectors, which take as long as the products of one.
template <int Z, int tiles>
void dots_of(int n, int count, const int32_t* offsets, const BFloat16* rises, const BFloat16* g,
             int64_t apart, bool first, float* dots) {
  constexpr int W = 2 * Z * L;
  for (int b = 0; b < n; b++, offsets += L, g += W, dots += L) {
    words gs[tiles * Z];
    floats along[L] = {};
    UNROLL for (int z = 0; z < tiles * Z; z++) gs[z] = *(const words*)(g + z / Z * apart * W + z % Z * 2 * L);
    UNROLL for (int k = 0; k < L; k++) {
      if (k == count) break;
      UNROLL for (int z = 0; z < tiles * Z; z++)
        along[k] = add_products(along[k], *(const words*)(rises + tiles * offsets[k] + z * 2 * L), gs[z]);
    }
    const floats sum = sums<float>(along);
    *(floats*)dots = first ? sum : *(floats*)dots + sum;
  }
}

// Tokens in order of one feature's interval, or of two features', of the first's first; t of each so too, in bfloat16,
// with room for one more. i and weights are locate_group's, from the feature in question on.
void sort_tokens(bool pair, const int32_t* i, const uint32_t* weights, int n, int N, int32_t* order, int32_t* start,
                 uint16_t* t, uint16_t* other_t, int32_t* interval) {
  const int M = intervals(N, 1 + pair);
  const auto sort = [&](auto where, auto place) {
    if (4 * M <= n) sort_by<4>(interval, n, M, start, where, place);
    else sort_by<1>(interval, n, M, start, where, place);
  };
  const auto place = [&](int b, int q) { order[q] = b, t[q] = weights[b * L] >> 16; };
  if (pair)
    sort([&](int b) { return i[b * L] * (N - 1) + i[b * L + 1]; },
         [&](int b, int q) { place(b, q), other_t[q] = weights[b * L + 1] >> 16; });
  else sort([&](int b) { return i[b * L]; }, place);
}

// dC, one tile, of one feature or of a pair, sorted: d (N, O) and `between` further on, of which the first `width` of a
// row's W numbers are there; they are added to, or streamed past the caches. inner (N - 1, 2, W) is for S and U of the
// second feature.
template <int Z, bool pair>
void sorted_backward(int N, float* d, int64_t O, int width, int64_t between, bool add, bool streamed,
                     const BFloat16* g, const int32_t* order, const int32_t* start, const uint16_t* t,
                     const uint16_t* other_t, float* inner) {
  constexpr int V = 2 * Z, W = V * L;
  constexpr uint32_t one = 0x3f80;
  const auto put = [&](float* row, const floats* values) {
    UNROLL for (int v = 0; v < V; v++) {
      if (streamed) {
        stream(row + v * L, values[v]);
        continue;
      }
      const __mmask16 some = (1 << std::clamp(width - v * L, 0, L)) - 1;
      const __m512 before = add ? _mm512_maskz_loadu_ps(some, row + v * L) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(row + v * L, some, (__m512)((floats)before + values[v]));
    }
  };
  if (pair) std::fill(inner, inner + 2 * (N - 1) * W, 0.0f);
  floats carry[V] = {}, row[V];
  for (int j = 0; j < N - 1; j++) {
    floats whole[V] = {}, weighted[V] = {};  // S and U of the first feature
    for (int i = 0; i < (pair ? N - 1 : 1); i++, start++) {
      if (start[0] == start[1]) continue;
      floats sum[V] = {}, other[V] = {};
      const auto visit = [&](int q, int next, uint32_t ones, uint32_t mask) {
        uint32_t ts, others = 0;
        memcpy(&ts, t + q, 4);
        if (pair) memcpy(&others, other_t + q, 4);
        const words both = repeat(ts & mask), both_other = repeat(others & mask), each = repeat(ones);
        const BFloat16 *first = g + (int64_t)order[q] * W, *second = g + (int64_t)order[next] * W;
        UNROLL for (int z = 0; z < Z; z++) {
          const auto a = *(const __m512i*)(first + z * 2 * L), b = *(const __m512i*)(second + z * 2 * L);
          const words halves[2] = {(words)_mm512_unpacklo_epi16(a, b), (words)_mm512_unpackhi_epi16(a, b)};
          UNROLL for (int h = 0; h < 2; h++) {
            const int v = 2 * z + h;
            sum[v] = add_products(sum[v], halves[h], each);
            weighted[v] = add_products(weighted[v], halves[h], both);
            if (pair) other[v] = add_products(other[v], halves[h], both_other);
          }
        }
      };
      int q = start[0];
      for (; q + 1 < start[1]; q += 2) visit(q, q + 1, one << 16 | one, ~0u);
      if (q < start[1]) visit(q, q, one, 0xffff);
      UNROLL for (int v = 0; v < V; v++) {
        whole[v] += sum[v];
        if (pair) {
          *(floats*)(inner + 2 * i * W + v * L) += sum[v];
          *(floats*)(inner + (2 * i + 1) * W + v * L) += other[v];
        }
      }
    }
    UNROLL for (int v = 0; v < V; v++) row[v] = carry[v] + whole[v] - weighted[v], carry[v] = weighted[v];
    put(d + j * O, row);
  }
  put(d + (N - 1) * O, carry);
  if (!pair) return;
  d += between;
  UNROLL for (int v = 0; v < V; v++) carry[v] = floats{};
  for (int i = 0; i < N - 1; i++, inner += 2 * W) {
    UNROLL for (int v = 0; v < V; v++) {
      const floats weighted = *(floats*)(inner + W + v * L);
      row[v] = carry[v] + *(floats*)(inner + v * L) - weighted, carry[v] = weighted;
    }
    put(d + i * O, row);
  }
  put(d + (N - 1) * O, carry);
}

// False, and the gradients unfinished, if a token lies too far out.
bool backward(const Layer<float>& layer, const BFloat16* g, const float* x, const float* table, float* dx,
              float* dtable) {
  const int64_t B = layer.B, F = layer.F, N = layer.N, O = layer.O;
  const int threads = thread_count(3.0 * B * F * O), Z = tile_of(O), W = 2 * Z * L;
  const int64_t tiles = (O + W - 1) / W;
  const Blocks of_g = blocks_of<BFloat16>(B, N, tiles, W);
  const int64_t blocks = of_g.blocks, n_max = of_g.n_max, blocks_a_pass = of_g.a_pass;
  const int64_t m = sorted_size(n_max);
  const bool streamed = blocks == 1 && O % W == 0 && F * N * O * int64_t(sizeof(float)) >= 4 << 20;
  // Features go in pairs if their intervals have six tokens each or so (Zen 4, 128 and 384 wide).
  const int R = N <= 16 && n_max >= 6 * (N - 1) * (N - 1) ? 2 : 1;
  const int64_t FB = std::clamp<int64_t>(F / (4 * threads) / 2 * 2, 2, L);  // features at a time

  common.clear();
  auto* packed = common.take<BFloat16>(blocks_a_pass * tiles * n_max * W);
  bool near = true;
#pragma omp parallel num_threads(threads)
  {
    const int64_t M = intervals(N, R) + 1;
    own.clear();
    auto *i = own.take<int32_t>(L * m), *order = own.take<int32_t>(FB * m), *start = own.take<int32_t>(FB * M);
    auto* interval = own.take<int32_t>(interval_size(n_max, M));
    auto* weights = own.take<uint32_t>(L * m);
    auto* t = own.take<uint16_t>(FB * m);
    auto *dots = own.take<float>(L * m), *inner = own.take<float>(2 * N * W);
    auto* rises = own.take<BFloat16>(2 * FB * (N - 1) * W);

    for (int64_t first = 0; first < blocks; first += blocks_a_pass) {
      const int64_t in_pass = std::min(blocks_a_pass, blocks - first);
#pragma omp for schedule(static)
      for (int64_t z = 0; z < in_pass * tiles; z++) {
        const int64_t b0 = (first + z / tiles) * n_max, o0 = z % tiles * W;
        with_tile(Z, [&](auto vectors) {
          pack<decltype(vectors)::value>(g + b0 * O + o0, std::min(n_max, B - b0), O, std::min<int64_t>(W, O - o0),
                                         packed + z * n_max * W);
        });
      }
#pragma omp for schedule(dynamic) reduction(&& : near)
      for (int64_t f0 = 0; f0 < F; f0 += FB) {
        const int count = std::min(FB, F - f0);
        for (int64_t block = first; block < first + in_pass; block++) {
          const int64_t b0 = block * n_max;
          const int n = std::min(n_max, B - b0);
          near = locate_group(x + b0 * F + f0, layer, std::min<int64_t>(L, F - f0), n, i, weights) && near;
          for (int f = 0; f < count; f += R)
            sort_tokens(R == 2 && f + 2 <= count, i + f, weights + f, n, N, order + f * m, start + f * M, t + f * m,
                        t + (f + 1) * m, interval);
          to_offsets<float>(i, n, N - 1, W);
          for (int64_t k = 0; k < tiles; k++) {
            const int64_t o0 = k * W;
            const BFloat16* g_tile = packed + ((block - first) * tiles + k) * n_max * W;
            const auto width = [&](int64_t o) { return std::min<int64_t>(W, O - o); };
            with_tile(Z, [&](auto vectors) {
              constexpr int Z = decltype(vectors)::value;
              const auto dots_in = [&](auto together) {
                constexpr int now = decltype(together)::value;
                for (int f = 0; f < count; f++)
                  for (int64_t j = 0, o = o0; j < now; j++, o += W)
                    rises_of<Z>(table + (f0 + f) * N * O + o, N, O, width(o), now * W,
                                rises + (f * (N - 1) * now + j) * W);
                dots_of<Z, now>(n, count, i, rises, g_tile, n_max, k == 0, dots);
              };
              if (k % 2 == 0)
                k + 1 < tiles ? dots_in(std::integral_constant<int, 2>()) : dots_in(std::integral_constant<int, 1>());
              for (int f = 0; f < count; f += R) {
                const auto run = [&](auto pair) {
                  sorted_backward<Z, decltype(pair)::value>(
                      N, dtable + (f0 + f) * N * O + o0, O, width(o0), N * O, block > 0, streamed, g_tile,
                      order + f * m, start + f * M, t + f * m, t + (f + 1) * m, inner);
                };
                R == 2 && f + 2 <= count ? run(std::true_type()) : run(std::false_type());
              }
            });
          }
          for (int64_t b = 0; b < n; b++)
            for (int f = 0; f < count; f++) dx[(b0 + b) * F + f0 + f] = dots[b * L + f] * layer.inv;
        }
      }
    }
    _mm_sfence();  // streamed stores are not ordered by the barrier
  }
  return near;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The operators

// How many tokens for each control point are worth the laying out of rows, and of their differences: with 128 to 768
// channels and N from 2 to 128 (Zen 4).
constexpr int TOKENS = 8;

Layer<float> check(const Tensor& x, const Tensor& table, double width) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && table.scalar_type() == at::kFloat,
              "spline_bfloat16: x and table must be float32, got ", x.scalar_type(), " and ", table.scalar_type());
  return describe<float>(x, table, width);
}

Tensor in_bfloat16(const Tensor& x_, const Tensor& table_, double width) {
  const Tensor x = x_.contiguous(), table = table_.contiguous();
  const auto layer = check(x, table, width);
#ifdef __AVX512BF16__
  if (layer.B >= TOKENS * layer.N) {
    Tensor y = at::empty({layer.B, layer.O}, x.options().dtype(at::kBFloat16));
    if (forward(layer, x.const_data_ptr<float>(), table.const_data_ptr<float>(), y.data_ptr<BFloat16>())) return y;
  }
#endif
  return spline(x, table, width, false).to(at::kBFloat16);
}

// Gradients of x and of the table.
std::tuple<Tensor, Tensor> backward_in_bfloat16(const Tensor& g_, const Tensor& x_, const Tensor& table_,
                                                double width) {
  const Tensor g = g_.contiguous(), x = x_.contiguous(), table = table_.contiguous();
  const auto layer = check(x, table, width);
  TORCH_CHECK(g.dim() == 2 && g.size(0) == layer.B && g.size(1) == layer.O && g.scalar_type() == at::kBFloat16,
              "spline_bfloat16_backward: g must be (", layer.B, ", ", layer.O, ") in bfloat16, got ", g.sizes(), " in ",
              g.scalar_type());
#ifdef __AVX512BF16__
  if (layer.B >= TOKENS * layer.N) {
    Tensor dx = at::empty(x.sizes(), x.options()), dtable = pooled(table.sizes(), x.options());
    if (backward(layer, g.const_data_ptr<BFloat16>(), x.const_data_ptr<float>(), table.const_data_ptr<float>(),
                 dx.data_ptr<float>(), dtable.data_ptr<float>()))
      return {dx, dtable};
  }
#endif
  return spline_backward(g.to(at::kFloat), x, table, width);
}

TORCH_LIBRARY_FRAGMENT(splinegpt_cpu, m) {
  m.def("spline_bfloat16(Tensor x, Tensor table, float width) -> Tensor");
  m.def("spline_bfloat16_backward(Tensor g, Tensor x, Tensor table, float width) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(splinegpt_cpu, CPU, m) {
  m.impl("spline_bfloat16", &in_bfloat16);
  m.impl("spline_bfloat16_backward", &backward_in_bfloat16);
}

}  // namespace
