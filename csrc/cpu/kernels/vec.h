// Vectors of one instruction set, by the vector extensions of GCC and Clang, for x86-64 and aarch64 alike.
// Intrinsics only where the extensions compile badly.
//
// All functions are static: of an inline function with external linkage the linker could keep the copy that
// was compiled for AVX-512, and older processors would crash in it.
#pragma once
#include <stdint.h>

#include "../../lstm.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

// LSTMFUSED_ISA, from the compiler's command line: default, avx2 or avx512.
#define LSTMFUSED_PASTE(a, b) a##b
#define LSTMFUSED_NAME(prefix, isa) LSTMFUSED_PASTE(prefix, isa)
#define LSTMFUSED_VARIANT LSTMFUSED_NAME(isa_, LSTMFUSED_ISA)

// Of members and lambdas. Under sanitizers it is empty, which compiles sooner.
#ifndef LSTMFUSED_INLINED
#define LSTMFUSED_INLINED __attribute__((always_inline))
#endif
#define LSTMFUSED_INLINE static inline LSTMFUSED_INLINED

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float F __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double F __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class A>
using Vec = typename VectorOf<A>::F;
template <class A>
using IntVec = typename VectorOf<A>::Int;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
LSTMFUSED_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};  // x - 0 keeps the sign of zero, x + 0 does not
}

// GCC folds a load into every instruction that uses it: this makes it load v once.
template <class V>
LSTMFUSED_INLINE void pin_to_register([[maybe_unused]] V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// ---------------------------------------------------------------------------------------------------
// Memory: full vectors

LSTMFUSED_INLINE Vec<float> load(const float* p) { return *(const VectorOf<float>::Unaligned*)p; }
LSTMFUSED_INLINE Vec<double> load(const double* p) { return *(const VectorOf<double>::Unaligned*)p; }
LSTMFUSED_INLINE void store(float* p, Vec<float> v) { *(VectorOf<float>::Unaligned*)p = v; }
LSTMFUSED_INLINE void store(double* p, Vec<double> v) { *(VectorOf<double>::Unaligned*)p = v; }

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfBitsUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
// One permutation: a conversion and a shift would compete with multiply-adds for ports.
LSTMFUSED_INLINE Vec<float> load(const bfloat16* p) {
  const __m512i high_halves = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                               6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaa, high_halves, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)));
}
#else
LSTMFUSED_INLINE Vec<float> load(const bfloat16* p) {
  const HalfBits bits = *(const HalfBitsUnaligned*)p;
  return (Vec<float>)(__builtin_convertvector(bits, WordBits) << 16);
}
#endif

LSTMFUSED_INLINE void store(bfloat16* p, Vec<float> v) {
  const WordBits bits = (WordBits)v;
  const WordBits nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordBits rounded = v == v ? nearest_even : nearest_even * 0 + 0x7fc0u;  // NaN stays NaN
  *(HalfBitsUnaligned*)p = __builtin_convertvector(rounded, HalfBits);
}

typedef int8_t ByteInts __attribute__((vector_size(kVectorBytes / 4)));
typedef int8_t ByteIntsUnaligned __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));

LSTMFUSED_INLINE Vec<float> load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtepi32_ps(
      0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  const ByteInts bytes = *(const ByteIntsUnaligned*)p;
  return __builtin_convertvector(__builtin_convertvector(bytes, IntVec<float>), Vec<float>);
#endif
}

