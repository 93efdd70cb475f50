// One LSTM step forward.
#pragma once
#include "../cell_math.h"
#include "kernels.h"
#include "product.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// Both biases of `gate`, summed, for n units from u on.
template <class T, class A = Accumulate<T>>
LSTMFUSED_INLINE Vec<A> sum_bias(const Forward<T>& p, int gate, int64_t u, int64_t n) {
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
// Many rows: vectors run along the batch. The input and the state of a few vectors of rows are transposed
// into a panel, and the weights pass over it as they lie.

// The end of the step for up to `lanes` rows by n units: sums and bias (4, units, width), where `sums` is
// the first of its rows and units, become c', h' and the gates.
template <class T, class A = Accumulate<T>>
static void finish_block(const Forward<T>& p, int64_t row, int64_t rows, int64_t u, int64_t n, A* sums,
                         const A* bias, int64_t units) {
  using Math = VectorMath<A>;
  constexpr int N = kLanes<A>;
  Vec<A> c[N], h[N];
  for (int r = 0; r < N; r++) c[r] = r < rows ? load_upto(p.cx + (row + r) * p.cx_stride + u, n) : Vec<A>{};
  transpose<A>(c);
  for (int64_t i = 0; i < n; i++) {
    const auto place = [&](int gate) { return sums + (gate * units + i) * kWidth<A>; };
    const auto sum = [&](int gate) { return load(place(gate)) + bias[gate * units + i]; };
    const Gates<Vec<A>> gate = activate<Math>(Gates<Vec<A>>{sum(0), sum(1), sum(2), sum(3)});
    c[i] = next_cell(gate, c[i]);
    h[i] = next_hidden<Math>(gate, c[i]);
    if (p.gates) {
      store(place(0), gate.i);
      store(place(1), gate.f);
      store(place(2), gate.g);
      store(place(3), gate.o);
    }
  }
  const auto write = [&](Vec<A>* block, T* to, int64_t stride) {
    transpose<A>(block);
    for (int64_t r = 0; r < rows; r++) store_upto(to + r * stride, block[r], n);
  };
  write(c, p.c + row * p.H + u, p.H);
  write(h, p.h + row * p.H + u, p.H);
  for (int gate = 0; gate < 4 && p.gates; gate++) {
    Vec<A> block[N];
    for (int i = 0; i < N; i++) block[i] = i < n ? load(sums + (gate * units + i) * kWidth<A>) : Vec<A>{};
    write(block, p.gates + row * 4 * p.H + gate * p.H + u, 4 * p.H);
  }
}

constexpr int kUnits = kRows / 4;  // of which scratch has room for the sums

template <class A>
struct Scratch {
  alignas(64) A panel[kDepth * kWidth<A>];     // (depth, rows)
  alignas(64) A sums[4 * kUnits * kWidth<A>];  // (4, units, rows)
};

// The same rows in the type of sums: as they are, or widened in `room`, which has kTileRows * kDepth.
template <int R, class A>
LSTMFUSED_INLINE Rows<A> widened(Rows<A> rows, A*) {
  return rows;
}
template <int R, class A, class T>
LSTMFUSED_INLINE Rows<A> widened(Rows<T> rows, A* room) {
  for (int r = 0; r < R; r++)
    for (int64_t k = 0; k < rows.depth; k += kLanes<A>)
      store_upto(room + r * kDepth + k, load_upto(rows.at + r * rows.stride + k, rows.depth - k),
                 rows.depth - k);
  return {room, kDepth, rows.depth};
}

template <class T>
static void forward_panel(const Forward<T>& p, Range rows, Range units) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  constexpr int64_t W = kWidth<A>;
  Scratch<A> scratch;
  // Input and state are one right factor of depth I + H, whose panels may hold the end of one and the
  // beginning of the other.
  for (int64_t k = 0; k < p.I + p.H; k += kDepth) {
    const int64_t end = k + kDepth < p.I + p.H ? k + kDepth : p.I + p.H;
    const Range of_input{k < p.I ? k : p.I, (end < p.I ? end : p.I) - (k < p.I ? k : p.I)};
    const Range of_state{k < p.I ? 0 : k - p.I, end - k - of_input.size};
    for (int64_t v = 0; v < rows.size; v += N) {
      const int64_t row = rows.begin + v, n = rows.size - v < N ? rows.size - v : N;
      transpose_into(scratch.panel + v, W, p.input + row * p.input_stride + of_input.begin, p.input_stride,
                     n, of_input.size);
      transpose_into(scratch.panel + of_input.size * W + v, W, p.hx + row * p.hx_stride + of_state.begin,
                     p.hx_stride, n, of_state.size);
    }
    const auto add_gate = [&](int gate, auto R, auto V, int64_t unit) {
      const int64_t row = gate * p.H + units.begin + unit;
      const Rows<T> input{p.weight_ih + row * p.I + of_input.begin, p.I, of_input.size};
      const Rows<T> state{p.weight_hh + row * p.H + of_state.begin, p.H, of_state.size};
      prefetch_next<R.value>(input);
      prefetch_next<R.value>(state);
      alignas(64) A room[kTileRows * kDepth];
      multiply_tile<R.value, V.value>(
          widened<R.value>(input, room), widened<R.value>(state, room + input.depth), scratch.panel, W,
          scratch.sums + (gate * units.size + unit) * W, W, k == 0, int64_t(V.value * N), false);
    };
    with_constant<kPanel>((rows.size + N - 1) / N, [&](auto V) {
      for (int gate = 0; gate < 4; gate++)
        each_tile(units.size, [&](auto R, int64_t unit) { add_gate(gate, R, V, unit); });
    });
  }
  A bias[4 * kUnits];
  for (int gate = 0; gate < 4; gate++)
    for (int64_t u = 0; u < units.size; u += N)
      store_upto(bias + gate * units.size + u, sum_bias(p, gate, units.begin + u, units.size - u),
                 units.size - u);
  for (int64_t v = 0; v < rows.size; v += N)
    for (int64_t u = 0; u < units.size; u += N)
      finish_block(p, rows.begin + v, rows.size - v < N ? rows.size - v : N, units.begin + u,
                   units.size - u < N ? units.size - u : N, scratch.sums + u * W + v, bias + u, units.size);
}

