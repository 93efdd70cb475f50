// One LSTM step forward.
#pragma once
#include "../cell_math.h"
#include "kernels.h"
#include "tile.h"

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

// The end of the step for n vectors: from sums(i), Gates before activation, c[i] becomes c' and h[i] h';
// save(i, gates) gets the activated ones. In two passes, so that more of them are under way at once.
template <class A, class Sums, class Save>
LSTMFUSED_INLINE void finish(int64_t n, Vec<A>* c, Vec<A>* h, Sums&& sums, Save&& save) {
  using Math = VectorMath<A>;
  for (int64_t i = 0; i < n; i++) {
    const Gates<Vec<A>> gate = activate<Math>(sums(i));
    c[i] = next_cell(gate, c[i]);
    h[i] = gate.o;
    save(i, gate);
  }
  for (int64_t i = 0; i < n; i++) h[i] = next_hidden<Math>(Gates<Vec<A>>{{}, {}, {}, h[i]}, c[i]);
}

// ---------------------------------------------------------------------------------------------------
// Many rows: vectors run along the batch. The input and the state of a few vectors of rows are transposed
// into a panel, and the weights pass over it as they lie.

// The end of the step for up to `lanes` rows by n units: sums and bias (4, units, width), where `sums` is
// the first of its rows and units, become c', h' and the gates.
template <class T, class A = Accumulate<T>>
static void finish_block(const Forward<T>& p, int64_t row, int64_t rows, int64_t u, int64_t n, A* sums,
                         const A* bias, int64_t units) {
  constexpr int N = kLanes<A>;
  const auto place = [&](int gate, int64_t i) { return sums + (gate * units + i) * kWidth<A>; };
  const auto sum = [&](int gate, int64_t i) { return load(place(gate, i)) + bias[gate * units + i]; };
  const auto save = [&](int64_t i, const Gates<Vec<A>>& gate) {
    if (!p.gates) return;
    store(place(0, i), gate.i);
    store(place(1, i), gate.f);
    store(place(2, i), gate.g);
    store(place(3, i), gate.o);
  };
  Vec<A> c[N], h[N];
  for (int r = 0; r < N; r++)
    c[r] = r < rows ? load_cell(p.cx, (row + r) * p.cx_stride + u, n, p.wide_cell) : Vec<A>{};
  transpose<A>(c);
  finish<A>(
      n, c, h, [&](int64_t i) { return Gates<Vec<A>>{sum(0, i), sum(1, i), sum(2, i), sum(3, i)}; }, save);
  const auto write = [&](Vec<A>* block, T* to, int64_t stride) {
    transpose<A>(block);
    for (int64_t r = 0; r < rows; r++) store_upto(to + r * stride, block[r], n);
  };
  transpose<A>(c);
  for (int64_t r = 0; r < rows; r++) store_cell(p.c, (row + r) * p.H + u, c[r], n, p.wide_cell);
  write(h, p.h + row * p.H + u, p.H);
  for (int gate = 0; gate < 4 && p.gates; gate++) {
    Vec<A> block[N];
    for (int i = 0; i < N; i++) block[i] = i < n ? load(place(gate, i)) : Vec<A>{};
    write(block, p.gates + row * 4 * p.H + gate * p.H + u, 4 * p.H);
  }
}

constexpr int kUnits = kRows / 4;  // of which scratch has room for the sums
template <class F>
constexpr int kPanelSize = (128 << 10) / sizeof(F);

template <class T>
struct Scratch {
  using A = Accumulate<T>;
  alignas(64) Factor<T> panel[kPanelSize<Factor<T>>];  // (depth, rows)
  alignas(64) A sums[4 * kUnits * kWidth<A>];          // (4, units, rows)
};

