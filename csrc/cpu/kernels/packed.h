// One LSTM step forward from packed weights: vectors run along the units, and nothing is transposed. A
// block of units is read sequentially; elements of input and hx, broadcast, meet it.
#pragma once
#include "epilogue.h"
#include "kernels.h"
#include "tile.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

constexpr int kBlockVectors = 4 * kPackedUnits / kLanes<float>;
constexpr int kStreams = kBlockVectors <= kPanel ? 4 : 1;  // blocks read side by side, at most

// Several blocks side by side as a right factor: the hardware prefetcher follows several streams better
// than one, and the sums of few rows are too few to hide the latency of a multiply-add. It stops at a
// page's end: weights that stream from DRAM are prefetched one page ahead.
template <class W, int Streams, bool FromDram>
struct Blocks {
  static constexpr int64_t kLine = 64 / sizeof(W);

  const W* at;
  int64_t stride, between;  // elements from one depth, one block to the next
  const W* next = nullptr;
  int64_t lines = 0;  // to prefetch from `next` on for each cache line of the left factor

  LSTMFUSED_INLINED void prefetch_next() {
    for (int64_t i = 0; i < lines; i++, next += kLine) __builtin_prefetch(next, 0, 2);
  }

  template <int V, int N>
  LSTMFUSED_INLINED Vec<float> vector(int v) const {
    constexpr int64_t kPage = kPageBytes / sizeof(W);
    const W* from = at + v / (V / Streams) * between + v % (V / Streams) * N;
    constexpr int kVectors = 64 / (N * int(sizeof(W)));  // in a cache line
    if (FromDram && v % (kVectors > 1 ? kVectors : 1) == 0) __builtin_prefetch(from + kPage, 0, 2);
    return load(from);
  }
};

// The epilogue of a tile's rows and a block of Width units: sums (rows, 4, Width) with `stride` between
// rows.
template <int Width, class W>
static __attribute__((noinline)) void finish_rows(const Packed<W>& p, int64_t row, int64_t rows, int64_t u0,
                                                  const float* sums, int64_t stride) {
  constexpr int N = kLanes<float>;
  using Vector = Vec<float>;
  for (int u = 0; u < Width; u += N) {
    const auto packed = [&](const float* from, int gate) LSTMFUSED_INLINED {
      return load_upto(from + 4 * u0 + gate * Width + u, Width - u);
    };
    const auto sum = [&](int64_t r, int gate) LSTMFUSED_INLINED {
      const Vector s = load(sums + r * stride + gate * Width + u);
      if constexpr (sizeof(W) == 1) return s * packed(p.scale, gate);
      return s;
    };
    epilogue<Along::kUnits, kTileRows>(
        p, States{row, rows, u0 + u, p.H - u0 - u},
        [&](int64_t r)
            LSTMFUSED_INLINED { return Gates<Vector>{sum(r, 0), sum(r, 1), sum(r, 2), sum(r, 3)}; },
        [&](int64_t) LSTMFUSED_INLINED {
          if (!p.bias) return Gates<Vector>{};
          return Gates<Vector>{packed(p.bias, 0), packed(p.bias, 1), packed(p.bias, 2), packed(p.bias, 3)};
        });
  }
}

// A K-block of input and hx, side by side.
template <class W>
struct KBlock {
  int64_t begin, end, input_begin, input_end;

  KBlock(const Packed<W>& p, int64_t k)
      : begin(k),
        end(k + kKBlock < p.I + p.state_depth() ? k + kKBlock : p.I + p.state_depth()),
        input_begin(k < p.I ? k : p.I),
        input_end(end < p.I ? end : p.I) {}

  Rows<float> input(const Packed<W>& p, int64_t row) const {
    return {p.input + row * p.input_stride + input_begin, p.input_stride, input_end - input_begin};
  }
  Rows<float> state(const Packed<W>& p, int64_t row) const {
    const int64_t k = begin - input_begin;
    return {p.hx + row * p.hx_stride + k, p.hx_stride, end - input_end - k};
  }
};

