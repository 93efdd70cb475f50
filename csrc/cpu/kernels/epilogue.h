// Where every step ends, of panels, dots and packed weights: sums become gates, c' and h'.
#pragma once
#include "../../cell_math.h"
#include "../../lstm.h"
#include "shuffle.h"
#include "vec_math.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// How the vectors of a block of states lie: each is a row's units, or a unit's rows.
enum class Along { kUnits, kRows };

struct States {
  int64_t row, rows, unit, units;  // rows from `row` on by units from `unit` on
};

// The sum of both biases of `gate`, for n units from u on.
template <class T, class A = Accumulate<T>>
LSTMFUSED_INLINE Vec<A> sum_bias(const Forward<T>& p, int gate, int64_t u, int64_t n) {
  Vec<A> sum{};
  if (p.bias_ih) sum += load_upto(p.bias_ih + gate * p.H + u, n);
  if (p.bias_hh) sum += load_upto(p.bias_hh + gate * p.H + u, n);
  return sum;
}

// The sums of vector i, zero for the rows that are reset.
template <Along along, class A>
static Gates<Vec<A>> without_resets(const Gates<Vec<A>>& sum, const RowMask* mask, int64_t rows,
                                    int64_t i) {
  A kept[kLanes<A>] = {};
  for (int64_t lane = 0; lane < kLanes<A>; lane++) {
    const int64_t row = along == Along::kRows ? lane : i;
    kept[lane] = row < rows && mask[row] != RowMask::kReset;
  }
  const auto select = [keep = load(kept) != 0](Vec<A> x) { return keep ? x : Vec<A>{}; };
  return {select(sum.i), select(sum.f), select(sum.g), select(sum.o)};
}

// Rows of units <-> the vectors of a block. Transposed in arrays that the compiler keeps in registers.
template <Along along, int Rows, class A, class LoadRow>
LSTMFUSED_INLINE void load_rows(Vec<A>* v, const States& s, LoadRow&& load_row) {
  if constexpr (along == Along::kRows) {
    Vec<A> block[Rows];
    for (int r = 0; r < Rows; r++) block[r] = r < s.rows ? load_row(r) : Vec<A>{};
    transpose<A>(block);
    for (int i = 0; i < Rows; i++) v[i] = block[i];
  } else {
    for (int64_t r = 0; r < s.rows; r++) v[r] = load_row(r);
  }
}
template <Along along, int Rows, class A, class StoreRow>
LSTMFUSED_INLINE void store_rows(const Vec<A>* v, const States& s, StoreRow&& store_row) {
  if constexpr (along == Along::kRows) {
    Vec<A> block[Rows];
    for (int i = 0; i < Rows; i++) block[i] = i < s.units ? v[i] : Vec<A>{};
    transpose<A>(block);
    for (int64_t r = 0; r < s.rows; r++) store_row(r, block[r]);
  } else {
    for (int64_t r = 0; r < s.rows; r++) store_row(r, v[r]);
  }
}

