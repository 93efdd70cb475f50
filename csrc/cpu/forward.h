// One LSTM step forward.
#pragma once
#include "../cell_math.h"
#include "kernels.h"
#include "product.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// Bias of `gate` for n units from u on.
template <class T, class A = Accumulate<T>>
LSTMFUSED_INLINE Vec<A> bias(const Forward<T>& p, int gate, int64_t u, int64_t n) {
  Vec<A> sum{};
  if (p.bias_ih) sum += load_upto(p.bias_ih + gate * p.H + u, n);
  if (p.bias_hh) sum += load_upto(p.bias_hh + gate * p.H + u, n);
  return sum;
}

// The end of the step for n units of one row: sums -> gates -> c', h'.
template <class T, class A = Accumulate<T>>
LSTMFUSED_INLINE void finish(const Forward<T>& p, int64_t row, int64_t u, int64_t n,
                             const Gates<Vec<A>>& sums) {
  using Math = VectorMath<A>;
  const Gates<Vec<A>> gate = activate<Math>(sums);
  const Vec<A> c = next_cell(gate, load_upto(p.cx + row * p.cx_stride + u, n));
  store_upto(p.c + row * p.H + u, c, n);
  store_upto(p.h + row * p.H + u, next_hidden<Math>(gate, c), n);
  if (p.gates) {
    T* gates = p.gates + row * 4 * p.H + u;
    store_upto(gates, gate.i, n);
    store_upto(gates + p.H, gate.f, n);
    store_upto(gates + 2 * p.H, gate.g, n);
    store_upto(gates + 3 * p.H, gate.o, n);
  }
}

// ---------------------------------------------------------------------------------------------------
// Many rows: vectors run along units. Weights of one vector of units, all four gates, are transposed
// into a panel that every row of the piece uses; nothing of it is kept between calls.

template <class T>
static void forward_panel(const Forward<T>& p, int64_t u, Range rows) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  const int64_t n = p.H - u < N ? p.H - u : N;
  Scratch<A> scratch;

  Vec<A> start[kPanel];
  for (int gate = 0; gate < 4; gate++) start[gate] = bias(p, gate, u, n);
  for (int64_t row = 0; row < rows.size; row++)
    for (int gate = 0; gate < 4; gate++) store(scratch.sums + row * kWidth<A> + gate * N, start[gate]);

  const auto accumulate = [&](const A* left, int64_t left_stride, const T* weight, int64_t K) {
    for (int64_t k = 0; k < K; k += kDepth) {
      const int64_t depth = K - k < kDepth ? K - k : kDepth;
      for (int gate = 0; gate < 4; gate++)
        transpose_into(scratch.panel + gate * N, kWidth<A>, weight + (gate * p.H + u) * K + k, K, n, depth);
      multiply(rows.size, left + rows.begin * left_stride + k, left_stride, scratch.panel,
               int64_t(kWidth<A>), depth, scratch.sums, int64_t(kWidth<A>), false);
    }
  };
  accumulate(p.input, p.input_stride, p.weight_ih, p.I);
  accumulate(p.hx, p.hx_stride, p.weight_hh, p.H);

  for (int64_t row = 0; row < rows.size; row++) {
    const A* s = scratch.sums + row * kWidth<A>;
    finish(p, rows.begin + row, u, n, {load(s), load(s + N), load(s + 2 * N), load(s + 3 * N)});
  }
}

// ---------------------------------------------------------------------------------------------------
// Few rows: vectors run along K. The weights are read once, as they lie, for up to kDots / 4 rows.

template <class A>
constexpr int kDots = kLanes<A> >= 16 ? 16 : 8;  // sums in flight: 4 gates x units x rows

// dots (units, rows, 4) += weight (4 gates, units; K) . left (rows, K)
template <int Units, int Rows, class T, class A>
LSTMFUSED_INLINE void dot(Vec<A>* dots, const A* left, int64_t left_stride, const T* weight, int64_t H,
                          int64_t K) {
  const auto step = [&](int64_t k, auto load_part) {
    Vec<A> x[Rows];
    for (int r = 0; r < Rows; r++) x[r] = load_part(left + r * left_stride + k);
    for (int u = 0; u < Units; u++)
      for (int gate = 0; gate < 4; gate++) {
        const Vec<A> w = load_part(weight + (gate * H + u) * K + k);
        for (int r = 0; r < Rows; r++) dots[(u * Rows + r) * 4 + gate] += x[r] * w;
      }
  };
  constexpr int N = kLanes<A>;
  int64_t k = 0;
  for (; k + N <= K; k += N) step(k, [](auto* p) { return load(p); });
  if (k < K) step(k, [n = K - k](auto* p) { return load_some(p, n); });
}

