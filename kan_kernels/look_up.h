// What the spline layer's kernels share: sums of vectors, memory, where tokens fall and how they are sorted. Sizes as in
// spline.cpp.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "vectors.h"

namespace splinegpt {

using at::Tensor;

// spline.cpp's operators, which bfloat16.cpp falls back to.
Tensor spline(const Tensor& x, const Tensor& table, double width, bool rounded);
std::tuple<Tensor, Tensor> spline_backward(const Tensor& g, const Tensor& x, const Tensor& table, double width);

template <class S> struct Layer {
  int64_t B, F, O;
  int N;
  S half, inv;  // half the width; knots per unit
};

template <class S> Layer<S> describe(const Tensor& x, const Tensor& table, double width) {
  TORCH_CHECK(x.dim() == 2 && table.dim() == 3 && x.size(1) == table.size(0) && table.size(1) >= 2 &&
                  table.size(0) && table.size(2),
              "spline: x must be (B, F) and the table (F, N, O) with N >= 2, F and O >= 1, got ", x.sizes(), " and ",
              table.sizes());
  return {x.size(0), x.size(1), table.size(2), (int)table.size(1), S(width / 2), S((table.size(1) - 1) / width)};
}

// Even and odd pieces of every lane of a and b added, those of a first; lane and piece in numbers.
template <class S, int lane, int piece, size_t... I>
INLINE vec<S> add_pairs(vec<S> a, vec<S> b, std::index_sequence<I...>) {
  constexpr auto from = [](int j, int odd) {
    const int p = j % lane / piece, half = lane / piece / 2;
    return (p >= half) * lanes<S> + j / lane * lane + (p % half * 2 + odd) * piece + j % piece;
  };
  return __builtin_shufflevector(a, b, from(I, 0)...) + __builtin_shufflevector(a, b, from(I, 1)...);
}
// The sums of L vectors, as one vector. Numbers leave their 16 bytes last: with AVX2 that costs more.
template <class S, int n = lanes<S>> INLINE vec<S> sums(const vec<S>* p) {
  constexpr int L = lanes<S>, lane = 16 / sizeof(S);
  if constexpr (n == 1) return *p;
  else
    return add_pairs<S, n <= lane ? lane : L, n <= lane ? 1 : lane>(sums<S, n / 2>(p), sums<S, n / 2>(p + n / 2),
                                                                   std::make_index_sequence<L>());
}

// Gradients of large tables. The C library gives memory of that size back to the system and fetches it again at every
// step, page by page: 18 ms for the 75 MB of a 384 to 384 layer at N = 128, three times its whole backward. So freed
// ones are kept, up to 1 GB.
struct Pool {
  static constexpr size_t least = 1 << 20, most = 1 << 30;
  std::mutex mutex;
  std::vector<std::pair<void*, size_t>> free_blocks;
  size_t held = 0;
  void* get(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (auto& block : free_blocks)
        if (block.second == bytes) {
          void* p = block.first;
          block = free_blocks.back();
          free_blocks.pop_back();
          held -= bytes;
          return p;
        }
    }
    return allocate(bytes);
  }
  void put(void* p, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    if (held + bytes > most) return free(p);
    free_blocks.emplace_back(p, bytes);
    held += bytes;
  }
  void release() {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& block : free_blocks) free(block.first);
    free_blocks.clear();
    held = 0;
  }
};

inline Pool* pool = new Pool;  // never destroyed: tensors may outlive everything else

inline Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < Pool::least) return at::empty(sizes, options);
  return at::from_blob(pool->get(bytes), sizes, [bytes](void* p) { pool->put(p, bytes); }, options);
}

inline size_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  if (long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return size;
#endif
  return 512 * 1024;
}

// How many tokens of a tile W wide to take at a time: what fills a fraction of the second-level cache, but enough to
// give an interval some work (least), for which the third level is near enough, up to 4096.
template <class S> int64_t tokens_in_cache(int W, int fraction, int64_t least) {
  const int64_t fit = second_level_cache() / fraction / (W * sizeof(S));
  return std::clamp<int64_t>(std::max(fit, std::min<int64_t>(least, 4096)), 128, 4096);
}

// How the backward takes g, copied tile by tile, n_max tokens at a time: a block of a tile stays in the second-level cache
// while the features pass. Passes keep the copy below 16 MB.
struct Blocks {
  int64_t blocks, n_max, a_pass;
};
template <class S> Blocks blocks_of(int64_t B, int64_t N, int64_t tiles, int64_t W) {
  const int64_t limit = tokens_in_cache<S>(W, 5, 32 * N);
  const int64_t blocks = (B + limit - 1) / limit, n_max = (B + blocks - 1) / blocks;
  return {blocks, n_max, std::clamp<int64_t>((16 << 20) / (n_max * tiles * W * sizeof(S)), 1, blocks)};
}

template <class S> INLINE void locate(vec<S> x, const Layer<S>& layer, typename Types<S>::ints& i, vec<S>& t) {
  vec<S> u = (x + layer.half) * layer.inv, zero = {}, last = broadcast<S>(layer.N - 2);
  vec<S> clamped = u > zero ? u : zero;  // so NaN gets interval 0, and t = NaN
  clamped = clamped < last ? clamped : last;
  i = __builtin_convertvector(clamped, typename Types<S>::ints);
  t = u - __builtin_convertvector(i, vec<S>);
}