#if defined(__AVX512F__)
LSTMFUSED_INLINE Vec<float> load(const float16* p) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
LSTMFUSED_INLINE void store(float16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
LSTMFUSED_INLINE Vec<float> load(const float16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
LSTMFUSED_INLINE void store(float16* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
typedef __fp16 HalfVector __attribute__((vector_size(kVectorBytes / 2)));
LSTMFUSED_INLINE Vec<float> load(const float16* p) {
  const HalfBits bits = *(const HalfBitsUnaligned*)p;
  return __builtin_convertvector((HalfVector)bits, Vec<float>);
}
LSTMFUSED_INLINE void store(float16* p, Vec<float> v) {
  *(HalfBitsUnaligned*)p = (HalfBits) __builtin_convertvector(v, HalfVector);
}
#else
// No instruction converts: shift the fields into place and let one float operation do what depends on
// the value (subnormals, rounding), after F. Giesen, "float->half variants" (public domain).
LSTMFUSED_INLINE Vec<float> load(const float16* p) {
  const HalfBits half = *(const HalfBitsUnaligned*)p;
  const WordBits word = __builtin_convertvector(half, WordBits);
  const WordBits magnitude = (word & 0x7fffu) << 13;
  const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  const WordBits special = (WordBits)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;  // inf, NaN
  return (Vec<float>)((WordBits)scaled | special | ((word & 0x8000u) << 16));
}
LSTMFUSED_INLINE void store(float16* p, Vec<float> v) {
  const WordBits word = (WordBits)v, sign = (word >> 16) & 0x8000u, magnitude = word & 0x7fffffffu;
  const WordBits odd = (magnitude >> 13) & 1u;
  const WordBits normal = (magnitude + odd + (0xfffu - (112u << 23))) >> 13;
  const Vec<float> shifted = (Vec<float>)magnitude + 0.5f;  // aligns a subnormal's bits at the bottom
  const WordBits subnormal = (WordBits)shifted - 0x3f000000u;
  WordBits half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? half * 0 + 0x7c00u : half;
  half = magnitude > (255u << 23) ? half * 0 + 0x7e00u : half;
  *(HalfBitsUnaligned*)p = __builtin_convertvector(half | sign, HalfBits);
}
#endif

// Non-temporal stores of whole, aligned vectors; a fence before another thread reads them.
template <class T, class V>
LSTMFUSED_INLINE void store_nontemporal(T* p, V v) {
  store(p, v);
}
LSTMFUSED_INLINE void nontemporal_fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}
#if defined(__AVX512F__)
LSTMFUSED_INLINE void store_nontemporal(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
LSTMFUSED_INLINE void store_nontemporal(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
#elif defined(__AVX2__)
LSTMFUSED_INLINE void store_nontemporal(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
LSTMFUSED_INLINE void store_nontemporal(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
#endif

// ---------------------------------------------------------------------------------------------------
// Memory: the first n lanes; the others load as zero and are not stored

template <class T>
LSTMFUSED_INLINE Vec<Accumulate<T>> load_first(const T* p, int64_t n) {
  constexpr int N = kLanes<Accumulate<T>>;
  T lanes[N];
  for (int i = 0; i < N; i++) lanes[i] = i < n ? p[i] : T{};
  return load(lanes);
}

template <class T>
LSTMFUSED_INLINE void store_first(T* p, Vec<Accumulate<T>> v, int64_t n) {
  T lanes[kLanes<Accumulate<T>>];
  store(lanes, v);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}

#if defined(__AVX512F__)
LSTMFUSED_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
LSTMFUSED_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
LSTMFUSED_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
LSTMFUSED_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#elif defined(__AVX2__)
LSTMFUSED_INLINE __m256i first_lanes32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LSTMFUSED_INLINE __m256i first_lanes64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
LSTMFUSED_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, first_lanes32(n));
}
LSTMFUSED_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_lanes64(n));
}
LSTMFUSED_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes32(n), (__m256)v);
}
LSTMFUSED_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(p, first_lanes64(n), (__m256d)v);
}
#endif

template <class T>
LSTMFUSED_INLINE Vec<Accumulate<T>> load_upto(const T* p, int64_t n) {
  return n >= kLanes<Accumulate<T>> ? load(p) : load_first(p, n);
}
template <class T>
LSTMFUSED_INLINE void store_upto(T* p, Vec<Accumulate<T>> v, int64_t n) {
  n >= kLanes<Accumulate<T>> ? store(p, v) : store_first(p, v, n);
}

