// One LSTM step backward: gate gradients, then the products with them.
#pragma once
#include "../../cell_math.h"
#include "kernels.h"
#include "packed.h"
#include "product.h"
#include "vec_math.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

// The gradient of h, of a row and the units from u on.
template <class T, class A = Accumulate<T>>
LSTMFUSED_INLINE Vec<A> grad_of_h(const Backward<T>& p, int64_t row, int64_t u) {
  const int64_t n = p.H - u;
  Vec<A> grad_h = p.grad_h ? load_upto(p.grad_h + row * p.grad_h_stride + u, n) : Vec<A>{};
  if (p.next_grad_h) grad_h += load_upto(p.next_grad_h + row * p.H + u, n);
  return grad_h;
}

// A part of the batch: rows from `begin` on, whose gate gradients begin at grad_gates.
//
// Gate gradients of some of its rows, which may overwrite their gates, and the gradient of cx.
template <class T>
static void gate_gradients(const Backward<T>& p, Range part, Range rows) {
  using A = Accumulate<T>;
  using Math = VectorMath<A>;
  constexpr int N = kLanes<A>;
  const auto states = [&](int64_t r, int64_t u) LSTMFUSED_INLINED {
    const int64_t row = part.begin + r, n = p.H - u;
    const RowMask mask = p.mask ? p.mask[row] : RowMask::kStep;
    const T* gates = p.gates + row * 4 * p.H + u;
    const Gates<Vec<A>> gate{load_upto(gates, n), load_upto(gates + p.H, n), load_upto(gates + 2 * p.H, n),
                             load_upto(gates + 3 * p.H, n)};
    const Vec<A> c =
        mask == RowMask::kReset ? Vec<A>{} : load_cell(p.cx, row * p.cx_stride + u, n, p.wide_cell);
    const Vec<A> grad_h = grad_of_h(p, row, u);
    Vec<A> grad_c = p.grad_c ? load_cell(p.grad_c, row * p.grad_c_stride + u, n, p.wide_cell) : Vec<A>{};
    if (p.next_grad_c) grad_c += load_cell(p.next_grad_c, row * p.H + u, n, p.wide_cell);
    const Vec<A> skipped_grad_c = grad_c;
    Gates<Vec<A>> grad = step_backward<Math>(gate, c, grad_h, grad_c);
    if (mask == RowMask::kReset) grad_c = Vec<A>{};
    if (mask == RowMask::kSkip) {
      grad_c = skipped_grad_c;
      grad = Gates<Vec<A>>{};
    }
    if (p.grad_cx) store_cell(p.grad_cx, row * p.H + u, grad_c, n, p.wide_cell);
    A* out = p.grad_gates + r * p.grad_gates_stride + u;
    store_upto(out, grad.i, n);
    store_upto(out + p.H, grad.f, n);
    store_upto(out + 2 * p.H, grad.g, n);
    store_upto(out + 3 * p.H, grad.o, n);
  };
  // Of few units several rows at a time: in place, a load that overlaps stores just before it would wait
  // for them (no store forwarding).
  const int64_t count = p.H < kGateGradientStates ? kGateGradientStates / p.H : 1,
                end = rows.begin + rows.size;
  for (int64_t begin = rows.begin; begin < end; begin += count)
    for (int64_t u = 0; u < p.H; u += N)
      for (int64_t r = begin; r < end && r < begin + count; r++) states(r, u);
}

// Whether a part adds to the gradients of weights and biases that others have begun.
template <class T>
static bool adds(const Backward<T>& p, Range part) {
  return part.begin || p.accumulate;
}

// The gradient of both biases (4H) = or += the sum of grad_gates over the rows of a part, for one panel's
// width of gates; like a product's sums, anew for every kKBlock rows.
template <class T>
static void bias_gradient(const Backward<T>& p, Range part, int64_t column) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  const int64_t n = 4 * p.H - column;
  T* const outs[] = {p.grad_bias_ih, p.grad_bias_hh};
  const T* before = outs[0] ? outs[0] : outs[1];
  for (int v = 0; v < kPanel && v * N < n; v++) {
    const int64_t at = column + v * N;
    Vec<A> total = adds(p, part) ? load_upto(before + at, n - v * N) : Vec<A>{};
    for (int64_t begin = 0; begin < part.size; begin += kKBlock) {
      const int64_t end = begin + kKBlock < part.size ? begin + kKBlock : part.size;
      Vec<A> sum{};
      for (int64_t row = begin; row < end; row++)
        sum += load_upto(p.grad_gates + row * p.grad_gates_stride + at, n - v * N);
      total += sum;
    }
    for (T* out : outs)
      if (out) store_upto(out + at, total, n - v * N);
  }
}

// grad_hx of the rows that are reset, zero, and of those that are skipped, grad_h.
template <class T>
static void masked_state_gradients(const Backward<T>& p, Range part) {
  using A = Accumulate<T>;
  for (int64_t row = part.begin; row < part.begin + part.size; row++) {
    if (p.mask[row] == RowMask::kStep) continue;
    for (int64_t u = 0; u < p.H; u += kLanes<A>)
      store_upto(p.grad_hx + row * p.H + u, p.mask[row] == RowMask::kSkip ? grad_of_h(p, row, u) : Vec<A>{},
                 p.H - u);
  }
}

