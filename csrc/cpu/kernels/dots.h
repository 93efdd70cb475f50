// Few rows: vectors run along the depth, and the weights are read once, in torch's layout.
#pragma once
#include "epilogue.h"
#include "streaming.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// Rows and units whose sums fit the scratch: kDotRows and a vector's lanes.
template <bool Streaming, class T>
static void forward_dots(const Forward<T>& p, Range rows, Range units) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>, R = kDotVectors / 4;
  const int64_t u0 = units.begin, n = units.size;
  alignas(64) A sums[kDotRows * 4 * N];                                       // (rows, N, 4)
  for (int64_t i = 0; i < rows.size * 4; i++) store(sums + i * N, Vec<A>{});  // lanes beyond n

  // Units of which all rows are done before the next ones: few where weights stream from DRAM, so that they
  // stay in cache meanwhile.
  const bool blocked = Streaming && R * (p.I + p.state_depth()) * int64_t(sizeof(T)) >= kL1Bytes;
  const int64_t group = !Streaming ? N : blocked ? kStreamingUnits : rows.size > R ? 1 : R;
  for (int64_t u = 0; u < n; u += group) {
    const int64_t size = n - u < group ? n - u : group;
    const auto at = [&](int64_t row, int64_t from) { return sums + (row * N + u + from) * 4; };
    const auto tiles = [&](auto tile, int64_t width, int64_t row, int64_t from) {
      for (; from + width <= size; from += width) tile(p, rows.begin + row, u0 + u + from, at(row, from));
      return from;
    };
    // Unrolling changes the order of additions, which must not depend on the number of rows.
    const auto unrolled = [&](auto tile, int64_t width, int64_t row) {
      return p.batch_invariant ? 0 : tiles(tile, width, row, 0);
    };
    int64_t row = 0;
    if constexpr (Streaming)
      for (int64_t count; blocked && row + R <= rows.size; row += count * R) {
        const int64_t left = (rows.size - row) / R;
        count = left < kStreamingTiles ? left : kStreamingTiles;
        streaming_dots(p, rows.begin + row, count, u0 + u, size, at(row, 0));
      }
    for (; row + R <= rows.size; row += R) tiles(dot_tile<1, R, Streaming, T>, 1, row, 0);
    switch (rows.size - row) {
      case 3: tiles(dot_tile<1, 3, Streaming, T>, 1, row, 0); break;
      case 2:
        tiles(dot_tile<1, 2, Streaming, T>, 1, row, unrolled(dot_tile<R / 2, 2, Streaming, T>, R / 2, row));
        break;
      case 1:
        tiles(dot_tile<1, 1, Streaming, T>, 1, row, unrolled(dot_tile<R, 1, Streaming, T>, R, row));
        break;
    }
  }

  Vec<A> b[4];
  for (int gate = 0; gate < 4; gate++) b[gate] = sum_bias(p, gate, u0, n);
  for (int64_t begin = 0; begin < rows.size; begin += N) {
    const States states{rows.begin + begin, rows.size - begin < N ? rows.size - begin : N, u0, n};
    epilogue<Along::kUnits, N>(
        p, states,
        [&](int64_t r) {
          Vec<A> s[4];
          for (int i = 0; i < 4; i++) s[i] = load(sums + ((begin + r) * 4 + i) * N);
          deinterleave<A>(s);
          return Gates<Vec<A>>{s[0], s[1], s[2], s[3]};
        },
        [&](int64_t) { return Gates<Vec<A>>{b[0], b[1], b[2], b[3]}; });
  }
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
