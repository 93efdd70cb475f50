// Dot products of a few rows and units: vectors run along the depth.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// s (Unroll, R, 4) += R rows of x times four rows of weights; prefetch(k) is called ahead of each vector of
// the depth.
template <int Unroll, int R, class T, class A, class Prefetch>
LSTMFUSED_INLINE void add_dots(Vec<A> (&s)[Unroll][R * 4], Rows<T> x, const T* weight, int64_t gate_stride,
                               Prefetch&& prefetch) {
  const auto add_vector = [&](Vec<A>* into, int64_t k, auto load_part) LSTMFUSED_INLINED {
    Vec<Factor<T>> row[R];
    each_sum<1, R>([&](int, int r) LSTMFUSED_INLINED { row[r] = load_part(x.at + r * x.stride + k); });
    prefetch(k);
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; gate++) {
      Vec<Factor<T>> w = load_part(weight + gate * gate_stride + k);
      if constexpr (R > 1) pin_to_register(w);
      each_sum<1, R>([&](int, int r) LSTMFUSED_INLINED { multiply_add(into[r * 4 + gate], row[r], w); });
    }
  };
  constexpr int64_t M = kLanes<A> * kSpan<T>;
  const int64_t K = x.depth;
  int64_t k = 0;
  for (; k + Unroll * M <= K; k += Unroll * M)
#pragma GCC unroll 8
    for (int j = 0; j < Unroll; j++) add_vector(s[j], k + j * M, [](auto* p) { return load_factors(p); });
  for (; k + M <= K; k += M) add_vector(s[0], k, [](auto* p) { return load_factors(p); });
  if (k < K) add_vector(s[0], k, [n = K - k](auto* p) { return load_factors(p, n); });
}

// dots (Units, R, 4) and zeros up to whole vectors, each summed over its lanes: sums (R, Units, 4), where
// rows are N units apart.
template <int Units, int R, class A>
LSTMFUSED_INLINE void sum_dots(Vec<A>* dots, A* sums) {
  constexpr int N = kLanes<A>, Dots = 4 * Units * R;
  alignas(64) A sum[Dots + N];
  for (int i = 0; i < Dots; i += N) store(sum + i, sum_each<A>(dots + i));
  for (int i = 0; i < Units; i++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int gate = 0; gate < 4; gate++) sums[(r * N + i) * 4 + gate] = sum[(i * R + r) * 4 + gate];
}

template <int Dots, class A>
constexpr int kWholeDots = (Dots + kLanes<A> - 1) / kLanes<A> * kLanes<A>;

// sums (R, Units, 4) of the units from u on. With few rows the depth is unrolled, to have enough sums in
// flight. Units follow one another, so that their weights are four sequential streams; the hardware
// prefetcher stops at a page's end, so weights that stream from DRAM are prefetched one page ahead.
template <int Units, int R, bool Streaming, class T, class A = Accumulate<T>>
static __attribute__((noinline)) void dot_tile(const Forward<T>& p, int64_t row, int64_t u, A* sums) {
  constexpr int Unroll = Units, Dots = 4 * Units * R, kPage = kPageBytes / sizeof(T);
  Vec<A> dots[kWholeDots<Dots, A>];  // (Units, R, 4)
  for (int i = Dots; i < int(sizeof dots / sizeof *dots); i++) dots[i] = Vec<A>{};
  each_sum<1, Units>([&](int, int i) LSTMFUSED_INLINED {
    Vec<A> s[Unroll][R * 4];
    each_sum<Unroll, R * 4>([&](int j, int d) LSTMFUSED_INLINED { s[j][d] = Vec<A>{}; });
    const auto add = [&](Rows<T> x, const T* weights) LSTMFUSED_INLINED {
      const T* weight = weights + (u + i) * x.depth;
      add_dots<Unroll, R, T, A>(s, x, weight, p.H * x.depth, [&](int64_t k) LSTMFUSED_INLINED {
        for (int gate = 0; gate < 4 && Streaming; gate++)
          __builtin_prefetch(weight + gate * p.H * x.depth + k + kPage, 0, 2);
      });
    };
    add({p.input + row * p.input_stride, p.input_stride, p.I}, p.weight_ih);
    add({p.hx + row * p.hx_stride, p.hx_stride, p.state_depth()}, p.weight_hh);
    each_sum<Unroll - 1, R * 4>([&](int j, int d) LSTMFUSED_INLINED { s[0][d] += s[j + 1][d]; });
    each_sum<1, R * 4>([&](int, int d) LSTMFUSED_INLINED { dots[i * R * 4 + d] = s[0][d]; });
  });
  sum_dots<Units, R>(dots, sums);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
