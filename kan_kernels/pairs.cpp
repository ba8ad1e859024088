/*
Surfaces over pairs of inputs on a CPU: forward and backward as look-ups, sorted as spline.cpp sorts its pairs.

    u = (x + width / 2) * (N - 1) / width         i = clamp(trunc(u), 0, N - 2), u - i: of every input
    y[o] = sum_p C00 + s (C10 - C00) + t (C01 - C00) + s t (C11 - C10 - C01 + C00)

where the first input of pair p is in interval i at position s, the second in j at t, and Cab = C[p, i + a, j + b, o].
That is four rows for two inputs, as many as two curves have. Tokens are sorted by cell, (i, j), and what a cell's tokens
share stays in registers while they pass: forward its four coefficients, so that a look-up is three multiply-adds and an
addition to the token's sums; backward, for the surface, the four sums

    S = sum g    Ss = sum s g    St = sum t g    Sst = sum s t g        dC11 += Sst    dC10 += Ss - Sst    ...

dx needs <g, Cab> of all four, token by token, in the tokens' own order, for as many pairs at a time as fill a vector.
A handful of tokens is not sorted (direct_forward). Threads share out the tokens of the forward and the pairs of the
backward: no atomics, and the result does not depend on their number, but for a handful of tokens. Saved is x alone.

Legend
    B tokens, F features, P = F / 2 pairs, N control points an axis, O outputs: a multiple of L, the operators pad it
    x, dx (B, F)    C, dC (P, N, N, O)    y, g (B, O)        L numbers in a vector, V vectors in a tile of outputs
*/
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "look_up.h"