// sums(i) and bias(i) are the Gates before activation of vector i, which is row i of the block or unit i.
// At most Rows rows by a vector's length of units; along rows, Rows is a vector's length, too.
// kSequence: there are starting sums or a mask.
template <Along along, int Rows, bool kSequence, class T, class Sums, class Bias, class A = Accumulate<T>>
LSTMFUSED_INLINE void epilogue_of(const Step<T>& p, const States& s, Sums&& sums, Bias&& bias) {
  using Math = VectorMath<A>;
  constexpr bool kTransposed = along == Along::kRows;
  static_assert(!kTransposed || Rows == kLanes<A>, "a square block");
  const RowMask* const mask = kSequence && p.mask ? p.mask + s.row : nullptr;
  const A* const starting_sums = kSequence ? p.starting_sums : nullptr;
  T* const out_gates = p.gates;

  const int64_t vectors = kTransposed ? s.units : s.rows;
  const auto load = [&](Vec<A>* v, auto&& row) LSTMFUSED_INLINED { load_rows<along, Rows, A>(v, s, row); };
  const auto store = [&](const Vec<A>* v, auto&& row)
                         LSTMFUSED_INLINED { store_rows<along, Rows, A>(v, s, row); };
  const auto cell_at = [&](int64_t r) { return (s.row + r) * p.cx_stride + s.unit; };
  const auto out_at = [&](int64_t r) { return (s.row + r) * p.H + s.unit; };
  const auto gate_at = [&](int g, int64_t r) { return (4 * (s.row + r) + g) * p.H + s.unit; };

  Vec<A> c[Rows], h[Rows], gates[4][Rows];
  load(c, [&](int64_t r) LSTMFUSED_INLINED {
    if (mask && mask[r] == RowMask::kReset) return Vec<A>{};
    return load_cell(p.cx, cell_at(r), s.units, p.wide_cell);
  });
  const auto load_start = [&](int g, int64_t r) LSTMFUSED_INLINED {
    return load_upto(starting_sums + gate_at(g, r), s.units);
  };
  for (int g = 0; g < 4 && kTransposed && starting_sums; g++)
    load(gates[g], [&](int64_t r) LSTMFUSED_INLINED { return load_start(g, r); });
  const auto start = [&](int g, int64_t i)
                         LSTMFUSED_INLINED { return kTransposed ? gates[g][i] : load_start(g, i); };
  const auto activated = [&](int64_t i) LSTMFUSED_INLINED {
    Gates<Vec<A>> sum = sums(i);
    if (mask) sum = without_resets<along, A>(sum, mask, s.rows, i);
    const Gates<Vec<A>> b = bias(i);
    sum = {sum.i + b.i, sum.f + b.f, sum.g + b.g, sum.o + b.o};
    if (starting_sums)
      sum = {sum.i + start(0, i), sum.f + start(1, i), sum.g + start(2, i), sum.o + start(3, i)};
    return activate<Math>(sum);
  };

  // Two passes, so that more vectors are in flight at once.
  for (int64_t i = 0; i < vectors; i++) {
    const Gates<Vec<A>> gate = activated(i);
    c[i] = next_cell(gate, c[i]);
    h[i] = gate.o;
    if (!out_gates) continue;
    gates[0][i] = gate.i;
    gates[1][i] = gate.f;
    gates[2][i] = gate.g;
    gates[3][i] = gate.o;
  }
  for (int64_t i = 0; i < vectors; i++) h[i] = next_hidden<Math>(Gates<Vec<A>>{{}, {}, {}, h[i]}, c[i]);

  store(c, [&](int64_t r, Vec<A> row) LSTMFUSED_INLINED {
    if (mask && mask[r] == RowMask::kSkip) row = load_cell(p.cx, cell_at(r), s.units, p.wide_cell);
    store_cell(p.c, out_at(r), row, s.units, p.wide_cell);
  });
  store(h, [&](int64_t r, Vec<A> row) LSTMFUSED_INLINED {
    if (mask && mask[r] == RowMask::kSkip)
      row = load_upto(p.hx + (s.row + r) * p.hx_stride + s.unit, s.units);
    store_upto(p.h + out_at(r), row, s.units);
  });
  for (int g = 0; g < 4 && out_gates; g++)
    store(gates[g], [&](int64_t r, Vec<A> row)
                        LSTMFUSED_INLINED { store_upto(out_gates + gate_at(g, r), row, s.units); });
}

// Where only the sums are wanted. Out of line: it is short beside the products that make them.
template <Along along, int Rows, class T, class Sums, class Bias, class A = Accumulate<T>>
static __attribute__((noinline)) void store_sums(const Step<T>& p, const States& s, Sums& sums,
                                                 Bias& bias) {
  Vec<A> gates[4][Rows];
  const int64_t vectors = along == Along::kRows ? s.units : s.rows;
  for (int64_t i = 0; i < vectors; i++) {
    const Gates<Vec<A>> sum = sums(i), b = bias(i);
    gates[0][i] = sum.i + b.i;
    gates[1][i] = sum.f + b.f;
    gates[2][i] = sum.g + b.g;
    gates[3][i] = sum.o + b.o;
  }
  for (int g = 0; g < 4; g++)
    store_rows<along, Rows, A>(gates[g], s, [&](int64_t r, Vec<A> row) LSTMFUSED_INLINED {
      store_upto(p.sums + (4 * (s.row + r) + g) * p.H + s.unit, row, s.units);
    });
}

// A plain cell pays two branches for what only sequences have.
template <Along along, int Rows, class T, class Sums, class Bias>
LSTMFUSED_INLINE void epilogue(const Step<T>& p, const States& s, Sums&& sums, Bias&& bias) {
  if (p.sums)
    store_sums<along, Rows>(p, s, sums, bias);
  else if (p.starting_sums || p.mask)
    epilogue_of<along, Rows, true>(p, s, sums, bias);
  else
    epilogue_of<along, Rows, false>(p, s, sums, bias);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