// load_upto and store_upto at p[at] of a cell state or its gradient: of type T or, if wide, Accumulate<T>.
template <class T, class A = Accumulate<T>>
LSTMFUSED_INLINE Vec<A> load_cell(const T* p, int64_t at, int64_t n, [[maybe_unused]] bool wide) {
  if constexpr (sizeof(T) < sizeof(A))
    if (wide) return load_upto(reinterpret_cast<const A*>(p) + at, n);
  return load_upto(p + at, n);
}
template <class T, class A = Accumulate<T>>
LSTMFUSED_INLINE void store_cell(T* p, int64_t at, Vec<A> v, int64_t n, [[maybe_unused]] bool wide) {
  if constexpr (sizeof(T) < sizeof(A))
    if (wide) return store_upto(reinterpret_cast<A*>(p) + at, v, n);
  store_upto(p + at, v, n);
}

// ---------------------------------------------------------------------------------------------------
// Factors: what a lane of a product multiplies. A number in the type of the sums or, where bfloat16 has dot
// products, two numbers that follow each other.

template <class T>
struct FactorType {
  using type = Accumulate<T>;
  static constexpr int span = 1;
};
template <class T>
using Factor = typename FactorType<T>::type;
template <class T>
constexpr int kSpan = FactorType<T>::span;  // numbers in a factor
template <class T>
constexpr int64_t factors(int64_t numbers) {
  return (numbers + kSpan<T> - 1) / kSpan<T>;
}

// As many of the n numbers at p as a vector of factors holds; those beyond are zero.
template <class T>
LSTMFUSED_INLINE auto load_factors(const T* p, int64_t n) {
  return load_upto(p, n);
}
template <class T>
LSTMFUSED_INLINE auto load_factors(const T* p) {
  return load(p);
}
template <class V>
LSTMFUSED_INLINE void multiply_add(V& sum, V a, V b) {
  sum += a * b;
}

#if defined(__AVX512BF16__)
struct bfloat16x2 {
  uint32_t bits;
};
template <>
struct VectorOf<bfloat16x2> {
  typedef uint32_t F __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
};
template <>
struct FactorType<bfloat16> {
  using type = bfloat16x2;
  static constexpr int span = 2;
};
LSTMFUSED_INLINE Vec<bfloat16x2> load(const bfloat16x2* p) {
  return *(const VectorOf<bfloat16x2>::Unaligned*)p;
}
LSTMFUSED_INLINE Vec<bfloat16x2> load_upto(const bfloat16x2* p, int64_t n) {
  return n >= 16 ? load(p) : (Vec<bfloat16x2>)_mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p);
}
LSTMFUSED_INLINE void store(bfloat16x2* p, Vec<bfloat16x2> v) { *(VectorOf<bfloat16x2>::Unaligned*)p = v; }
LSTMFUSED_INLINE Vec<bfloat16x2> load_factors(const bfloat16* p) {
  return *(const VectorOf<bfloat16x2>::Unaligned*)p;
}
LSTMFUSED_INLINE Vec<bfloat16x2> load_factors(const bfloat16* p, int64_t n) {
  return n >= 32 ? load_factors(p)
                 : (Vec<bfloat16x2>)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
}
LSTMFUSED_INLINE Vec<bfloat16x2> broadcast(bfloat16x2 x) {
  return (Vec<bfloat16x2>)_mm512_set1_epi32(int(x.bits));
}
LSTMFUSED_INLINE void multiply_add(Vec<float>& sum, Vec<bfloat16x2> a, Vec<bfloat16x2> b) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Pairs of 32 numbers that follow each other, rounded.
LSTMFUSED_INLINE Vec<bfloat16x2> pairs(Vec<float> first, Vec<float> second) {
  return (Vec<bfloat16x2>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// Pairs of one number from each, rounded.
LSTMFUSED_INLINE Vec<bfloat16x2> zip(Vec<float> first, Vec<float> second) {
  const auto round = [](Vec<float> v) {
    return __builtin_convertvector((HalfBits)_mm512_cvtneps_pbh((__m512)v), WordBits);
  };
  return round(first) | round(second) << 16;
}
// Of numbers that are bfloat16 already.
LSTMFUSED_INLINE Vec<bfloat16x2> zip_exact(Vec<float> first, Vec<float> second) {
  return (WordBits)first >> 16 | (WordBits)second;
}
#endif

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
