// One LSTM step forward from packed weights: vectors run along the units, and nothing is transposed. A
// block of units is a stream of memory, read in order; elements of input and hx, broadcast, meet it.
#pragma once
#include "forward.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

constexpr int kFrozenRows = 256;  // of which scratch has room for the sums
constexpr int kBlockVectors = 4 * kFrozenUnits / kLanes<float>;
constexpr int kStreams = kBlockVectors <= kPanel ? 4 : 1;  // blocks read side by side, at most

// Streams blocks side by side as a right factor: a processor foresees several streams better than one, and
// the sums of few rows are too few to keep it busy. Streams end for it with a page; of `Far` ones the next
// page is fetched, too.
template <class W, int Streams, bool Far>
struct Blocks {
  const W* at;
  int64_t stride, between;  // elements from one depth, one block to the next

  template <int V, int N>
  LSTMFUSED_INLINED Vec<float> vector(int v) const {
    constexpr int64_t kPage = 4096 / sizeof(W);
    const W* place = at + v / (V / Streams) * between + v % (V / Streams) * N;
    constexpr int kVectors = 64 / (N * int(sizeof(W)));  // in a line
    if (Far && v % (kVectors > 1 ? kVectors : 1) == 0) __builtin_prefetch(place + kPage, 0, 2);
    return load(place);
  }
};

// The end of the step for `rows` from the sums of a block, (rows, 4, Width) with `stride` between rows.
template <int R, int Width, class W>
LSTMFUSED_INLINE void finish_rows(const Frozen<W>& p, int64_t row, int64_t u0, const float* sums,
                                  int64_t stride) {
  constexpr int N = kLanes<float>;
  for (int u = 0; u < Width; u += N) {
    const int64_t n = p.H - u0 - u;
    Vec<float> c[R], h[R];
    for (int r = 0; r < R; r++) c[r] = load_upto(p.cx + (row + r) * p.cx_stride + u0 + u, n);
    const auto sum = [&](int64_t r, int gate) {
      const int64_t at = gate * Width + u;
      Vec<float> s = load(sums + r * stride + at);
      if constexpr (sizeof(W) == 1) s *= load_upto(p.scale + 4 * u0 + at, Width - u);
      return s + load_upto(p.bias + 4 * u0 + at, Width - u);
    };
    finish<float>(
        R, c, h, [&](int64_t r) { return Gates<Vec<float>>{sum(r, 0), sum(r, 1), sum(r, 2), sum(r, 3)}; },
        [](int64_t, const Gates<Vec<float>>&) {});
    for (int r = 0; r < R; r++) {
      store_upto(p.c + (row + r) * p.H + u0 + u, c[r], n);
      store_upto(p.h + (row + r) * p.H + u0 + u, h[r], n);
    }
  }
}

// A piece of the depth of input and hx side by side.
template <class W>
struct Depth {
  int64_t begin, end, input_begin, input_end;

  Depth(const Frozen<W>& p, int64_t k)
      : begin(k),
        end(k + kDepth < p.I + p.H ? k + kDepth : p.I + p.H),
        input_begin(k < p.I ? k : p.I),
        input_end(end < p.I ? end : p.I) {}

  Rows<float> input(const Frozen<W>& p, int64_t row) const {
    return {p.input + row * p.input_stride + input_begin, p.input_stride, input_end - input_begin};
  }
  Rows<float> state(const Frozen<W>& p, int64_t row) const {
    const int64_t k = begin - input_begin;
    return {p.hx + row * p.hx_stride + k, p.hx_stride, end - input_end - k};
  }
};

// All rows, which are few, by several whole blocks.
template <int Streams, int R, bool Far, class W>
static void frozen_streams(const Frozen<W>& p, int64_t u0) {
  constexpr int64_t kStride = 4 * kFrozenUnits, kColumns = Streams * kStride;
  alignas(64) float sums[R * kColumns];
  const int64_t K = p.I + p.H;
  for (int64_t k = 0; k < K; k += kDepth) {
    const Depth<W> depth(p, k);
    const Blocks<W, Streams, Far> right{p.weight + 4 * u0 * K + k * kStride, kStride, kStride * K};
    multiply_tile<R, Streams * kBlockVectors, false>(
        right, Sums<float>{sums, kColumns, kColumns, k == 0, false, false}, depth.input(p, 0),
        depth.state(p, 0));
  }
  for (int s = 0; s < Streams; s++)
    finish_rows<R, kFrozenUnits>(p, 0, u0 + s * kFrozenUnits, sums + s * kStride, kColumns);
}

