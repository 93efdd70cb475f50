// Exchanges between lanes: transposition, sums of lanes, interleaved columns.
#pragma once
#include "vec.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

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

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