// Rows of numbers as rows of factors: as they lie, or copied to `room` of kTileRows * kDepth.
template <int R, class T>
LSTMFUSED_INLINE Rows<T> as_factors(Rows<T> rows, T*) {
  return rows;
}
template <int R, class T, class F>
LSTMFUSED_INLINE Rows<F> as_factors(Rows<T> rows, F* room) {
  const int64_t depth = factors<T>(rows.depth);
  if constexpr (kSpan<T> > 1)
    if (rows.depth % kSpan<T> == 0) return {rows.at, rows.stride, depth};
  for (int r = 0; r < R; r++)
    for (int64_t k = 0; k < depth; k += kLanes<F>)
      store(room + r * kDepth + k,
            load_factors(rows.at + r * rows.stride + k * kSpan<T>, rows.depth - k * kSpan<T>));
  if constexpr (kSpan<T> > 1)
    return {reinterpret_cast<const T*>(room), kDepth * kSpan<T>, depth};
  else
    return {room, kDepth, depth};
}

template <class T>
static void forward_panel(const Forward<T>& p, Range rows, Range units) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  constexpr int64_t W = kWidth<A>;
  Scratch<T> scratch;
  // Input and state are one right factor, of which a panel, and a block of one, may hold the end of one and
  // the beginning of the other.
  struct Parts {
    Range input, state;
  };
  const int64_t depth = factors<T>(p.I), K = depth + factors<T>(p.H);
  const auto parts = [&](int64_t begin, int64_t end) -> Parts {  // factors -> numbers
    const auto within = [](int64_t x, int64_t size) { return x < 0 ? 0 : x < size ? x : size; };
    const auto part = [&](int64_t offset, int64_t size) -> Range {
      const int64_t first = within((begin - offset) * kSpan<T>, size);
      return {first, within((end - offset) * kSpan<T>, size) - first};
    };
    return {part(0, p.I), part(depth, p.H)};
  };
  with_constant<kPanel>((rows.size + N - 1) / N, [&](auto V) {
    constexpr int64_t w = V.value * N;
    // A panel fits the first-level cache; one that leaves the weights little to do may be deeper, so that
    // these are read in long pieces.
    const int64_t deep = V.value <= 2 ? kPanelSize<Factor<T>> / w : kDepth;
    for (int64_t begin = 0; begin < K; begin += deep) {
      const int64_t end = begin + deep < K ? begin + deep : K;
      const Parts of = parts(begin, end);
      for (int64_t v = 0; v < rows.size; v += N) {
        const int64_t row = rows.begin + v, n = rows.size - v < N ? rows.size - v : N;
        transpose_into(scratch.panel + v, w, p.input + row * p.input_stride + of.input.begin,
                       p.input_stride, n, of.input.size);
        transpose_into(scratch.panel + factors<T>(of.input.size) * w + v, w,
                       p.hx + row * p.hx_stride + of.state.begin, p.hx_stride, n, of.state.size);
      }
      for (int gate = 0; gate < 4; gate++)
        each_tile<V.value>(units.size, [&](auto R, int64_t unit) {
          for (int64_t k = begin; k < end; k += kDepth) {
            const Parts of = parts(k, k + kDepth < end ? k + kDepth : end);
            const int64_t row = gate * p.H + units.begin + unit;
            const Rows<T> input{p.weight_ih + row * p.I + of.input.begin, p.I, of.input.size};
            const Rows<T> state{p.weight_hh + row * p.H + of.state.begin, p.H, of.state.size};
            alignas(64) Factor<T> room[2][kTileRows * kDepth];
            const Right<Factor<T>> panel{scratch.panel + (k - begin) * w, w, w};
            const Sums<A> sums{scratch.sums + (gate * units.size + unit) * W, W, w, k == 0, false, false};
            multiply_tile<R.value, V.value, false>(panel, sums, as_factors<R.value>(input, room[0]),
                                                   as_factors<R.value>(state, room[1]));
          }
        });
    }
  });
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
constexpr int kDots = 12;  // of 16
#endif
constexpr int kDotRows = 128;  // of which scratch has room for the sums

constexpr int64_t kFarWeights = 16 << 20;  // of weights, which then come from memory at every call

template <class T>
static bool far_weights(const Forward<T>& p) {
  return 4 * p.H * (p.I + p.H) * int64_t(sizeof(T)) > kFarWeights;
}