// Of L features: interval and position of each token, (n, L). Beyond count they are those of x = 0.
template <class S> void locate_group(const S* x, const Layer<S>& layer, int count, int n, int32_t* i, S* t) {
  constexpr int L = lanes<S>;
  for (int b = 0; b < n; b++, x += layer.F, i += L, t += L) {
    S xs[L] = {};
    vec<S> ts;
    typename Types<S>::ints is;
    if (count < L) memcpy(xs, x, count * sizeof(S));
    locate<S>(load<S>(count < L ? xs : x), layer, is, ts);
    *(typename Types<S>::ints32*)i = __builtin_convertvector(is, typename Types<S>::ints32);
    *(vec<S>*)t = ts;
  }
}

// Those intervals as where their rows begin, features having so many each.
template <class S> void to_offsets(int32_t* i, int n, int rows, int width) {
  typename Types<S>::ints32 first;
  for (int k = 0; k < lanes<S>; k++) first[k] = k * rows;
  for (int b = 0; b < n; b++, i += lanes<S>) {
    auto& row = *(typename Types<S>::ints32*)i;
    row = (row + first) * width;
  }
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool ROOMY = true;  // 32 registers, else 16
#else
constexpr bool ROOMY = false;
#endif

constexpr int AHEAD = 16;
inline int64_t sorted_size(int64_t n) { return round_up(n + AHEAD, AHEAD); }
inline int64_t intervals(int64_t N, int features) { return features == 2 ? (N - 1) * (N - 1) : N - 1; }

// Counting sort of n tokens into M intervals. A counter that goes up twice in a row waits for itself, so K parts of the
// tokens have counters of their own and take turns. interval is followed by room for K * M of them. where says a token's
// interval; asked in a loop of its own, GCC would make vectors of what lies far apart, by shuffles, which takes longer.
template <int K, class Where, class Place>
INLINE void sort_by(int32_t* interval, int n, int M, int32_t* start, Where where, Place place) {
  int32_t* count = interval + sorted_size(n);
  const int part = n / K;
  const auto for_all = [&](auto visit) {
    for (int b = 0; b < part; b++) UNROLL for (int k = 0; k < K; k++) visit(k * part + b, k);
    for (int b = K * part; b < n; b++) visit(b, K - 1);
  };
  std::fill(count, count + K * M, 0);
  for_all([&](int b, int k) { count[(interval[b] = where(b)) * K + k]++; });
  int before = 0;
  for (int j = 0; j < K * M; j++) {
    if (j % K == 0) start[j / K] = before;
    before += std::exchange(count[j], before);
  }
  start[M] = n;
  for_all([&](int b, int k) { place(b, count[interval[b] * K + k]++); });
}
inline int64_t interval_size(int64_t n, int64_t M) { return sorted_size(n) + std::max(n, M); }

// The tokens in order of where a feature sends them, or a pair of features: of the interval i of a single one, of
// i1 * (N - 1) + i2 of a pair. Interval k has tokens order[start[k]] to order[start[k + 1]]. Their positions, in that
// order too, are sorted_t (n, features). order is followed by 16 valid entries, for whoever looks ahead. i and t are
// locate_group's, from the feature in question on.
template <int features, class S>
void sort_features(const int32_t* i, const S* t, int n, int N, int32_t* order, int32_t* start, S* sorted_t,
                   int32_t* interval) {
  constexpr int L = lanes<S>;
  const int M = intervals(N, features);
  const auto where = [&](int b) { return features == 2 ? i[b * L] * (N - 1) + i[b * L + 1] : i[b * L]; };
#ifdef __AVX512F__
  if (M < 16) {  // few intervals: pick out the tokens of each, 16 at a time
    for (int b = 0; b < n; b++) interval[b] = where(b);
    int filled = 0;
    for (int i = 0; i < M; i++) {
      start[i] = filled;
      __m512i tokens = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (int b = 0; b < n; b += 16) {
        __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(interval + b), _mm512_set1_epi32(i));
        if (n - b < 16) here &= (1 << (n - b)) - 1;
        _mm512_storeu_si512(order + filled, _mm512_maskz_compress_epi32(here, tokens));
        filled += __builtin_popcount(here);
        tokens = _mm512_add_epi32(tokens, _mm512_set1_epi32(16));
      }
    }
    start[M] = filled;
    for (int q = 0; q < n; q++) memcpy(sorted_t + features * q, t + order[q] * L, features * sizeof(S));
  } else
#endif
  {
    const auto place = [&](int b, int q) {
      order[q] = b;
      memcpy(sorted_t + features * q, t + b * L, features * sizeof(S));
    };
    if (4 * M <= n) sort_by<4>(interval, n, M, start, where, place);
    else sort_by<1>(interval, n, M, start, where, place);
  }
  std::fill(order + n, order + n + AHEAD, 0);
}

}  // namespace splinegpt