namespace {

using namespace splinegpt;

constexpr int V_most = ROOMY ? 4 : 2;  // four registers a vector
template <class S> constexpr int pairs_at_once = std::max(1, lanes<S> / 4);  // two tokens' gradients make a vector

// Where in its cell a token is, and the product. Loaded as vectors: the compiler would rather multiply two numbers and
// then make vectors of three, for a sixth of the loops' time (Zen 3).
template <class S> INLINE std::tuple<vec<S>, vec<S>, vec<S>> position(const S* st) {
  vec<S> s = broadcast<S>(st[0]), t = broadcast<S>(st[1]);
  KEEP(s);
  KEEP(t);
  return {s, t, s * t};
}

// Calls run(o0, V) for all tiles from o0 on, V as a compile-time constant: the widest, then halves of it.
template <class S, int V = V_most, class Run> INLINE void for_tiles(int64_t O, Run run, int64_t o0 = 0) {
  for (; o0 + V * lanes<S> <= O; o0 += V * lanes<S>) run(o0, std::integral_constant<int, V>());
  if constexpr (V > 1) for_tiles<S, V / 2>(O, run, o0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// One pair, one tile, n tokens as sort_features leaves them: y (n, W) += their surfaces. c is the tile's part of the
// pair's first row, O the distance between rows.
template <class S, int V>
void forward_tile(int N, const S* c, int64_t O, const int32_t* order, const int32_t* start, const S* st, S* y) {
  constexpr int L = lanes<S>, W = V * L;
  for (int i = 0; i < N - 1; i++, c += O)
    for (int j = 0; j < N - 1; j++, c += O, start++) {
      if (start[0] == start[1]) continue;
      vec<S> at[V], along_s[V], along_t[V], across[V];
      UNROLL for (int v = 0; v < V; v++) {
        const S* corner = c + v * L;
        at[v] = load<S>(corner);
        along_s[v] = load<S>(corner + N * O) - at[v];
        along_t[v] = load<S>(corner + O) - at[v];
        across[v] = load<S>(corner + N * O + O) - load<S>(corner + N * O) - along_t[v];
      }
      for (int q = start[0]; q < start[1]; q++) {
        const auto [s, t, both] = position<S>(st + 2 * q);
        S* to = y + (int64_t)order[q] * W;
        UNROLL for (int v = 0; v < V; v++) {
          vec<S> sum = *(vec<S>*)(to + v * L) + at[v];
          sum += s * along_s[v];
          sum += t * along_t[v];
          sum += both * across[v];
          *(vec<S>*)(to + v * L) = sum;
        }
      }
    }
}

// Pairs [p0, p1) of all tokens, added up in sum (B, O).
template <class S>
void direct_forward(const Layer<S>& layer, const S* table, const S* x, int64_t p0, int64_t p1, S* sum) {
  constexpr int L = lanes<S>;
  const int64_t N = layer.N, O = layer.O;
  std::fill(sum, sum + layer.B * O, S(0));
  for (int64_t p = p0; p < p1; p++)
    for (int64_t b = 0; b < layer.B; b++) {
      alignas(VECTOR_BYTES) S position[L];
      alignas(VECTOR_BYTES) int32_t i[L];
      locate_group(x + b * layer.F + 2 * p, layer, 2, 1, i, position);
      const S* c = table + ((p * N + i[0]) * N + i[1]) * O;
      const S s = position[0], t = position[1];
      const vec<S> w00 = broadcast<S>((1 - s) * (1 - t)), w01 = broadcast<S>((1 - s) * t),
                   w10 = broadcast<S>(s * (1 - t)), w11 = broadcast<S>(s * t);
      S* y = sum + b * O;
      for (int64_t o = 0; o < O; o += L, c += L) {
        vec<S> acc = load<S>(y + o) + w00 * load<S>(c);
        acc += w01 * load<S>(c + O);
        acc += w10 * load<S>(c + N * O);
        acc += w11 * load<S>(c + N * O + O);
        store<S>(y + o, acc);
      }
    }
}

template <class S> void forward(const Layer<S>& layer, const S* x, const S* table, S* y) {
  constexpr int L = lanes<S>;
  const int64_t B = layer.B, F = layer.F, P = F / 2, O = layer.O, N = layer.N;
  const int threads = thread_count(2.0 * B * F * O);

  if (B <= 2 * N * N) {
    common.clear();
    S* share = common.take<S>(threads * B * O);
#pragma omp parallel num_threads(threads)
    {
      // As many as there are: OpenMP may give fewer than were asked for.
      const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      direct_forward<S>(layer, table, x, P * me / team, P * (me + 1) / team, share + me * B * O);
#pragma omp barrier
      for (int64_t z = B * O * me / team; z < B * O * (me + 1) / team; z++) {
        S sum = share[z];
        for (int k = 1; k < team; k++) sum += share[k * B * O + z];
        y[z] = sum;
      }
    }
    return;
  }

#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = B * me / team, end = B * (me + 1) / team;
    const int64_t limit = tokens_in_cache<S>(V_most * L, 2, 0);
    const int64_t blocks = (end - begin + limit - 1) / limit, n_max = (end - begin + blocks - 1) / blocks;
    const int64_t m = sorted_size(n_max), M = intervals(N, 2);
    own.clear();
    int32_t *order = own.take<int32_t>(P * m), *start = own.take<int32_t>(P * (M + 1)), *i = own.take<int32_t>(L * m);
    int32_t* interval = own.take<int32_t>(interval_size(n_max, M));
    S *st = own.take<S>(2 * P * m), *t = own.take<S>(L * m), *y_tile = own.take<S>(n_max * V_most * L);
    for (int64_t first = begin; first < end; first += n_max) {
      const int64_t n = std::min(n_max, end - first);
      for (int64_t f = 0; f < F; f += L) {
        const int64_t count = std::min<int64_t>(L, F - f);
        locate_group(x + first * F + f, layer, count, n, i, t);
        for (int64_t r = 0, p = f / 2; r < count; r += 2, p++)
          sort_features<2, S>(i + r, t + r, n, N, order + p * m, start + p * (M + 1), st + 2 * p * m, interval);
      }
      for_tiles<S>(O, [&](int64_t o0, auto v) {
        constexpr int V = decltype(v)::value, W = V * L;
        std::fill(y_tile, y_tile + n * W, S(0));
        for (int64_t p = 0; p < P; p++)
          forward_tile<S, V>(N, table + p * N * N * O + o0, O, order + p * m, start + p * (M + 1), st + 2 * p * m,
                             y_tile);
        for (int64_t b = 0; b < n; b++) memcpy(y + (first + b) * O + o0, y_tile + b * W, W * sizeof(S));
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// dC of one pair, one tile, n tokens of g (n, W), added to what is there. d is the tile's part of its first row.
template <class S, int V>
void backward_tile(int N, S* d, int64_t O, const int32_t* order, const int32_t* start, const S* st, const S* g) {
  constexpr int L = lanes<S>, W = V * L;
  for (int i = 0; i < N - 1; i++, d += O)
    for (int j = 0; j < N - 1; j++, d += O, start++) {
      if (start[0] == start[1]) continue;
      vec<S> sum[V] = {}, by_s[V] = {}, by_t[V] = {}, by_both[V] = {};
      for (int q = start[0]; q < start[1]; q++) {
        const auto [s, t, both] = position<S>(st + 2 * q);
        const S* from = g + (int64_t)order[q] * W;
        UNROLL for (int v = 0; v < V; v++) {
          vec<S> gs = *(const vec<S>*)(from + v * L);
          KEEP(gs);
          sum[v] += gs;
          by_s[v] += s * gs;
          by_t[v] += t * gs;
          by_both[v] += both * gs;
        }
      }
      UNROLL for (int v = 0; v < V; v++) {
        S* corner = d + v * L;
        const auto add = [&](S* p, vec<S> value) { store<S>(p, load<S>(p) + value); };
        add(corner, sum[v] - by_s[v] - by_t[v] + by_both[v]);
        add(corner + O, by_t[v] - by_both[v]);
        add(corner + N * O, by_s[v] - by_both[v]);
        add(corner + N * O + O, by_both[v]);
      }
    }
}

// Of one token and `count` pairs, at most G: dx / inv of their inputs, each a vector whose numbers are yet to be summed.
// i and t are locate_group's, c the first pair's first row.
template <class S>
INLINE void parts_of_dx(int64_t N, int64_t O, int count, const int32_t* i, const S* t, const S* c, const S* g,
                        vec<S>* parts) {
  constexpr int L = lanes<S>, G = pairs_at_once<S>;
  const S *low[G], *high[G];  // rows i and i + 1 of the first input; the second's next is O further on
  for (int p = 0; p < G; p++) {
    const int k = p < count ? p : 0;  // the others' are not used
    low[p] = c + ((k * N + i[2 * k]) * N + i[2 * k + 1]) * O;
    high[p] = low[p] + N * O;
  }
  vec<S> along[4 * G] = {};
  _Pragma("GCC unroll 2") for (int64_t o = 0, next = O; o < O; o += L, next += L) {
    vec<S> gs = load<S>(g + o);
    KEEP(gs);
    UNROLL for (int p = 0; p < G; p++) {
      along[4 * p] += gs * load<S>(low[p] + o);
      along[4 * p + 1] += gs * load<S>(low[p] + next);
      along[4 * p + 2] += gs * load<S>(high[p] + o);
      along[4 * p + 3] += gs * load<S>(high[p] + next);
    }
  }
  UNROLL for (int p = 0; p < G; p++) {
    const vec<S> by_s = along[4 * p + 2] - along[4 * p], by_t = along[4 * p + 1] - along[4 * p],
                 both = along[4 * p + 3] - along[4 * p + 1] - by_s;
    parts[2 * p] = by_s + broadcast<S>(t[2 * p + 1]) * both;
    parts[2 * p + 1] = by_t + broadcast<S>(t[2 * p]) * both;
  }
}

// dx of those pairs and n tokens, two at a time. dx is the first token's first input of the pairs.
template <class S>
void gradient_of_x(const Layer<S>& layer, int n, int count, const int32_t* i, const S* t, const S* c, const S* g,
                   S* dx) {
  constexpr int L = lanes<S>, G = pairs_at_once<S>;
  const int64_t N = layer.N, O = layer.O;
  for (int b = 0; b < n; b += 2, i += 2 * L, t += 2 * L, g += 2 * O) {
    vec<S> parts[4 * G] = {};
    parts_of_dx<S>(N, O, count, i, t, c, g, parts);
    if (b + 1 < n) parts_of_dx<S>(N, O, count, i + L, t + L, c, g + O, parts + 2 * G);
    alignas(VECTOR_BYTES) S d[4 * G];
    UNROLL for (int k = 0; k < 4 * G; k += L) *(vec<S>*)(d + k) = sums<S>(parts + k) * layer.inv;
    for (int k = 0; k < std::min(2, n - b); k++, dx += layer.F) {
      if (count == G) memcpy(dx, d + 2 * G * k, 2 * G * sizeof(S));  // a size known here: no call
      else memcpy(dx, d + 2 * G * k, 2 * count * sizeof(S));
    }
  }
}

template <class S>
void backward(const Layer<S>& layer, const S* g, const S* x, const S* table, S* dx, S* dtable) {
  constexpr int L = lanes<S>, G = pairs_at_once<S>;
  const int64_t B = layer.B, F = layer.F, O = layer.O, N = layer.N, surface = N * N * O;
  const int threads = thread_count(3.0 * B * F * O);
  const int64_t limit = tokens_in_cache<S>(V_most * L, 5, 8 * N * N);
  const int64_t blocks = (B + limit - 1) / limit, n_max = (B + blocks - 1) / blocks;
  // Tokens whose g, from one group of pairs to the next, stays in the second-level cache.
  const int64_t few = std::max<int64_t>(32, second_level_cache() / 2 / (O * sizeof(S)));
  const int64_t FB = F < 4 * threads * L ? 2 * G : std::max(2, L);  // features at a time
  common.clear();
  S* packed = common.take<S>(n_max * O);

#pragma omp parallel num_threads(threads)
  {
    const int64_t m = sorted_size(n_max), M = intervals(N, 2) + 1;
    own.clear();
    int32_t *order = own.take<int32_t>(FB / 2 * m), *start = own.take<int32_t>(FB / 2 * M);
    int32_t *i = own.take<int32_t>(L * m), *interval = own.take<int32_t>(interval_size(n_max, M));
    S *st = own.take<S>(FB * m), *t = own.take<S>(L * m);
    for (int64_t b0 = 0; b0 < B; b0 += n_max) {
      const int64_t n = std::min(n_max, B - b0);
#pragma omp for schedule(static)
      for (int64_t b = 0; b < n; b++)  // tile by tile
        for_tiles<S>(O, [&](int64_t o0, auto v) {
          constexpr int W = decltype(v)::value * L;
          memcpy(packed + o0 * n + b * W, g + (b0 + b) * O + o0, W * sizeof(S));
        });
#pragma omp for schedule(dynamic)
      for (int64_t f0 = 0; f0 < F; f0 += FB) {
        const int64_t fn = std::min(FB, F - f0), p0 = f0 / 2;
        S* d = dtable + p0 * surface;
        locate_group(x + b0 * F + f0, layer, std::min<int64_t>(L, F - f0), n, i, t);
        for (int64_t b = 0; b < n; b += few)
          for (int64_t f = 0; f < fn; f += 2 * G)
            gradient_of_x<S>(layer, std::min(few, n - b), std::min<int64_t>(G, (fn - f) / 2), i + b * L + f,
                             t + b * L + f, table + (p0 + f / 2) * surface, g + (b0 + b) * O,
                             dx + (b0 + b) * F + f0 + f);
        for (int64_t f = 0, p = 0; f < fn; f += 2, p++)
          sort_features<2, S>(i + f, t + f, n, N, order + p * m, start + p * M, st + 2 * p * m, interval);
        if (b0 == 0) std::fill(d, d + fn / 2 * surface, S(0));
        for_tiles<S>(O, [&](int64_t o0, auto v) {
          for (int64_t p = 0; p < fn / 2; p++)
            backward_tile<S, decltype(v)::value>(N, d + p * surface + o0, O, order + p * m, start + p * M,
                                                 st + 2 * p * m, packed + o0 * n);
        });
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators

// run(layer, a zero of x's type): with outputs padded to whole vectors, which the tensors given must have.
template <class Run> void with_layer(const Tensor& x, const Tensor& table, double width, Run run) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == table.scalar_type() && (type == at::kFloat || type == at::kDouble),
              "pairs: x and table must be both float32 or both float64, got ", type, " and ", table.scalar_type());
  const auto call = [&](auto zero) {
    using S = decltype(zero);
    const int N = table.size(1);
    run(Layer<S>{x.size(0), x.size(1), (int64_t)round_up(table.size(3), lanes<S>), N, S(width / 2), S((N - 1) / width)},
        zero);
  };
  type == at::kFloat ? call(float()) : call(double());
}

void check(const Tensor& x, const Tensor& table) {
  TORCH_CHECK(x.dim() == 2 && table.dim() == 4 && x.size(1) == 2 * table.size(0) && table.size(1) == table.size(2) &&
                  table.size(1) >= 2 && table.size(0) && table.size(3),
              "pairs: x must be (B, 2 P) and the table (P, N, N, O) with N >= 2, P and O >= 1, got ", x.sizes(), " and ",
              table.sizes());
}

Tensor padded(const Tensor& a, int64_t size) {
  return a.size(-1) == size ? a.contiguous() : at::constant_pad_nd(a, {0, size - a.size(-1)});
}

Tensor pairs(const Tensor& x_, const Tensor& table, double width) {
  check(x_, table);
  const Tensor x = x_.contiguous();
  Tensor y;
  with_layer(x, table, width, [&](const auto& layer, auto zero) {
    using S = decltype(zero);
    const Tensor c = padded(table, layer.O);
    y = at::empty({layer.B, layer.O}, x.options());
    if (layer.B) forward<S>(layer, x.const_data_ptr<S>(), c.const_data_ptr<S>(), y.data_ptr<S>());
  });
  return y.narrow(1, 0, table.size(3)).contiguous();
}

std::tuple<Tensor, Tensor> pairs_backward(const Tensor& g_, const Tensor& x_, const Tensor& table, double width) {
  check(x_, table);
  const Tensor x = x_.contiguous();
  TORCH_CHECK(g_.dim() == 2 && g_.size(0) == x.size(0) && g_.size(1) == table.size(3) &&
                  g_.scalar_type() == x.scalar_type(),
              "pairs_backward: g must be (", x.size(0), ", ", table.size(3), ") and of the type of x, got ", g_.sizes());
  Tensor dx = at::empty(x.sizes(), x.options()), dtable;
  with_layer(x, table, width, [&](const auto& layer, auto zero) {
    using S = decltype(zero);
    const Tensor c = padded(table, layer.O), g = padded(g_, layer.O);
    dtable = pooled(c.sizes(), x.options());
    if (!layer.B) dtable.zero_();
    else
      backward<S>(layer, g.const_data_ptr<S>(), x.const_data_ptr<S>(), c.const_data_ptr<S>(), dx.data_ptr<S>(),
                  dtable.data_ptr<S>());
  });
  return {dx, dtable.narrow(3, 0, table.size(3)).contiguous()};
}

TORCH_LIBRARY_FRAGMENT(splinegpt_cpu, m) {
  m.def("pairs(Tensor x, Tensor table, float width) -> Tensor");
  m.def("pairs_backward(Tensor g, Tensor x, Tensor table, float width) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(splinegpt_cpu, CPU, m) {
  m.impl("pairs", &pairs);
  m.impl("pairs_backward", &pairs_backward);
}

}  // namespace