// s (Unroll, R, 4) += R rows of x times four rows of weights; each vector of their depth is asked for by
// fetch(k) first.
template <int Unroll, int R, class T, class A, class Fetch>
LSTMFUSED_INLINE void add_dots(Vec<A> (&s)[Unroll][R * 4], Rows<T> x, const T* weight, int64_t gate_stride,
                               Fetch&& fetch) {
  const auto step = [&](Vec<A>* into, int64_t k, auto load_part) LSTMFUSED_INLINED {
    Vec<Factor<T>> row[R];
    each_sum<1, R>([&](int, int r) LSTMFUSED_INLINED { row[r] = load_part(x.at + r * x.stride + k); });
    fetch(k);
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; gate++) {
      Vec<Factor<T>> w = load_part(weight + gate * gate_stride + k);
      if constexpr (R > 1) keep(w);
      each_sum<1, R>([&](int, int r) LSTMFUSED_INLINED { multiply_add(into[r * 4 + gate], row[r], w); });
    }
  };
  constexpr int64_t M = kLanes<A> * kSpan<T>;
  const int64_t K = x.depth;
  int64_t k = 0;
  for (; k + Unroll * M <= K; k += Unroll * M)
#pragma GCC unroll 8
    for (int j = 0; j < Unroll; j++) step(s[j], k + j * M, [](auto* p) { return load_factors(p); });
  for (; k + M <= K; k += M) step(s[0], k, [](auto* p) { return load_factors(p); });
  if (k < K) step(s[0], k, [n = K - k](auto* p) { return load_factors(p, n); });
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

// sums (R, Units, 4) of the units from u on. With few rows K is unrolled, to have enough sums in flight;
// units follow one another, for so their weights are four long streams. The processor foresees these up to
// the end of a page; of `Far` weights the next one is fetched, too.
template <int Units, int R, bool Far, class T, class A = Accumulate<T>>
static __attribute__((noinline)) void dot_tile(const Forward<T>& p, int64_t row, int64_t u, A* sums) {
  constexpr int Unroll = Units, Dots = 4 * Units * R, kPage = 4096 / sizeof(T);
  Vec<A> dots[kWholeDots<Dots, A>];  // (Units, R, 4)
  for (int i = Dots; i < int(sizeof dots / sizeof *dots); i++) dots[i] = Vec<A>{};
  each_sum<1, Units>([&](int, int i) LSTMFUSED_INLINED {
    Vec<A> s[Unroll][R * 4];
    each_sum<Unroll, R * 4>([&](int j, int d) LSTMFUSED_INLINED { s[j][d] = Vec<A>{}; });
    const auto add = [&](Rows<T> x, const T* weights) LSTMFUSED_INLINED {
      const T* weight = weights + (u + i) * x.depth;
      add_dots<Unroll, R, T, A>(s, x, weight, p.H * x.depth, [&](int64_t k) LSTMFUSED_INLINED {
        for (int gate = 0; gate < 4 && Far; gate++)
          __builtin_prefetch(weight + gate * p.H * x.depth + k + kPage, 0, 2);
      });
    };
    add({p.input + row * p.input_stride, p.input_stride, p.I}, p.weight_ih);
    add({p.hx + row * p.hx_stride, p.hx_stride, p.H}, p.weight_hh);
    each_sum<Unroll - 1, R * 4>([&](int j, int d) LSTMFUSED_INLINED { s[0][d] += s[j + 1][d]; });
    each_sum<1, R * 4>([&](int, int d) LSTMFUSED_INLINED { dots[i * R * 4 + d] = s[0][d]; });
  });
  sum_dots<Units, R>(dots, sums);
}

// Far weights meet R rows at a time of an input too long for the first-level cache in pieces along K, of
// which a row's is 2 KiB. A few units pass over a piece before the next one, their sums kept meanwhile.
template <class T>
struct DotPiece {
  Rows<T> x;
  const T* weight;  // of the first gate of one unit
  const T* next;    // where to go on: with the next unit ...
  const T* later;   // ... and, from memory, in the next piece
  int64_t gate_stride, later_stride;
};