// All rows, which are few, by several whole blocks.
template <int Streams, int R, bool FromDram, class W>
static void packed_streams(const Packed<W>& p, int64_t u0) {
  constexpr int64_t kStride = 4 * kPackedUnits, kColumns = Streams * kStride;
  alignas(64) float sums[R * kColumns];
  const int64_t K = p.I + p.state_depth();
  for (int64_t k = 0; k < K; k += kKBlock) {
    const KBlock<W> block(p, k);
    const Blocks<W, Streams, FromDram> right{p.weight + 4 * u0 * p.depth + (p.begin + k) * kStride, kStride,
                                             kStride * p.depth};
    multiply_tile<R, Streams * kBlockVectors, false>(
        right, Sums<float>{sums, kColumns, kColumns, k == 0, false, false}, block.input(p, 0),
        block.state(p, 0));
  }
  for (int s = 0; s < Streams; s++)
    finish_rows<kPackedUnits>(p, 0, R, u0 + s * kPackedUnits, sums + s * kStride, kColumns);
}

// Any rows by one block of Width units. Where no L2 holds the weights, each tile prefetches its share of
// the next K-block, or of the next block's first: if the first rows fetched it, they would wait, and then
// nothing would be fetched.
template <int Width, class W>
static void packed_block(const Packed<W>& p, Range rows, int64_t u0, bool beyond_l2) {
  using Right = Blocks<W, 1, false>;
  constexpr int N = kLanes<float>, kStride = 4 * Width;
  constexpr int64_t kPrefetches = kKBlock / kPrefetchDepth<float>;  // of a tile
  alignas(64) float sums[kPackedRows * kStride + N];
  const int64_t K = p.I + p.state_depth(),
                tiles = (kStride + kPanel * N - 1) / (kPanel * N) *
                        ((rows.size + tile_rows(kPanel) - 1) / tile_rows(kPanel)),
                lines = beyond_l2 ? kKBlock * kStride / Right::kLine / (kPrefetches * tiles) + 1 : 0;
  for (int64_t k = 0; k < K; k += kKBlock) {
    const KBlock<W> block(p, k);
    const W* const first = p.weight + 4 * u0 * p.depth + (p.begin + k) * kStride;
    const W* next = block.end < K ? first + kKBlock * kStride
                                  : p.weight + 4 * (u0 + Width) * p.depth + p.begin * kStride;
    const auto multiply = [&](auto V, int column) LSTMFUSED_INLINED {
      const W* weight = first + column;
      each_tile<V.value>(rows.size, [&](auto R, int64_t row) {
        const Rows<float> input = block.input(p, rows.begin + row),
                          state = block.state(p, rows.begin + row);
        float* to = sums + row * kStride;
        const Right right{weight, kStride, 0, next, lines};
        next += kPrefetches * lines * Right::kLine;
        const Sums<float> out{to + column, kStride, V.value * N, k == 0, false, false};
        multiply_tile<R.value, V.value, false>(right, out, input, state);
        if (block.end == K && column + V.value * N == kStride)
          finish_rows<Width>(p, rows.begin + row, R.value, u0, to, kStride);
      });
    };
    int column = 0;
    for (; column + kPanel * N <= kStride; column += kPanel * N) multiply(Constant<kPanel>{}, column);
    constexpr int kRest = kStride / N % kPanel;
    if constexpr (kRest > 0) multiply(Constant<kRest>{}, column);
  }
}

// Of one block; from torch's layout by transposition in registers.
static void pack_block(const Pack& p, int64_t u0) {
  constexpr int N = kLanes<float>;
  const int64_t units = p.H - u0 < kPackedUnits ? p.H - u0 : kPackedUnits,
                width = (units + kPackedMultiple - 1) / kPackedMultiple * kPackedMultiple;
  float* const block = p.packed + 4 * (u0 * p.depth + p.begin * width);
  for (int64_t k = 0; k < p.K; k += N)
    for (int gate = 0; gate < 4; gate++)
      for (int64_t u = 0; u < width; u += N) {
        const int64_t n = p.K - k < N ? p.K - k : N;
        const float* from = p.weight + (gate * p.H + u0 + u) * p.unit_stride + k * p.depth_stride;
        Vec<float> v[N];
        for (int i = 0; i < N; i++) v[i] = Vec<float>{};
        if (p.depth_stride == 1) {
          for (int i = 0; i < N && u + i < units; i++) v[i] = load_upto(from + i * p.unit_stride, n);
          transpose<float>(v);
        } else {
          for (int64_t i = 0; i < n; i++) v[i] = load_upto(from + i * p.depth_stride, units - u);
        }
        for (int64_t i = 0; i < n; i++)
          store_upto(block + ((k + i) * 4 + gate) * width + u, v[i], width - u);
      }
}

