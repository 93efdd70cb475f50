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

  bool fresh = true;
  const auto accumulate = [&](const A* left, int64_t left_stride, const T* weight, int64_t K) {
    for (int64_t k = 0; k < K; k += kDepth) {
      const int64_t depth = K - k < kDepth ? K - k : kDepth;
      for (int gate = 0; gate < 4; gate++)
        transpose_into(scratch.panel + gate * N, kWidth<A>, weight + (gate * p.H + u) * K + k, K, n, depth);
      multiply(rows.size, left + rows.begin * left_stride + k, left_stride, scratch.panel,
               int64_t(kWidth<A>), depth, scratch.sums, int64_t(kWidth<A>), int64_t(kWidth<A>), fresh);
      fresh = false;
    }
  };
  accumulate(p.input, p.input_stride, p.weight_ih, p.I);
  accumulate(p.hx, p.hx_stride, p.weight_hh, p.H);

  Vec<A> b[4];
  for (int gate = 0; gate < 4; gate++) b[gate] = bias(p, gate, u, n);
  for (int64_t row = 0; row < rows.size; row++) {
    const A* s = scratch.sums + row * kWidth<A>;
    finish(p, rows.begin + row, u, n,
           {load(s) + b[0], load(s + N) + b[1], load(s + 2 * N) + b[2], load(s + 3 * N) + b[3]});
  }
}

// ---------------------------------------------------------------------------------------------------
// Few rows: vectors run along K, and the weights are used as they lie. A tile is Units x Rows states; its
// dots are ordered (rows, units, gates). One stretch of K at a time, so that the weights of a unit stay in
// the first-level cache while all rows pass.

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDots = 16;  // sums in flight, of 32 registers
#else
constexpr int kDots = 8;  // of 16
#endif
template <class A>
constexpr int kStretch = 2048 / sizeof(A);

// Weights beyond this many bytes come from memory. The processor does not foresee four rows in four pages,
// so the rows of the unit after next are asked for while this one is worked on; where weights are in cache
// that would only cost.
constexpr int64_t kFarBytes = 16 << 20;

// A stretch of one of the two products: left (rows, depth), weight (4, H, depth).
template <class T>
struct Stretch {
  const Accumulate<T>* left;
  int64_t left_stride;
  const T* weight;
  int64_t weight_stride, depth;
  bool far;
};

template <int Units, int Rows, bool Prefetch, class T, class A = Accumulate<T>>
LSTMFUSED_INLINE void add_dots(Vec<A>* dots, const Stretch<T>& s, int64_t H, int64_t row, int64_t u) {
  constexpr int N = kLanes<A>;
  const auto step = [&](int64_t k, auto load_part) {
    Vec<A> x[Rows];
    for (int r = 0; r < Rows; r++) x[r] = load_part(s.left + (row + r) * s.left_stride + k);
    if (Prefetch)
      for (int gate = 0; gate < 4; gate++)
        __builtin_prefetch(s.weight + (gate * H + u + 2 * Units) * s.weight_stride + k);
    for (int i = 0; i < Units; i++)
      for (int gate = 0; gate < 4; gate++) {
        const Vec<A> w = load_part(s.weight + (gate * H + u + i) * s.weight_stride + k);
        for (int r = 0; r < Rows; r++) dots[(r * Units + i) * 4 + gate] += x[r] * w;
      }
  };
  int64_t k = 0;
  for (; k + N <= s.depth; k += N) step(k, [](auto* p) { return load(p); });
  if (k < s.depth) step(k, [n = s.depth - k](auto* p) { return load_some(p, n); });
}

// sums (rows, lanes of units, 4 gates)
template <int Units, int Rows, class T, class A = Accumulate<T>>
static __attribute__((noinline)) void dot_tile(const Stretch<T>* stretches, int64_t H, int64_t row,
                                               int64_t u, A* sums) {
  constexpr int N = kLanes<A>, Dots = 4 * Units * Rows;
  Vec<A> dots[(Dots + N - 1) / N * N] = {};
  if (stretches->far && row == 0) {
    add_dots<Units, Rows, true>(dots, stretches[0], H, row, u);
    add_dots<Units, Rows, true>(dots, stretches[1], H, row, u);
  } else {
    add_dots<Units, Rows, false>(dots, stretches[0], H, row, u);
    add_dots<Units, Rows, false>(dots, stretches[1], H, row, u);
  }
  alignas(64) A sum[Dots + N];
  for (int i = 0; i < Dots; i += N) store(sum + i, sum_each<A>(dots + i));
  for (int r = 0; r < Rows; r++)
    for (int i = 0; i < 4 * Units; i++) sums[((row + r) * N + u) * 4 + i] += sum[r * 4 * Units + i];
}