template <int R, bool Later, class T, class A = Accumulate<T>>
static __attribute__((noinline)) void dot_piece(const DotPiece<T>& p, Vec<A>* dots) {
  constexpr int64_t kNear = 1024 / sizeof(T);
  Vec<A> s[1][R * 4];
  each_sum<1, R * 4>([&](int, int d) LSTMFUSED_INLINED { s[0][d] = dots[d]; });
  add_dots<1, R, T, A>(s, p.x, p.weight, p.gate_stride, [&](int64_t k) LSTMFUSED_INLINED {
    const int64_t near = k + kNear;
    const T* next = near < p.x.depth ? p.weight + near : p.next + (near - p.x.depth);
    for (int gate = 0; gate < 4; gate++) __builtin_prefetch(next + gate * p.gate_stride, 0, 3);
    for (int gate = 0; gate < 4 && Later; gate++)
      __builtin_prefetch(p.later + gate * p.later_stride + k, 0, 2);
  });
  each_sum<1, R * 4>([&](int, int d) LSTMFUSED_INLINED { dots[d] = s[0][d]; });
}

constexpr int kFarUnits = 8, kFarRows = 4;  // rows in multiples of R
constexpr int64_t kFirstCache = 32 << 10;   // bytes

// As dot_tile, for `units` units and `rows` times R rows.
template <class T, class A = Accumulate<T>>
static void dot_far(const Forward<T>& p, int64_t row, int64_t rows, int64_t u, int64_t units, A* sums) {
  constexpr int N = kLanes<A>, R = kDots / 4, Dots = 4 * R;
  constexpr int64_t kPiece = 2048 / sizeof(T);
  Vec<A> dots[kFarRows][kFarUnits][kWholeDots<Dots, A>];
  for (int64_t r = 0; r < rows; r++)
    for (auto& unit : dots[r])
      for (auto& dot : unit) dot = Vec<A>{};
  const auto add = [&](Rows<T> x, const T* weights, const T* after, int64_t after_depth) {
    const int64_t K = x.depth;
    for (int64_t k = 0; k < K; k += kPiece) {
      const int64_t depth = K - k < kPiece ? K - k : kPiece;
      const bool last = k + depth == K;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < units; i++) {
          const T* weight = weights + (u + i) * K + k;
          const DotPiece<T> piece{x.from(r * R, k, depth),
                                  weight,
                                  i + 1 < units ? weight + K : weights + u * K + k,
                                  last ? after + i * after_depth : weight + depth,
                                  p.H * K,
                                  p.H * (last ? after_depth : K)};
          (r ? dot_piece<R, false, T> : dot_piece<R, true, T>)(piece, dots[r][i]);
        }
    }
  };
  add({p.input + row * p.input_stride, p.input_stride, p.I}, p.weight_ih, p.weight_hh + u * p.H, p.H);
  add({p.hx + row * p.hx_stride, p.hx_stride, p.H}, p.weight_hh, p.weight_ih + (u + units) * p.I, p.I);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < units; i++) sum_dots<1, R>(dots[r][i], sums + (r * R * N + i) * 4);
}

