// exp2, sigmoid and tanh of a vector.
#pragma once
#include "vec.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

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