// All products with the gate gradients, and the biases' sums: independent of one another, so one list of
// tasks, in which no thread waits for another's product.
template <class T>
struct alignas(64) GradientTasks {
  using A = Accumulate<T>;
  static constexpr int64_t W = kWidth<A>;

  const Backward<T>& p;
  Range part;
  Product<T, Rows<A>> of_rows[2];
  Product<T, Columns<A>> of_weights[2];
  int64_t bias_tasks;

  GradientTasks(const Backward<T>& given, Range of_batch, const Pool& pool)
      : p(given),
        part(of_batch),
        of_rows{of_rows_product(p.weight_ih, p.grad_input, p.I),
                of_rows_product(p.weight_hh, p.grad_hx, p.H)},
        of_weights{of_weight_product(p.input, p.input_stride, p.grad_weight_ih, p.I),
                   of_weight_product(p.hx, p.hx_stride, p.grad_weight_hh, p.H)},
        bias_tasks(p.grad_bias_ih || p.grad_bias_hh ? (4 * p.H + W - 1) / W : 0) {
    for (auto& product : of_rows) product.cut(pool);
    for (auto& product : of_weights) product.cut(pool);
  }

  int64_t tasks() const {
    return of_rows[0].tasks() + of_rows[1].tasks() + of_weights[0].tasks() + of_weights[1].tasks() +
           bias_tasks;
  }
  int64_t work() const {
    return of_rows[0].work() + of_rows[1].work() + of_weights[0].work() + of_weights[1].work() +
           (bias_tasks ? part.size * 4 * p.H : 0);
  }

  void run(int64_t i) const {
    if (!run_of(of_rows, i) && !run_of(of_weights, i)) bias_gradient(p, part, i * W);
  }

 private:
  // (rows, N) = grad_gates @ weight
  Product<T, Rows<A>> of_rows_product(const T* weight, T* out, int64_t N) const {
    T* const rows = out && weight ? out + part.begin * N : nullptr;
    return {{p.grad_gates, p.grad_gates_stride, 4 * p.H}, weight, N, rows, part.size, N, true};
  }

  // (4H, N) = or += grad_gates^T @ from; transposed, the same with the factors exchanged.
  Product<T, Columns<A>> of_weight_product(const T* from, int64_t stride, T* out, int64_t N) const {
    const T* const rows = out ? from + part.begin * stride : nullptr;
    if constexpr (sizeof(T) == sizeof(A))
      if (p.transposed)  // (N, 4H) = from^T @ grad_gates
        return {
            {rows, stride, part.size}, p.grad_gates, p.grad_gates_stride, out, N, 4 * p.H, !adds(p, part)};
    return {{p.grad_gates, p.grad_gates_stride, part.size}, rows, stride, out, 4 * p.H, N, !adds(p, part)};
  }

  // Whether i, of which the products' tasks are taken, was one of them.
  template <class Products>
  static bool run_of(const Products& products, int64_t& i) {
    for (const auto& product : products) {
      if (i < product.tasks()) {
        product.run(i);
        return true;
      }
      i -= product.tasks();
    }
    return false;
  }
};

// grad_hx (rows, H) = grad_gates @ weight_hh, packed: the sums of a step whose input is grad_gates.
static inline void packed_state_product(const Backward<float>& p, Range part, const Pool& pool) {
  Packed<float> step{};
  step.B = part.size;
  step.I = 4 * p.H;
  step.H = p.H / 4;
  step.input = step.hx = p.grad_gates;
  step.input_stride = p.grad_gates_stride;
  step.sums = p.grad_hx + part.begin * p.H;
  step.weight = p.packed_hh;
  step.depth = step.I;
  forward_packed(step, pool);
}

template <class T>
static void backward_part(const Backward<T>& p, Range part, const Pool& pool) {
  struct Parts {
    const Backward<T>& p;
    Range part;
    int64_t count;
  } parts{p, part, 4 * pool.threads};
  if (p.gates)
    pool.run(
        parts.count, part.size * p.H * kGateGradientWork,
        [](const void* context, int64_t i) {
          const Parts& t = *static_cast<const Parts*>(context);
          gate_gradients(t.p, t.part, split_range(i, t.count, t.part.size, 1));
        },
        &parts);

  const GradientTasks<T> tasks(p, part, pool);
  pool.run(
      tasks.tasks(), tasks.work(),
      [](const void* context, int64_t i) { static_cast<const GradientTasks<T>*>(context)->run(i); },
      &tasks);
  if constexpr (sizeof(T) == sizeof(float))
    if (p.packed_hh && p.grad_hx) packed_state_product(p, part, pool);
  if (p.mask && p.grad_hx) masked_state_gradients(p, part);
}

template <class T>
static void backward(const Backward<T>& p, const Pool& pool) {
  const int64_t rows = backward_rows<T>(p.B, p.I, p.H);
  for (int64_t row = 0; row < p.B; row += rows) {
    Backward<T> part = p;
    part.grad_gates += row % p.rows * p.grad_gates_stride;
    backward_part(part, {row, p.B - row < rows ? p.B - row : rows}, pool);
  }
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