// Units x Rows states from (u, row) on; sums holds (rows, 4 gates, lanes of units), this block's first
// unit being u0.
template <int Units, int Rows, class T, class A = Accumulate<T>>
static void dot_tile(const Forward<T>& p, int64_t u0, int64_t u, int64_t row, A* sums) {
  constexpr int N = kLanes<A>, Dots = 4 * Units * Rows;
  Vec<A> dots[(Dots + N - 1) / N * N] = {};
  dot<Units, Rows>(dots, p.input + row * p.input_stride, p.input_stride, p.weight_ih + u * p.I, p.H, p.I);
  dot<Units, Rows>(dots, p.hx + row * p.hx_stride, p.hx_stride, p.weight_hh + u * p.H, p.H, p.H);
  alignas(64) A sum[Dots + N];
  for (int i = 0; i < Dots; i += N) store(sum + i, sum_each<A>(dots + i));
  for (int i = 0; i < Units; i++)
    for (int r = 0; r < Rows; r++)
      for (int gate = 0; gate < 4; gate++)
        sums[(r * 4 + gate) * N + u - u0 + i] = sum[(i * Rows + r) * 4 + gate];
}

template <int Rows, class T>
static void forward_dot(const Forward<T>& p, int64_t u0, int64_t row) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  constexpr int Units = kDots<A> / 4 / Rows > 0 ? kDots<A> / 4 / Rows : 1;
  const int64_t n = p.H - u0 < N ? p.H - u0 : N;
  alignas(64) A sums[Rows * 4 * N];
  int64_t u = u0;
  for (; u + Units <= u0 + n; u += Units) dot_tile<Units, Rows>(p, u0, u, row, sums);
  for (; u < u0 + n; u++) dot_tile<1, Rows>(p, u0, u, row, sums);
  Vec<A> b[4];
  for (int gate = 0; gate < 4; gate++) b[gate] = bias(p, gate, u0, n);
  for (int r = 0; r < Rows; r++) {
    const A* s = sums + r * 4 * N;
    finish(p, row + r, u0, n,
           {load(s) + b[0], load(s + N) + b[1], load(s + 2 * N) + b[2], load(s + 3 * N) + b[3]});
  }
}

template <class T>
static void forward_dots(const Forward<T>& p, int64_t u0) {
  constexpr int R = kDots<Accumulate<T>> / 4;  // 4 or 2
  int64_t row = 0;
  for (; row + R <= p.B; row += R) forward_dot<R>(p, u0, row);
  switch (p.B - row) {
    case 3: forward_dot<R - 1>(p, u0, row); break;
    case 2: forward_dot<2>(p, u0, row); break;
    case 1: forward_dot<1>(p, u0, row); break;
  }
}

// ---------------------------------------------------------------------------------------------------

template <class T>
static bool few_rows(const Forward<T>& p) {
  return p.B <= 8;
}

template <class T>
static void forward(const Forward<T>& p, const Pool& pool) {
  constexpr int N = kLanes<Accumulate<T>>;
  const int64_t unit_blocks = (p.H + N - 1) / N;
  const int64_t work = p.B * (p.I + p.H + 8) * 4 * p.H;
  if (few_rows(p)) {
    pool.run(
        unit_blocks, work,
        [](const void* context, int64_t i) {
          forward_dots(*static_cast<const Forward<T>*>(context), i * kLanes<Accumulate<T>>);
        },
        &p);
  } else {
    struct Context {
      const Forward<T>& p;
      int64_t unit_blocks, pieces;
    } context{p, unit_blocks, row_pieces(p.B, unit_blocks, pool.threads)};
    pool.run(
        unit_blocks * context.pieces, work,
        [](const void* opaque, int64_t i) {
          const Context& t = *static_cast<const Context*>(opaque);
          forward_panel(t.p, i % t.unit_blocks * kLanes<Accumulate<T>>,
                        piece(i / t.unit_blocks, t.pieces, t.p.B, kTileRows));
        },
        &context);
  }
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