// Any rows by one block of Width units.
template <int Width, class W>
static void frozen_block(const Frozen<W>& p, Range rows, int64_t u0) {
  constexpr int N = kLanes<float>, kStride = 4 * Width;
  alignas(64) float sums[kFrozenRows * kStride + N];
  const int64_t K = p.I + p.H;
  for (int64_t k = 0; k < K; k += kDepth) {
    const Depth<W> depth(p, k);
    const auto multiply = [&](auto V, int column) LSTMFUSED_INLINED {
      const W* weight = p.weight + 4 * u0 * K + k * kStride + column;
      each_tile<V.value>(rows.size, [&](auto R, int64_t row) {
        const Rows<float> input = depth.input(p, rows.begin + row),
                          state = depth.state(p, rows.begin + row);
        float* to = sums + row * kStride;
        const Blocks<W, 1, false> right{weight, kStride, 0};
        const Sums<float> out{to + column, kStride, V.value * N, k == 0, false, false};
        multiply_tile<R.value, V.value, false>(right, out, input, state);
        if (depth.end == K && column + V.value * N == kStride)
          finish_rows<R.value, Width>(p, rows.begin + row, u0, to, kStride);
      });
    };
    int column = 0;
    for (; column + kPanel * N <= kStride; column += kPanel * N) multiply(Constant<kPanel>{}, column);
    constexpr int kRest = kStride / N % kPanel;
    if constexpr (kRest > 0) multiply(Constant<kRest>{}, column);
  }
}

template <bool Far, class W>
static void forward_frozen_with(const Frozen<W>& p, const Pool& pool) {
  const int64_t whole = p.H / kFrozenUnits, last = p.H % kFrozenUnits != 0;
  struct Context {
    const Frozen<W>& p;
    int64_t whole, pieces;  // whole blocks; pieces of these, or of the batch

    void block(int64_t index, Range rows) const {
      const int64_t u0 = index * kFrozenUnits, fours = (p.H - u0 + kFrozenMultiple - 1) / kFrozenMultiple;
      with_constant<kFrozenUnits / kFrozenMultiple>(
          fours, [&](auto n) { frozen_block<n.value * kFrozenMultiple>(p, rows, u0); });
    }
  } context{p, whole, 1};
  const auto run = [&](int64_t tasks, auto task) {
    pool.run(tasks, (p.B + kWeightWork) * (p.I + p.H + kFinishWork) * 4 * p.H, task, &context);
  };

  const int64_t share = (whole + pool.threads - 1) / pool.threads;
  int64_t streams = kTileSums / kBlockVectors / p.B;
  streams = streams < kStreams ? streams : kStreams;
  streams = streams < share ? streams : share;
  if (streams > 1 || (streams && kBlockVectors > kPanel)) {
    context.pieces = (whole + streams - 1) / streams;
    return run(context.pieces + last, [](const void* opaque, int64_t i) {
      const Context& t = *static_cast<const Context*>(opaque);
      if (i == t.pieces) return t.block(t.whole, {0, t.p.B});
      const Range blocks = piece(i, t.pieces, t.whole, 1);
      with_constant<kStreams>(blocks.size, [&](auto streams) {
        constexpr int kMost = kTileSums / kBlockVectors / streams.value;
        with_constant<(kMost > 1 ? kMost : 1)>(t.p.B, [&](auto R) {
          frozen_streams<streams.value, R.value, Far>(t.p, blocks.begin * kFrozenUnits);
        });
      });
    });
  }

  context.pieces = (p.B + kFrozenRows - 1) / kFrozenRows;
  const auto uneven = [&] {
    const int64_t tasks = (whole + last) * context.pieces;
    return tasks < 4 * pool.threads && (tasks % pool.threads || (last && pool.threads > 1));
  };
  while (uneven() && context.pieces * tile_rows(kPanel) < p.B) context.pieces++;
  run((whole + last) * context.pieces, [](const void* opaque, int64_t i) {
    const Context& t = *static_cast<const Context*>(opaque);
    t.block(i / t.pieces, piece(i % t.pieces, t.pieces, t.p.B, 1));
  });
}

template <class W>
static void forward_frozen(const Frozen<W>& p, const Pool& pool) {
  const bool far = 4 * p.H * (p.I + p.H) * int64_t(sizeof(W)) > kFarWeights;
  (far ? forward_frozen_with<true, W> : forward_frozen_with<false, W>)(p, pool);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
