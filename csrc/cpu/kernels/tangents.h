// The tangents of one LSTM step and of its backward, unit by unit: see Tangents.
#pragma once
#include "../../cell_math.h"
#include "kernels.h"
#include "tuning.h"
#include "vec_math.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

template <class T>
static void tangents_of_row(const Tangents<T>& p, int64_t row) {
  using Math = VectorMath<T>;
  using F = Vec<T>;
  for (int64_t u = 0; u < p.H; u += kLanes<T>) {
    const int64_t at = row * p.H + u, n = p.H - u;
    const auto load = [&](const T* from) LSTMFUSED_INLINED { return from ? load_upto(from + at, n) : F{}; };
    const auto load_gates = [&](const T* from) LSTMFUSED_INLINED {
      if (!from) return Gates<F>{};
      from += row * 4 * p.H + u;
      return Gates<F>{load_upto(from, n), load_upto(from + p.H, n), load_upto(from + 2 * p.H, n),
                      load_upto(from + 3 * p.H, n)};
    };
    const auto store_gates = [&](T* to, F i, F f, F g, F o) LSTMFUSED_INLINED {
      to += row * 4 * p.H + u;
      store_upto(to, i, n);
      store_upto(to + p.H, f, n);
      store_upto(to + 2 * p.H, g, n);
      store_upto(to + 3 * p.H, o, n);
    };
    const Gates<Dual<F>> gate = dual_gates(load_gates(p.gates), load_gates(p.sums_tangent));
    const Dual<F> c{load(p.cx), load(p.cx_tangent)}, c_next = next_cell(gate, c);
    store_upto(p.c_tangent + at, c_next.tangent, n);
    store_upto(p.h_tangent + at, next_hidden<DualMath<Math>>(gate, c_next).tangent, n);
    if (!p.grad_gates) continue;
    const Dual<F> grad_h{load(p.grad_h), load(p.grad_h_tangent)};
    Dual<F> grad_c{load(p.grad_c), load(p.grad_c_tangent)};
    const Gates<Dual<F>> grad = step_backward<DualMath<Math>>(gate, c, grad_h, grad_c);
    store_gates(p.grad_gates, grad.i.value, grad.f.value, grad.g.value, grad.o.value);
    store_gates(p.grad_gates_tangent, grad.i.tangent, grad.f.tangent, grad.g.tangent, grad.o.tangent);
    store_upto(p.grad_cx_tangent + at, grad_c.tangent, n);
  }
}

template <class T>
static void tangents(const Tangents<T>& p, const Pool& pool) {
  pool.run(
      p.B, p.B * p.H * kTangentWork,
      [](const void* context, int64_t row) {
        tangents_of_row(*static_cast<const Tangents<T>*>(context), row);
      },
      &p);
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
