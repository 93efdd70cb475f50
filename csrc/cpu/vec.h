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

// ---------------------------------------------------------------------------------------------------
// Memory: full vectors

LSTMFUSED_INLINE Vec<float> load(const float* p) { return *(const VectorOf<float>::Unaligned*)p; }
LSTMFUSED_INLINE Vec<double> load(const double* p) { return *(const VectorOf<double>::Unaligned*)p; }
LSTMFUSED_INLINE void store(float* p, Vec<float> v) { *(VectorOf<float>::Unaligned*)p = v; }
LSTMFUSED_INLINE void store(double* p, Vec<double> v) { *(VectorOf<double>::Unaligned*)p = v; }

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfBitsUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

LSTMFUSED_INLINE Vec<float> load(const bfloat16* p) {
  const HalfBits bits = *(const HalfBitsUnaligned*)p;
  return (Vec<float>)(__builtin_convertvector(bits, WordBits) << 16);
}

LSTMFUSED_INLINE void store(bfloat16* p, Vec<float> v) {
  const WordBits bits = (WordBits)v;
  const WordBits nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordBits rounded = v == v ? nearest_even : nearest_even * 0 + 0x7fc0u;  // NaN stays NaN
  *(HalfBitsUnaligned*)p = __builtin_convertvector(rounded, HalfBits);
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

// Lane i of the result is the sum of the lanes of v[i], i < N.
template <class A, int S = 1>
LSTMFUSED_INLINE Vec<A> sum_each(Vec<A>* v) {
  constexpr int N = kLanes<A>;
  if constexpr (S < N) {
    const typename CountLanes<N>::type lanes{};
#pragma GCC unroll 16
    for (int i = 0; i < N; i += 2 * S)
      v[i] = merge_low<A, S>(v[i], v[i + S], lanes) + merge_high<A, S>(v[i], v[i + S], lanes);
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
// exp, sigmoid, tanh: x = n log 2 + r with |r| <= log(2) / 2; exp(r) - 1 by a polynomial.

// min and max in which NaN stays NaN: of two operands, x86 returns the second if either is NaN.
template <class A>
LSTMFUSED_INLINE Vec<A> at_most(Vec<A> x, A limit) {
  return x > limit ? broadcast(limit) : x;
}
template <class A>
LSTMFUSED_INLINE Vec<A> at_least(Vec<A> x, A limit) {
  return x < limit ? broadcast(limit) : x;
}
#if defined(__AVX512F__)
LSTMFUSED_INLINE Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(limit), (__m512)x);
}
LSTMFUSED_INLINE Vec<float> at_least(Vec<float> x, float limit) {
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(limit), (__m512)x);
}
#elif defined(__AVX2__)
LSTMFUSED_INLINE Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x);
}
LSTMFUSED_INLINE Vec<float> at_least(Vec<float> x, float limit) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)x);
}
#endif

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {  // minimax polynomial of Cephes expf (S. Moshier)
  static constexpr float round = 0x1.8p23f, log2_high = 0.693359375f, log2_low = -2.12194440e-4f;
  static constexpr float limit = 104,
                         coefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  static constexpr int mantissa_bits = 23, bias = 127;
};
template <>
struct ExpConstants<double> {  // Taylor: the first term left out is below 5e-18
  static constexpr double round = 0x1.8p52, log2_high = 0x1.62e42feep-1, log2_low = 0x1.a39ef35793c76p-33;
  static constexpr double limit = 746,
                          coefficients[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800,
                                            1. / 362880,     1. / 40320,     1. / 5040,     1. / 720,
                                            1. / 120,        1. / 24,        1. / 6,        1. / 2};
  static constexpr int mantissa_bits = 52, bias = 1023;
};

template <class A>
struct VectorMath {
  using F = Vec<A>;
  using Int = IntVec<A>;
  using K = ExpConstants<A>;

  LSTMFUSED_INLINE F power_of_two(Int n) { return (F)((n + K::bias) << K::mantissa_bits); }

  // x 2^n for n = shifted - K::round, exact also where 2^n alone would not be a normal number.
  LSTMFUSED_INLINE F scale(F x, F shifted) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
      return (F)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)(shifted - K::round));
    else
      return (F)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)(shifted - K::round));
#else
    const Int n = (Int)shifted - (Int)broadcast(K::round), half = n >> 1;
    return x * power_of_two(half) * power_of_two(n - half);
#endif
  }

  // x = n log(2) + r for the n nearest to x / log(2); `shifted` is n + K::round.
  LSTMFUSED_INLINE F reduce(F x, F& shifted) {
    shifted = x * A(1.4426950408889634) + K::round;
    const F n = shifted - K::round;
    return x - n * K::log2_high - n * K::log2_low;
  }

  // (exp(r) - 1 - r) / r^2
  LSTMFUSED_INLINE F tail(F r) {
    F p = broadcast(K::coefficients[0]);
#pragma GCC unroll 16
    for (unsigned i = 1; i < sizeof(K::coefficients) / sizeof(A); i++) p = p * r + K::coefficients[i];
    return p;
  }

  // 1 / (1 + exp(-x)); overflows of exp give exactly 0, as in torch.
  LSTMFUSED_INLINE F sigmoid(F x) {
    F n;
    const F r = reduce(-at_least(at_most(x, K::limit), -K::limit), n);
    return 1 / (1 + scale((tail(r) * r + 1) * r + 1, n));
  }

  // -m / (m + 2) with m = exp(-2 |x|) - 1: small values keep their relative precision.
  LSTMFUSED_INLINE F tanh(F x) {
    const Int sign = (Int)x & (Int)broadcast(A(-0.0));
    F n;
    const F r = reduce(-2 * at_most((F)((Int)x ^ sign), A(20)), n);
    const F power = power_of_two((Int)n - (Int)broadcast(K::round));
    const F m = (tail(r) * (r * r) + r) * power + (power - 1);
    return (F)((Int)(-m / (m + 2)) ^ sign);
  }
};

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