template <bool Far, class T>
static void forward_dot(const Forward<T>& p, Range some, Range rows) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>, R = kDots / 4;
  const int64_t u0 = some.begin, n = some.size;
  alignas(64) A sums[kDotRows * 4 * N];                                       // (rows, N, 4)
  for (int64_t i = 0; i < rows.size * 4; i++) store(sums + i * N, Vec<A>{});  // lanes beyond n

  // Units of which all rows are done before the next ones: of far weights few, which are near meanwhile.
  const bool pieces = Far && R * (p.I + p.H) * int64_t(sizeof(T)) >= kFirstCache;
  const int64_t group = !Far ? N : pieces ? kFarUnits : rows.size > R ? 1 : R;
  for (int64_t u = 0; u < n; u += group) {
    const int64_t units = n - u < group ? n - u : group;
    const auto place = [&](int64_t row, int64_t from) { return sums + (row * N + u + from) * 4; };
    const auto tiles = [&](auto tile, int64_t width, int64_t row, int64_t from) {
      for (; from + width <= units; from += width)
        tile(p, rows.begin + row, u0 + u + from, place(row, from));
      return from;
    };
    // Unrolling is another order of additions, which a row would owe to those beside it.
    const auto unrolled = [&](auto tile, int64_t width, int64_t row) {
      return p.batch_invariant ? 0 : tiles(tile, width, row, 0);
    };
    int64_t row = 0;
    if constexpr (Far)
      for (int64_t some; pieces && row + R <= rows.size; row += some * R) {
        const int64_t left = (rows.size - row) / R;
        some = left < kFarRows ? left : kFarRows;
        dot_far(p, rows.begin + row, some, u0 + u, units, place(row, 0));
      }
    for (; row + R <= rows.size; row += R) tiles(dot_tile<1, R, Far, T>, 1, row, 0);
    switch (rows.size - row) {
      case 3: tiles(dot_tile<1, 3, Far, T>, 1, row, 0); break;
      case 2:
        tiles(dot_tile<1, 2, Far, T>, 1, row, unrolled(dot_tile<R / 2, 2, Far, T>, R / 2, row));
        break;
      case 1: tiles(dot_tile<1, 1, Far, T>, 1, row, unrolled(dot_tile<R, 1, Far, T>, R, row)); break;
    }
  }

  Vec<A> b[4];
  for (int gate = 0; gate < 4; gate++) b[gate] = sum_bias(p, gate, u0, n);
  for (int64_t begin = 0; begin < rows.size; begin += N) {
    const int64_t row = rows.begin + begin, count = rows.size - begin < N ? rows.size - begin : N;
    Vec<A> c[N], h[N];
    for (int64_t r = 0; r < count; r++)
      c[r] = load_cell(p.cx, (row + r) * p.cx_stride + u0, n, p.wide_cell);
    const auto sum = [&](int64_t r) {
      Vec<A> s[4];
      for (int i = 0; i < 4; i++) s[i] = load(sums + ((begin + r) * 4 + i) * N);
      deinterleave<A>(s);
      return Gates<Vec<A>>{s[0] + b[0], s[1] + b[1], s[2] + b[2], s[3] + b[3]};
    };
    const auto save = [&](int64_t r, const Gates<Vec<A>>& gate) {
      if (!p.gates) return;
      T* gates = p.gates + (row + r) * 4 * p.H + u0;
      store_upto(gates, gate.i, n);
      store_upto(gates + p.H, gate.f, n);
      store_upto(gates + 2 * p.H, gate.g, n);
      store_upto(gates + 3 * p.H, gate.o, n);
    };
    finish<A>(count, c, h, sum, save);
    for (int64_t r = 0; r < count; r++) {
      store_cell(p.c, (row + r) * p.H + u0, c[r], n, p.wide_cell);
      store_upto(p.h + (row + r) * p.H + u0, h[r], n);
    }
  }
}

// ---------------------------------------------------------------------------------------------------

// What a unit of a row costs, as a dot or in a panel of several vectors of rows (wide) or of one (narrow),
// in hundredths of a multiply-add: so much for each of its factors, and so much beside. Measured on Zen 4
// in float32, from 2 -> 20 to 1024 -> 1024; on aarch64 not.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kDotCost = 105, kDotMore = 6900, kPanelMore = 2800, kWideCost = 104, kNarrowCost = 133;
#else
constexpr int64_t kDotCost = 119, kDotMore = 950, kPanelMore = 0, kWideCost = 100, kNarrowCost = 124;
#endif

// The rows at the end of the batch that are dots: all of them, those that fill no vector, or none. A dot
// takes whole vectors along the depth, and a quarter more where a weight's rows begin anywhere in a cache
// line; a panel takes whole vectors of rows. Far weights come at a pace that wider panels keep. A
// batch-invariant step chooses whatever the batch: dots, unless they are so short that to sum up their
// lanes is half as much again.
template <class T>
static int64_t dot_rows(const Forward<T>& p) {
  constexpr int64_t N = kLanes<Accumulate<T>>;
  const auto whole = [](int64_t n) { return (n + N - 1) / N * N; };
  const int64_t I = factors<T>(p.I), H = factors<T>(p.H), K = I + H;
  const int64_t depth = whole(I) + whole(H), length = depth == K ? depth : depth * 5 / 4;
  const bool wide = p.B > N;
  const int64_t dot = kDotCost * length + kDotMore, cost = (wide ? kWideCost : kNarrowCost) * K,
                panel = cost > 100 * K + kPanelMore ? cost : 100 * K + kPanelMore;
  const auto few = [&](int64_t rows) {
    if (p.batch_invariant) return K > 80;
    if (wide && far_weights(p)) return 10 * rows < 6 * whole(rows);
    return rows * dot < whole(rows) * panel;
  };
  return few(p.B) ? p.B : few(p.B % N) ? p.B % N : 0;
}