static inline void pack(const Pack& p, const Pool& pool) {
  pool.run((p.H + kPackedUnits - 1) / kPackedUnits, 4 * p.H * p.K * kPackWork,
           [](const void* context, int64_t i) {
             pack_block(*static_cast<const Pack*>(context), i * kPackedUnits);
           },
           &p);
}

template <bool FromDram, class W>
static void forward_packed_with(const Packed<W>& p, const Pool& pool) {
  const int64_t whole = p.H / kPackedUnits, last = p.H % kPackedUnits != 0,
                bytes = 4 * p.H * (p.I + p.state_depth()) * int64_t(sizeof(W));
  struct Context {
    const Packed<W>& p;
    int64_t whole, parts;  // whole blocks; parts of these, or of the batch
    bool beyond_l2;

    void block(int64_t index, Range rows) const {
      const int64_t u0 = index * kPackedUnits, fours = (p.H - u0 + kPackedMultiple - 1) / kPackedMultiple;
      with_constant<kPackedUnits / kPackedMultiple>(
          fours, [&](auto n) { packed_block<n.value * kPackedMultiple>(p, rows, u0, beyond_l2); });
    }
  } context{p, whole, 1, 4 * bytes > kPackedL2Quarters * pool.cache * pool.threads};
  const auto run = [&](int64_t tasks, auto task) {
    pool.run(tasks, (p.B + kWeightFetchWork) * (p.I + p.state_depth() + kEpilogueWork) * 4 * p.H, task,
             &context);
  };

  const int64_t share = (whole + pool.threads - 1) / pool.threads;
  int64_t together = kTileVectors / kBlockVectors / p.B;
  together = together < kStreams ? together : kStreams;
  together = together < share ? together : share;
  if (together > 1 || (together && kBlockVectors > kPanel)) {
    context.parts = (whole + together - 1) / together;
    return run(context.parts + last, [](const void* opaque, int64_t i) {
      const Context& t = *static_cast<const Context*>(opaque);
      if (i == t.parts) return t.block(t.whole, {0, t.p.B});
      const Range blocks = split_range(i, t.parts, t.whole, 1);
      with_constant<kStreams>(blocks.size, [&](auto streams) {
        constexpr int kMost = kTileVectors / kBlockVectors / streams.value;
        with_constant<(kMost > 1 ? kMost : 1)>(t.p.B, [&](auto R) {
          packed_streams<streams.value, R.value, FromDram>(t.p, blocks.begin * kPackedUnits);
        });
      });
    });
  }

  context.parts = (p.B + kPackedRows - 1) / kPackedRows;
  const auto uneven = [&] {
    const int64_t tasks = (whole + last) * context.parts;
    return tasks < 4 * pool.threads && (tasks % pool.threads || (last && pool.threads > 1));
  };
  while (uneven() && context.parts * tile_rows(kPanel) < p.B) context.parts++;
  run((whole + last) * context.parts, [](const void* opaque, int64_t i) {
    const Context& t = *static_cast<const Context*>(opaque);
    t.block(i / t.parts, split_range(i % t.parts, t.parts, t.p.B, 1));
  });
}

template <class W>
static void forward_packed(const Packed<W>& p, const Pool& pool) {
  const bool from_dram = 4 * p.H * (p.I + p.state_depth()) * int64_t(sizeof(W)) > kStreamingBytes;
  (from_dram ? forward_packed_with<true, W> : forward_packed_with<false, W>)(p, pool);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
