// Many rows: vectors run along the batch. Input and state of a few vectors of rows are transposed into a
// panel, which stays in L1 while the weights pass over it in torch's layout.
#pragma once
#include "epilogue.h"
#include "kernels.h"
#include "tile.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

template <class T>
struct PanelScratch {
  using A = Accumulate<T>;
  static constexpr int kFactors = kPanelBytes / sizeof(Factor<T>);
  alignas(64) Factor<T> panel[kFactors];            // (depth, rows)
  alignas(64) A sums[4 * kPanelUnits * kWidth<A>];  // (4, units, rows)
};

// Rows of numbers as rows of factors: in place, or copied to `scratch` of kTileRows * kKBlock.
template <int R, class T>
LSTMFUSED_INLINE Rows<T> as_factors(Rows<T> rows, T*) {
  return rows;
}
template <int R, class T, class F>
LSTMFUSED_INLINE Rows<F> as_factors(Rows<T> rows, F* scratch) {
  const int64_t depth = factors<T>(rows.depth);
  if constexpr (kSpan<T> > 1)
    if (rows.depth % kSpan<T> == 0) return {rows.at, rows.stride, depth};
  for (int r = 0; r < R; r++)
    for (int64_t k = 0; k < depth; k += kLanes<F>)
      store(scratch + r * kKBlock + k,
            load_factors(rows.at + r * rows.stride + k * kSpan<T>, rows.depth - k * kSpan<T>));
  if constexpr (kSpan<T> > 1)
    return {reinterpret_cast<const T*>(scratch), kKBlock * kSpan<T>, depth};
  else
    return {scratch, kKBlock, depth};
}

template <class T>
static void forward_panel(const Forward<T>& p, Range rows, Range units) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  constexpr int64_t W = kWidth<A>;
  PanelScratch<T> scratch;
  // Input and state, side by side, are one right factor: a panel, and a K-block of it, may hold the end of
  // the input and the beginning of the state.
  struct Parts {
    Range input, state;
  };
  const int64_t depth = factors<T>(p.I), K = depth + factors<T>(p.state_depth());
  const auto parts = [&](int64_t begin, int64_t end) -> Parts {  // factors -> numbers
    const auto clamp = [](int64_t x, int64_t size) { return x < 0 ? 0 : x < size ? x : size; };
    const auto part = [&](int64_t offset, int64_t size) -> Range {
      const int64_t first = clamp((begin - offset) * kSpan<T>, size);
      return {first, clamp((end - offset) * kSpan<T>, size) - first};
    };
    return {part(0, p.I), part(depth, p.state_depth())};
  };
  with_constant<kPanel>((rows.size + N - 1) / N, [&](auto V) {
    constexpr int64_t w = V.value * N;
    // A panel fits L1. A narrow one, which reuses the weights little, is deeper, so that these are read in
    // longer streams.
    const int64_t deep = V.value <= 2 ? PanelScratch<T>::kFactors / w : kKBlock;
    for (int64_t begin = 0; begin < K; begin += deep) {
      const int64_t end = begin + deep < K ? begin + deep : K;
      const Parts whole = parts(begin, end);
      for (int64_t v = 0; v < rows.size; v += N) {
        const int64_t row = rows.begin + v, n = rows.size - v < N ? rows.size - v : N;
        transpose_into(scratch.panel + v, w, p.input + row * p.input_stride + whole.input.begin,
                       p.input_stride, n, whole.input.size);
        transpose_into(scratch.panel + factors<T>(whole.input.size) * w + v, w,
                       p.hx + row * p.hx_stride + whole.state.begin, p.hx_stride, n, whole.state.size);
      }
      for (int gate = 0; gate < 4; gate++)
        each_tile<V.value>(units.size, [&](auto R, int64_t unit) {
          for (int64_t k = begin; k < end; k += kKBlock) {
            const Parts part = parts(k, k + kKBlock < end ? k + kKBlock : end);
            const int64_t row = gate * p.H + units.begin + unit;
            const Rows<T> input{p.weight_ih + row * p.I + part.input.begin, p.I, part.input.size};
            const Rows<T> state{p.weight_hh + row * p.H + part.state.begin, p.H, part.state.size};
            alignas(64) Factor<T> converted[2][kTileRows * kKBlock];
            const Right<Factor<T>> panel{scratch.panel + (k - begin) * w, w, w};
            const Sums<A> sums{scratch.sums + (gate * units.size + unit) * W, W, w, k == 0, false, false};
            multiply_tile<R.value, V.value, false>(panel, sums, as_factors<R.value>(input, converted[0]),
                                                   as_factors<R.value>(state, converted[1]));
          }
        });
    }
  });

  A bias[4 * kPanelUnits];
  for (int gate = 0; gate < 4; gate++)
    for (int64_t u = 0; u < units.size; u += N)
      store_upto(bias + gate * units.size + u, sum_bias(p, gate, units.begin + u, units.size - u),
                 units.size - u);
  for (int64_t v = 0; v < rows.size; v += N)
    for (int64_t u = 0; u < units.size; u += N) {
      const States states{rows.begin + v, rows.size - v < N ? rows.size - v : N, units.begin + u,
                          units.size - u < N ? units.size - u : N};
      const auto at = [&](int gate, int64_t i) { return gate * units.size + u + i; };
      const auto sum = [&](int gate, int64_t i) { return load(scratch.sums + at(gate, i) * W + v); };
      const auto b = [&](int gate, int64_t i) { return broadcast(bias[at(gate, i)]); };
      epilogue<Along::kRows, N>(
          p, states, [&](int64_t i) { return Gates<Vec<A>>{sum(0, i), sum(1, i), sum(2, i), sum(3, i)}; },
          [&](int64_t i) { return Gates<Vec<A>>{b(0, i), b(1, i), b(2, i), b(3, i)}; });
    }
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
