// Vectors of one instruction set, by compiler vector extensions, which GCC and Clang compile for x86-64
// and aarch64 alike. Only what the extensions cannot say well is an intrinsic.
//
// All functions are static: an inline function with external linkage, compiled here with AVX-512, could
// be the copy that the linker keeps for everybody.
#pragma once
#include <stdint.h>

#include "../lstm.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

// LSTMFUSED_ISA, from the compiler's command line: default, avx2 or avx512.
#define LSTMFUSED_PASTE(a, b) a##b
#define LSTMFUSED_NAME(prefix, isa) LSTMFUSED_PASTE(prefix, isa)
#define LSTMFUSED_VARIANT LSTMFUSED_NAME(isa_, LSTMFUSED_ISA)

#define LSTMFUSED_INLINED __attribute__((always_inline))  // of members and lambdas
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

// Has v in a register: GCC would load again, at each use, what it can load as part of an instruction.
template <class V>
LSTMFUSED_INLINE void keep([[maybe_unused]] V& v) {
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
// One instruction, where a conversion and a shift compete with multiplications.
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

// store() past the caches, to whole lines, each written at once; stream_end() before anybody reads them.
template <class T, class V>
LSTMFUSED_INLINE void stream(T* p, V v) {
  store(p, v);
}
LSTMFUSED_INLINE void stream_end() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}
#if defined(__AVX512F__)
LSTMFUSED_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
LSTMFUSED_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
#elif defined(__AVX2__)
LSTMFUSED_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
LSTMFUSED_INLINE void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
#endif

// ---------------------------------------------------------------------------------------------------
// Memory: the first n lanes; the others load as zero and are not stored

template <class T>
LSTMFUSED_INLINE Vec<Accumulate<T>> load_some(const T* p, int64_t n) {
  constexpr int N = kLanes<Accumulate<T>>;
  T lanes[N];
  for (int i = 0; i < N; i++) lanes[i] = i < n ? p[i] : T{};
  return load(lanes);
}

template <class T>
LSTMFUSED_INLINE void store_some(T* p, Vec<Accumulate<T>> v, int64_t n) {
  T lanes[kLanes<Accumulate<T>>];
  store(lanes, v);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}

#if defined(__AVX512F__)
LSTMFUSED_INLINE Vec<float> load_some(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
LSTMFUSED_INLINE Vec<double> load_some(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
LSTMFUSED_INLINE void store_some(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
LSTMFUSED_INLINE void store_some(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#elif defined(__AVX2__)
LSTMFUSED_INLINE __m256i first_lanes32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LSTMFUSED_INLINE __m256i first_lanes64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
LSTMFUSED_INLINE Vec<float> load_some(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, first_lanes32(n));
}
LSTMFUSED_INLINE Vec<double> load_some(const double* p, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_lanes64(n));
}
LSTMFUSED_INLINE void store_some(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes32(n), (__m256)v);
}
LSTMFUSED_INLINE void store_some(double* p, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(p, first_lanes64(n), (__m256d)v);
}
#endif

template <class T>
LSTMFUSED_INLINE Vec<Accumulate<T>> load_upto(const T* p, int64_t n) {
  return n >= kLanes<Accumulate<T>> ? load(p) : load_some(p, n);
}
template <class T>
LSTMFUSED_INLINE void store_upto(T* p, Vec<Accumulate<T>> v, int64_t n) {
  n >= kLanes<Accumulate<T>> ? store(p, v) : store_some(p, v, n);
}

// The same at p[at] of a cell state or its gradient, which is of type T or, if wide, of Accumulate<T>.
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

// ---------------------------------------------------------------------------------------------------
// Transposition: log2(lanes) rounds; the round of size S exchanges bit S of the lane with bit S of the
// vector's index.

#if defined(__clang__)
#define LSTMFUSED_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LSTMFUSED_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using type = Lanes<I...>;
};

// Lanes of a with bit S clear; their partners from b fill the lanes with bit S set.
template <class A, int S, int... I>
LSTMFUSED_INLINE Vec<A> merge_low(Vec<A> a, Vec<A> b, Lanes<I...>) {
  using Int [[maybe_unused]] = IntVec<A>;
  return LSTMFUSED_SHUFFLE(a, b, (I & S ? int(sizeof...(I)) + I - S : I)...);
}
template <class A, int S, int... I>
LSTMFUSED_INLINE Vec<A> merge_high(Vec<A> a, Vec<A> b, Lanes<I...>) {
  using Int [[maybe_unused]] = IntVec<A>;
  return LSTMFUSED_SHUFFLE(a, b, (I & S ? int(sizeof...(I)) + I : I + S)...);
}