template <class T>
static void forward_dot(const Forward<T>& p, int64_t u0, Range rows) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>, R = kDots / 4;
  constexpr int64_t S = kStretch<A>;
  const int64_t n = p.H - u0 < N ? p.H - u0 : N;
  alignas(64) A sums[kRows * 4 * N];
  for (int64_t i = 0; i < rows.size * 4; i++) store(sums + i * N, Vec<A>{});

  const bool far = 4 * p.H * (p.I + p.H) * int64_t(sizeof(T)) > kFarBytes;
  const auto stretch = [&](const A* left, int64_t left_stride, const T* weight, int64_t K,
                           int64_t k) -> Stretch<T> {
    const int64_t depth = K - k < S ? K - k : S;
    return {left + rows.begin * left_stride + k,
            left_stride,
            weight + u0 * K + k,
            K,
            depth > 0 ? depth : 0,
            far};
  };
  for (int64_t k = 0; k < p.I || k < p.H; k += S) {
    const Stretch<T> stretches[] = {stretch(p.input, p.input_stride, p.weight_ih, p.I, k),
                                    stretch(p.hx, p.hx_stride, p.weight_hh, p.H, k)};
    const auto tiles = [&](auto tile, int units, int64_t row, int64_t u) {
      for (; u + units <= n; u += units) tile(stretches, p.H, row, u, sums);
      return u;
    };
    int64_t row = 0;
    for (int64_t u = 0; u < n; u++)
      for (row = 0; row + R <= rows.size; row += R) dot_tile<1, R>(stretches, p.H, row, u, sums);
    switch (rows.size - row) {
      case 3: tiles(dot_tile<1, 3, T>, 1, row, 0); break;
      case 2: tiles(dot_tile<1, 2, T>, 1, row, 0); break;
      case 1: tiles(dot_tile<1, 1, T>, 1, row, tiles(dot_tile<R, 1, T>, R, row, 0)); break;
    }
  }

  Vec<A> b[4];
  for (int gate = 0; gate < 4; gate++) b[gate] = bias(p, gate, u0, n);
  for (int64_t row = 0; row < rows.size; row++) {
    Vec<A> s[4];
    for (int i = 0; i < 4; i++) s[i] = load(sums + (row * 4 + i) * N);
    deinterleave<A>(s);
    finish(p, rows.begin + row, u0, n, {s[0] + b[0], s[1] + b[1], s[2] + b[2], s[3] + b[3]});
  }
}

// ---------------------------------------------------------------------------------------------------

// Transposing a panel costs what a few rows of dots cost; summing up the lanes of a dot costs what some of
// its length costs. So dots are for rows few and long; measured on Zen 4 from 2 -> 20 to 1024 -> 1024.
template <class T>
static bool few_rows(const Forward<T>& p) {
  const int64_t limit = (p.I + p.H) / 16;
  return p.B <= (limit < 4 ? 4 : limit < 48 ? limit : 48);
}

constexpr int64_t kFinishWork = 50;  // what finish costs, in multiply-adds of each of the four sums

template <class T>
static void forward(const Forward<T>& p, const Pool& pool) {
  constexpr int N = kLanes<Accumulate<T>>;
  const int64_t blocks = (p.H + N - 1) / N;
  struct Context {
    const Forward<T>& p;
    int64_t blocks, pieces;
  } context{p, blocks, row_pieces(p.B, kRows, blocks, pool.threads)};
  const auto run = [&](auto task) {
    pool.run(blocks * context.pieces, p.B * (p.I + p.H + kFinishWork) * 4 * p.H, task, &context);
  };
  if (few_rows(p))
    run([](const void* opaque, int64_t i) {
      const Context& t = *static_cast<const Context*>(opaque);
      forward_dot(t.p, i % t.blocks * N, piece(i / t.blocks, t.pieces, t.p.B, kDots / 4));
    });
  else
    run([](const void* opaque, int64_t i) {
      const Context& t = *static_cast<const Context*>(opaque);
      forward_panel(t.p, i % t.blocks * N, piece(i / t.blocks, t.pieces, t.p.B, kTileRows));
    });
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
