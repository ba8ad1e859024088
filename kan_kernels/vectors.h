// Vectors of GCC and Clang, 64 bytes wide with AVX-512, 32 with AVX2, else 16, and their exponentials; working memory;
// how many threads.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define KEEP(x) asm("" : "+v"(x))  // in a register: the compiler would rather load it once for every use
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define KEEP(x) asm("" : "+x"(x))
#else
#define VECTOR_BYTES 16
#define KEEP(x)
#endif

namespace splinegpt {

template <class S> struct Types;
template <> struct Types<float> {
  typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t ints32 __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Types<double> {
  typedef double vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t ints __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t ints32 __attribute__((vector_size(VECTOR_BYTES / 2)));
};
template <class S> using vec = typename Types<S>::vec;
template <class S> constexpr int lanes = VECTOR_BYTES / sizeof(S);

INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

template <class S> INLINE void store(S* p, vec<S> v) { *(typename Types<S>::unaligned*)p = v; }
template <class S> INLINE vec<S> broadcast(S s) { return s - vec<S>{}; }
template <class S, class T> INLINE vec<S> load(const T* p) {
  if constexpr (std::is_same_v<S, T>) {
    return *(const typename Types<S>::unaligned*)p;
  } else {  // a bfloat16 is the upper half of a float
    typedef uint16_t half __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
    typedef uint32_t whole __attribute__((vector_size(VECTOR_BYTES)));
    return (vec<S>)(__builtin_convertvector(*(const half*)p, whole) << 16);
  }
}

// Numbers as bfloat16, to the nearest, of two the even one; NaN stays NaN.
INLINE void store(c10::BFloat16* p, vec<float> v) {
  typedef uint16_t half __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t whole __attribute__((vector_size(VECTOR_BYTES)));
  const whole bits = (whole)v, upper = bits >> 16, rounded = (bits + 0x7fff + (upper & 1)) >> 16;
  *(half*)p = __builtin_convertvector(v == v ? rounded : upper | 64, half);
}

// All numbers of a vector as one: op of a half and the other, until one is left.
template <int half, class W, size_t... I> INLINE W swapped(W v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ half)...);
}
template <class W, int half = sizeof(W) / sizeof(float) / 2, class Op> INLINE float reduce(W v, Op op) {
  if constexpr (half == 0) return v[0];
  else return reduce<W, half / 2>(op(v, swapped<half>(v, std::make_index_sequence<sizeof(W) / sizeof(float)>())), op);
}
INLINE float sum_of(float x) { return x; }
template <class W> INLINE float sum_of(W v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
INLINE float largest_of(vec<float> v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// exp(x) for x <= 0, 0 below -87. NaN stays NaN.
INLINE vec<float> exp_of(vec<float> x) {
  using V = vec<float>;
  // Adding 1.5 * 2^23 rounds to a whole number n; with 127 more, the lowest bits are those of 2^n's exponent.
  const V lowest = broadcast(-87.0f), magic = broadcast(12582912.0f + 127);
  const V y = x < lowest ? lowest : x;
  const V shifted = y * 1.44269504f + magic, n = shifted - magic;
  const V r = y - n * 0.693145752f - n * 1.42860677e-6f;  // log 2 in two parts, of which the first times n is exact
  V p = broadcast(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  p *= (V)((Types<float>::ints)shifted << 23);  // 2^n
  return x < lowest ? V{} : p;
}

// Past the caches: what is written once and read much later should not push out what is in use. p must be aligned.
template <class S> INLINE void stream(S* p, vec<S> v) {
#ifdef __AVX512F__
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}

// Memory in huge pages, if the system has some to give: tokens are visited in any order, and a core knows the addresses
// of some seventy pages at a time.
inline char* allocate(size_t bytes) {
  constexpr size_t page = 1 << 21;
  const size_t alignment = bytes < page / 8 ? 4096 : page;
  bytes = round_up(bytes, alignment);
  char* p = (char*)aligned_alloc(alignment, bytes);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == page) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return p;
}

// Working memory, kept from call to call: to map fresh pages would take longer than the layer itself. What a call needs
// is found out by taking it; from the next call on it is one piece.
struct Arena {
  std::vector<std::pair<char*, size_t>> pieces;
  size_t used = 0;  // of the last piece
  ~Arena() { release(); }
  void release() {
    for (auto& piece : pieces) free(piece.first);
    pieces.clear();
    used = 0;
  }
  void clear() {
    used = 0;
    if (pieces.size() < 2) return;
    size_t size = 0;
    for (auto& piece : pieces) size += piece.second;
    release();
    pieces.emplace_back(allocate(size), size);
  }
  template <class T> T* take(size_t n) {  // aligned to 64 bytes; the odd line keeps buffers off each other's cache sets
    const size_t bytes = round_up(n * sizeof(T), 64) + 64;
    if (pieces.empty() || used + bytes > pieces.back().second) {
      pieces.emplace_back(allocate(bytes), bytes);
      used = 0;
    }
    used += bytes;
    return (T*)(pieces.back().first + used - bytes);
  }
};
inline thread_local Arena own;     // of one thread
inline thread_local Arena common;  // of the calling thread, for what all threads share

// work in multiply-adds; below some thousand a second thread costs more than it brings
inline int thread_count(double work) {
  return at::in_parallel_region() || work < 20000 ? 1 : at::get_num_threads();
}

}  // namespace splinegpt