// v is (N, N) for N lanes, transposed in registers.
template <class A, int S = 1>
LSTMFUSED_INLINE void transpose(Vec<A>* v) {
  constexpr int N = kLanes<A>;
  if constexpr (S < N) {
    const typename CountLanes<N>::type lanes{};
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) {
      if (i & S) continue;
      const Vec<A> low = merge_low<A, S>(v[i], v[i + S], lanes);
      v[i + S] = merge_high<A, S>(v[i], v[i + S], lanes);
      v[i] = low;
    }
    transpose<A, 2 * S>(v);
  }
}

// Lanes of a with bit S clear and of b with bit S set, in their places and in those of their partners.
template <class A, int S, int... I>
LSTMFUSED_INLINE Vec<A> blend(Vec<A> a, Vec<A> b, Lanes<I...>) {
  using Int [[maybe_unused]] = IntVec<A>;
  return LSTMFUSED_SHUFFLE(a, b, (I & S ? int(sizeof...(I)) + I : I)...);
}
template <class A, int S, int... I>
LSTMFUSED_INLINE Vec<A> blend_partners(Vec<A> a, Vec<A> b, Lanes<I...>) {
  using Int [[maybe_unused]] = IntVec<A>;
  return LSTMFUSED_SHUFFLE(a, b, (I & S ? int(sizeof...(I)) + I - S : I + S)...);
}

// Lane i of the result is the sum of the lanes of v[i], i < N.
template <class A, int S = 1>
LSTMFUSED_INLINE Vec<A> sum_each(Vec<A>* v) {
  constexpr int N = kLanes<A>;
  if constexpr (S < N) {
    const typename CountLanes<N>::type lanes{};
#pragma GCC unroll 16
    for (int i = 0; i < N; i += 2 * S)
      v[i] = blend<A, S>(v[i], v[i + S], lanes) + blend_partners<A, S>(v[i], v[i + S], lanes);
    return sum_each<A, 2 * S>(v);
  } else {
    return v[0];
  }
}

// Every second lane of a and b together, from lane Odd on.
template <class A, int Odd, int... I>
LSTMFUSED_INLINE Vec<A> every_second(Vec<A> a, Vec<A> b, Lanes<I...>) {
  using Int [[maybe_unused]] = IntVec<A>;
  return LSTMFUSED_SHUFFLE(a, b, (2 * I + Odd)...);
}

// v holds (lanes, 4) row-major; v[i] becomes column i.
template <class A>
LSTMFUSED_INLINE void deinterleave(Vec<A>* v) {
  const typename CountLanes<kLanes<A>>::type lanes{};
  const Vec<A> even[] = {every_second<A, 0>(v[0], v[1], lanes), every_second<A, 0>(v[2], v[3], lanes)};
  const Vec<A> odd[] = {every_second<A, 1>(v[0], v[1], lanes), every_second<A, 1>(v[2], v[3], lanes)};
  v[0] = every_second<A, 0>(even[0], even[1], lanes);
  v[1] = every_second<A, 0>(odd[0], odd[1], lanes);
  v[2] = every_second<A, 1>(even[0], even[1], lanes);
  v[3] = every_second<A, 1>(odd[0], odd[1], lanes);
}

// ---------------------------------------------------------------------------------------------------
// exp2, sigmoid, tanh: t = n + r with n whole and |r| <= 1/2; 2^r - 1 by a polynomial.

// min and max in which NaN stays NaN: of two operands, x86 returns the second if either is NaN.
template <class A>
LSTMFUSED_INLINE Vec<A> at_most(Vec<A> x, A limit) {
  return x > limit ? broadcast(limit) : x;
}
template <class A>
LSTMFUSED_INLINE Vec<A> at_least(Vec<A> x, A limit) {
  return x < limit ? broadcast(limit) : x;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
LSTMFUSED_INLINE Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x);
}
LSTMFUSED_INLINE Vec<float> at_least(Vec<float> x, float limit) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)x);
}
#endif