// ---------------------------------------------------------------------------------------------------
// Few rows: vectors run along K, and the weights are used as they lie, each read from far away once.

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDots = 16;  // sums in flight, of 32 registers
#else
constexpr int kDots = 8;  // of 16
#endif
constexpr int kDotRows = 128;  // of which scratch has room for the sums

// dots (R, 4) = or += left @ weight rows u of the four gates. With few rows K is unrolled, to have enough
// sums in flight; units follow one another, for so their weights are four long streams that the processor
// foresees.
template <int R, int Unroll, class T, class A = Accumulate<T>>
LSTMFUSED_INLINE void add_dots(Vec<A>* dots, Rows<A> left, const T* weight, int64_t H, int64_t u,
                               bool fresh) {
  constexpr int N = kLanes<A>;
  const int64_t K = left.depth;
  Vec<A> sums[Unroll][R * 4];
#pragma GCC unroll 8
  for (int i = 0; i < Unroll; i++)
#pragma GCC unroll 16
    for (int d = 0; d < R * 4; d++) sums[i][d] = Vec<A>{};
  const auto step = [&](Vec<A>* into, int64_t k, auto load_part) {
    Vec<A> x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r] = load_part(left.at + r * left.stride + k);
    for (int gate = 0; gate < 4; gate++) {
      const T* row = weight + (gate * H + u) * K + k;
      if (R == kDots / 4) __builtin_prefetch(row + K, 0, 2);  // of the next unit
      const Vec<A> w = load_part(row);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) into[r * 4 + gate] += x[r] * w;
    }
  };
  int64_t k = 0;
  for (; k + Unroll * N <= K; k += Unroll * N)
#pragma GCC unroll 8
    for (int i = 0; i < Unroll; i++) step(sums[i], k + i * N, [](auto* p) { return load(p); });
  for (; k + N <= K; k += N) step(sums[0], k, [](auto* p) { return load(p); });
  if (k < K) step(sums[0], k, [n = K - k](auto* p) { return load_some(p, n); });
#pragma GCC unroll 16
  for (int d = 0; d < R * 4; d++) {
#pragma GCC unroll 8
    for (int i = 1; i < Unroll; i++) sums[0][d] += sums[i][d];
    dots[d] = fresh ? sums[0][d] : dots[d] + sums[0][d];
  }
}

// sums (R, Units, 4) of the units from u on; rows of it are N units apart
template <int Units, int R, class T, class A = Accumulate<T>>
static __attribute__((noinline)) void dot_tile(const Forward<T>& p, int64_t row, int64_t u, A* sums) {
  constexpr int N = kLanes<A>, Dots = 4 * Units * R;
  const Rows<A> input{p.input + row * p.input_stride, p.input_stride, p.I};
  const Rows<A> state{p.hx + row * p.hx_stride, p.hx_stride, p.H};
  Vec<A> dots[(Dots + N - 1) / N * N];  // (Units, R, 4)
  for (int i = Dots; i < int(sizeof dots / sizeof *dots); i++) dots[i] = Vec<A>{};
  for (int i = 0; i < Units; i++) {
    add_dots<R, Units>(dots + i * R * 4, input, p.weight_ih, p.H, u + i, true);
    add_dots<R, Units>(dots + i * R * 4, state, p.weight_hh, p.H, u + i, false);
  }
  alignas(64) A sum[Dots + N];
  for (int i = 0; i < Dots; i += N) store(sum + i, sum_each<A>(dots + i));
  for (int i = 0; i < Units; i++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int gate = 0; gate < 4; gate++) sums[(r * N + i) * 4 + gate] = sum[(i * R + r) * 4 + gate];
}

