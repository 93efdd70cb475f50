// Few rows of an input too long for L1, and weights that stream from DRAM: both meet in K-blocks. A few
// units pass over a K-block of the input before the next one, their sums kept meanwhile.
#pragma once
#include "dot_tile.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// One K-block of the dots of one unit.
template <class T>
struct DotBlock {
  Rows<T> x;
  const T* weight;      // of the first gate
  const T* next_unit;   // what follows: in this K-block, prefetched to L1
  const T* next_block;  // and in the next one, prefetched from DRAM to L2
  int64_t gate_stride, next_block_gate_stride;
};

template <int R, bool FromDram, class T, class A = Accumulate<T>>
static __attribute__((noinline)) void dot_block(const DotBlock<T>& p, Vec<A>* dots) {
  constexpr int64_t kAhead = kL1PrefetchBytes / sizeof(T);
  Vec<A> s[1][R * 4];
  each_sum<1, R * 4>([&](int, int d) LSTMFUSED_INLINED { s[0][d] = dots[d]; });
  add_dots<1, R, T, A>(s, p.x, p.weight, p.gate_stride, [&](int64_t k) LSTMFUSED_INLINED {
    const int64_t ahead = k + kAhead;
    const T* next = ahead < p.x.depth ? p.weight + ahead : p.next_unit + (ahead - p.x.depth);
    for (int gate = 0; gate < 4; gate++) __builtin_prefetch(next + gate * p.gate_stride, 0, 3);
    for (int gate = 0; gate < 4 && FromDram; gate++)
      __builtin_prefetch(p.next_block + gate * p.next_block_gate_stride + k, 0, 2);
  });
  each_sum<1, R * 4>([&](int, int d) LSTMFUSED_INLINED { dots[d] = s[0][d]; });
}

// As dot_tile, for `units` units and `tiles` times R rows.
template <class T, class A = Accumulate<T>>
static void streaming_dots(const Forward<T>& p, int64_t row, int64_t tiles, int64_t u, int64_t units,
                           A* sums) {
  constexpr int N = kLanes<A>, R = kDotVectors / 4, Dots = 4 * R;
  constexpr int64_t kBlock = kStreamingKBlockBytes / sizeof(T);
  Vec<A> dots[kStreamingTiles][kStreamingUnits][kWholeDots<Dots, A>];
  for (int64_t r = 0; r < tiles; r++)
    for (auto& unit : dots[r])
      for (auto& dot : unit) dot = Vec<A>{};
  const auto add = [&](Rows<T> x, const T* weights, const T* after, int64_t after_depth) {
    const int64_t K = x.depth;
    for (int64_t k = 0; k < K; k += kBlock) {
      const int64_t depth = K - k < kBlock ? K - k : kBlock;
      const bool last = k + depth == K;
      for (int64_t r = 0; r < tiles; r++)
        for (int64_t i = 0; i < units; i++) {
          const T* weight = weights + (u + i) * K + k;
          const DotBlock<T> block{x.from(r * R, k, depth),
                                  weight,
                                  i + 1 < units ? weight + K : weights + u * K + k,
                                  last ? after + i * after_depth : weight + depth,
                                  p.H * K,
                                  p.H * (last ? after_depth : K)};
          (r ? dot_block<R, false, T> : dot_block<R, true, T>)(block, dots[r][i]);
        }
    }
  };
  const int64_t H = p.state_depth();
  add({p.input + row * p.input_stride, p.input_stride, p.I}, p.weight_ih, p.weight_hh + u * H, H);
  add({p.hx + row * p.hx_stride, p.hx_stride, H}, p.weight_hh, p.weight_ih + (u + units) * p.I, p.I);
  for (int64_t r = 0; r < tiles; r++)
    for (int64_t i = 0; i < units; i++) sum_dots<1, R>(dots[r][i], sums + (r * R * N + i) * 4);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