template <class A>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {  // minimax of (2^r - 1) / r: 1.3e-8 relative at most
  static constexpr float round = 0x1.8p23f, limit = 150, tanh_limit = 60;
  static constexpr float coefficients[] = {0x1.4296bap-13f, 0x1.5ef12ap-10f, 0x1.3b2c3ep-7f,
                                           0x1.c6afa4p-5f,  0x1.ebfbdep-3f,  0x1.62e430p-1f};
  static constexpr int mantissa_bits = 23, bias = 127;
};
template <>
struct Exp2Constants<double> {  // Taylor, log(2)^k / k!: the first term left out is below 5e-18
  static constexpr double round = 0x1.8p52, limit = 1080, tanh_limit = 120;
  static constexpr double coefficients[] = {
      0x1.816193166d0f9p-40, 0x1.c3bd650fc2986p-36, 0x1.e8cac7351bb25p-32, 0x1.e4cf5158b8ecap-28,
      0x1.b5253d395e7c4p-24, 0x1.62c0223a5c824p-20, 0x1.ffcbfc588b0c7p-17, 0x1.430912f86c787p-13,
      0x1.5d87fe78a6731p-10, 0x1.3b2ab6fba4e77p-7,  0x1.c6b08d704a0c0p-5,  0x1.ebfbdff82c58fp-3,
      0x1.62e42fefa39efp-1};
  static constexpr int mantissa_bits = 52, bias = 1023;
};

template <class A>
struct VectorMath {
  using F = Vec<A>;
  using Int = IntVec<A>;
  using K = Exp2Constants<A>;

#if defined(__AVX512F__)
  // Its instructions take any t, infinity too, of which the fraction is 0.
  LSTMFUSED_INLINE F limited(F t, A) { return t; }
  LSTMFUSED_INLINE F fraction(F t) {
    if constexpr (sizeof(A) == 4)
      return (F)_mm512_maskz_reduce_ps(0xffff, (__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    else
      return (F)_mm512_maskz_reduce_pd(0xff, (__m512d)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x 2^n, exact also where 2^n alone would not be a normal number
  LSTMFUSED_INLINE F scale(F x, F n) {
    if constexpr (sizeof(A) == 4)
      return (F)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
    else
      return (F)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)n);
  }
  LSTMFUSED_INLINE F power_of_two(F n) { return scale(broadcast(A(1)), n); }
#else
  LSTMFUSED_INLINE F limited(F t, A limit) { return at_least(at_most(t, limit), -limit); }
  LSTMFUSED_INLINE F fraction(F t) { return t - ((t + K::round) - K::round); }
  LSTMFUSED_INLINE Int whole(F n) { return (Int)(n + K::round) - (Int)broadcast(K::round); }
  LSTMFUSED_INLINE F power_of_two(Int n) { return (F)((n + K::bias) << K::mantissa_bits); }
  LSTMFUSED_INLINE F scale(F x, F n) {
    const Int all = whole(n), half = all >> 1;
    return x * power_of_two(half) * power_of_two(all - half);
  }
  LSTMFUSED_INLINE F power_of_two(F n) { return power_of_two(whole(n)); }
#endif

  // (2^r - 1) / r
  LSTMFUSED_INLINE F slope(F r) {
    F p = broadcast(K::coefficients[0]);
#pragma GCC unroll 16
    for (unsigned i = 1; i < sizeof(K::coefficients) / sizeof(A); i++) p = p * r + K::coefficients[i];
    return p;
  }

  // 1 / (1 + 2^t) for t = -x / log(2); overflows of 2^t give exactly 0, as in torch.
  LSTMFUSED_INLINE F sigmoid(F x) {
    const F t = limited(x * A(-1.4426950408889634), K::limit), r = fraction(t);
    return 1 / (1 + scale(slope(r) * r + 1, t - r));
  }

  // -m / (m + 2) with m = 2^t - 1 for t = -2 |x| / log(2): small values keep their relative precision.
  LSTMFUSED_INLINE F tanh(F x) {
    const Int sign = (Int)broadcast(A(-0.0));
    const F t = limited((F)((Int)x | sign) * A(2.8853900817779268), K::tanh_limit), r = fraction(t);
    const F power = power_of_two(t - r);
    const F m = slope(r) * r * power + (power - 1);
    const F magnitude = m / (m + 2);
    return (F)(((Int)magnitude & ~sign) | ((Int)x & sign));
  }
};

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