template <class T>
static void forward_dot(const Forward<T>& p, int64_t u0, Range rows) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>, R = kDots / 4;
  const int64_t n = p.H - u0 < N ? p.H - u0 : N;
  alignas(64) A sums[kDotRows * 4 * N];                                       // (rows, N, 4)
  for (int64_t i = 0; i < rows.size * 4; i++) store(sums + i * N, Vec<A>{});  // lanes beyond n

  // Of a few units all rows, so that their weights are still near.
  for (int64_t u = 0; u < n; u += R) {
    const int64_t units = n - u < R ? n - u : R;
    const auto tiles = [&](auto tile, int64_t width, int64_t row, int64_t from) {
      for (; from + width <= units; from += width)
        tile(p, rows.begin + row, u0 + u + from, sums + (row * N + u + from) * 4);
      return from;
    };
    int64_t row = 0;
    for (; row + R <= rows.size; row += R) tiles(dot_tile<1, R, T>, 1, row, 0);
    switch (rows.size - row) {
      case 3: tiles(dot_tile<1, 3, T>, 1, row, 0); break;
      case 2: tiles(dot_tile<1, 2, T>, 1, row, tiles(dot_tile<R / 2, 2, T>, R / 2, row, 0)); break;
      case 1: tiles(dot_tile<1, 1, T>, 1, row, tiles(dot_tile<R, 1, T>, R, row, 0)); break;
    }
  }

  Vec<A> b[4];
  for (int gate = 0; gate < 4; gate++) b[gate] = sum_bias(p, gate, u0, n);
  for (int64_t row = 0; row < rows.size; row++) {
    Vec<A> s[4];
    for (int i = 0; i < 4; i++) s[i] = load(sums + (row * 4 + i) * N);
    deinterleave<A>(s);
    finish(p, rows.begin + row, u0, n, {s[0] + b[0], s[1] + b[1], s[2] + b[2], s[3] + b[3]});
  }
}

// ---------------------------------------------------------------------------------------------------

// A dot costs its length and, to sum up its lanes, some 40 more; a panel costs 0.9 of its depth, but for
// whole vectors of rows. Weights beyond kFarBytes come from memory, where the panel's pace is enough.
// Measured on Zen 4 from 2 -> 20 to 1024 -> 1024, one thread and two.
constexpr int64_t kFarBytes = 16 << 20;

template <class T>
static bool few_rows(const Forward<T>& p) {
  constexpr int64_t N = kLanes<Accumulate<T>>;
  const int64_t K = p.I + p.H, lanes = (p.B + N - 1) / N * N;
  const bool far = 4 * p.H * K * int64_t(sizeof(T)) > kFarBytes;
  return far ? 10 * p.B < 6 * lanes : 10 * p.B * (K + 40) < 9 * lanes * K;
}

// Cuts the batch into pieces of a panel's width and the units into pieces of kUnits; then, so that threads
// find enough to do, units as far down as kFewUnits, where transposing the rows begins to show, and then
// the batch.
static void cut(int64_t B, int64_t H, int64_t threads, int64_t& down, int64_t& across, int64_t lanes) {
  constexpr int64_t kFewUnits = 32;
  const int64_t vectors = (B + lanes - 1) / lanes, blocks = (H + lanes - 1) / lanes;
  down = (vectors + kPanel - 1) / kPanel;
  across = (H + kUnits - 1) / kUnits;
  const auto too_few = [&](int64_t wanted) {
    const int64_t tasks = down * across;
    return tasks < wanted || (tasks < 4 * threads && tasks % threads);
  };
  while (too_few(threads) && across < blocks && H / (across + 1) >= kFewUnits) across++;
  // Pieces of the batch alone are little work, of which a thread that wakes late should find some left.
  while (too_few(across == 1 ? 2 * threads : threads) && down < vectors) down++;
}

constexpr int64_t kFinishWork = 50;  // what finish costs, in multiply-adds of each of the four sums

template <class T>
static void forward(const Forward<T>& p, const Pool& pool) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  struct Context {
    const Forward<T>& p;
    int64_t across, down;  // pieces of the units, of the batch
  } context{p, (p.H + N - 1) / N, (p.B + kDotRows - 1) / kDotRows};
  const auto run = [&](auto task) {
    pool.run(context.across * context.down, p.B * (p.I + p.H + kFinishWork) * 4 * p.H, task, &context);
  };
  if (few_rows(p))
    return run([](const void* opaque, int64_t i) {
      const Context& t = *static_cast<const Context*>(opaque);
      forward_dot(t.p, i % t.across * N, piece(i / t.across, t.down, t.p.B, kDots / 4));
    });
  cut(p.B, p.H, pool.threads, context.down, context.across, N);
  run([](const void* opaque, int64_t i) {
    const Context& t = *static_cast<const Context*>(opaque);
    forward_panel(t.p, piece(i / t.across, t.down, t.p.B, N), piece(i % t.across, t.across, t.p.H, N));
  });
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