// Cuts the batch into pieces of a panel's width and the units into pieces of kUnits; then, so that threads
// find enough to do, units as far down as kFewUnits, where transposing the rows begins to show, and then
// the batch. Where this is one vector, units are cut further.
static void cut(int64_t B, int64_t H, int64_t threads, int64_t& down, int64_t& across, int64_t lanes) {
  constexpr int64_t kFewUnits = 32;
  const int64_t vectors = (B + lanes - 1) / lanes, blocks = (H + lanes - 1) / lanes;
  down = (vectors + kPanel - 1) / kPanel;
  across = (H + kUnits - 1) / kUnits;
  const auto too_few = [&](int64_t wanted) {
    const int64_t tasks = down * across;
    return tasks < wanted || (tasks < 4 * threads && tasks % threads);
  };
  const int64_t fewest = vectors > 1 ? kFewUnits : kFewUnits / 2;
  while (too_few(threads) && across < blocks && H / (across + 1) >= fewest) across++;
  // Pieces of the batch alone are little work, of which a thread that wakes late should find some left.
  while (too_few(across == 1 && threads > 1 ? 2 * threads : threads) && down < vectors) down++;
}

constexpr int64_t kFinishWork = 50;  // what finish costs, in multiply-adds of each of the four sums
constexpr int64_t kWeightWork = 2;   // what fetching a weight costs, in multiply-adds

template <class T>
static void forward(const Forward<T>& p, const Pool& pool) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  const int64_t few = dot_rows(p), depth = factors<T>(p.I) + factors<T>(p.H) + kFinishWork;
  struct Grid {
    int64_t rows, across, down;  // rows, pieces of the units, pieces of the rows
    int64_t tasks() const { return across * down; }
  };
  struct alignas(64) Context {
    Forward<T> p;
    Grid panels, dots;
  } context{p, {p.B - few, 0, 0}, {few, (p.H + N - 1) / N, (few + kDotRows - 1) / kDotRows}};
  Grid& panels = context.panels;
  if (panels.rows) cut(panels.rows, p.H, pool.threads, panels.down, panels.across, N);
  // Of far weights some are used for all rows before the next ones are fetched: dots beside panels are one
  // more piece of the rows.
  if (panels.rows && few && far_weights(p)) {
    panels.down++;
    context.dots.down = 0;
  }
  pool.run(
      panels.tasks() + context.dots.tasks(), (p.B + kWeightWork) * depth * 4 * p.H,
      [](const void* opaque, int64_t i) {
        const auto& [p, panels, dots] = *static_cast<const Context*>(opaque);
        const bool far = far_weights(p);
        const auto dot = far ? forward_dot<true, T> : forward_dot<false, T>;
        if (i < panels.tasks()) {
          const int64_t down = far ? i % panels.down : i / panels.across,
                        across = far ? i / panels.down : i % panels.across,
                        pieces = panels.down - (dots.rows && !dots.down);
          // Equal pieces of the units, but two threads should not write to the same lines where rows of h
          // and c are whole ones; and whole vectors for dots, whose bits must not depend on the cut.
          const Range units = piece(across, panels.across, p.H, far || p.H % N == 0 ? N : 1);
          if (down < pieces) return forward_panel(p, piece(down, pieces, panels.rows, N), units);
          for (int64_t u = 0; u < units.size; u += N)
            dot(p, {units.begin + u, units.size - u < N ? units.size - u : N}, {panels.rows, dots.rows});
          return;
        }
        i -= panels.tasks();
        const Range rows = piece(i / dots.across, dots.down, dots.rows, kDots / 4);
        const int64_t u = i % dots.across * N;
        dot(p, {u, p.H - u < N ? p.H - u : N}, {panels.rows + rows.begin, rows.size});
      },
      &context);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
