// One LSTM step backward: gate gradients, then the products with them.
#pragma once
#include "../cell_math.h"
#include "kernels.h"
#include "product.h"

namespace lstmfused {
namespace LSTMFUSED_VARIANT {

constexpr int64_t kGradientWork = 100;    // what a state's gate gradients cost, in multiply-adds
constexpr int64_t kGradientStates = 128;  // of rows side by side, where one has fewer

// A stretch of the batch: rows from `begin` on, whose gate gradients begin at grad_gates.
//
// Gate gradients of some rows of it, which may take the place of their gates, and the gradient of cx.
template <class T>
static void gate_gradients(const Backward<T>& p, Range stretch, Range rows) {
  using A = Accumulate<T>;
  using Math = VectorMath<A>;
  constexpr int N = kLanes<A>;
  const auto states = [&](int64_t r, int64_t u) LSTMFUSED_INLINED {
    const int64_t row = stretch.begin + r, n = p.H - u;
    const T* gates = p.gates + row * 4 * p.H + u;
    const Gates<Vec<A>> gate{load_upto(gates, n), load_upto(gates + p.H, n), load_upto(gates + 2 * p.H, n),
                             load_upto(gates + 3 * p.H, n)};
    const Vec<A> c = load_cell(p.cx, row * p.cx_stride + u, n, p.wide_cell);
    const Vec<A> grad_h = p.grad_h ? load_upto(p.grad_h + row * p.grad_h_stride + u, n) : Vec<A>{};
    Vec<A> grad_c = p.grad_c ? load_cell(p.grad_c, row * p.grad_c_stride + u, n, p.wide_cell) : Vec<A>{};
    const Gates<Vec<A>> grad = step_backward<Math>(gate, c, grad_h, grad_c);
    if (p.grad_cx) store_cell(p.grad_cx, row * p.H + u, grad_c, n, p.wide_cell);
    A* out = p.grad_gates + r * p.grad_gates_stride + u;
    store_upto(out, grad.i, n);
    store_upto(out + p.H, grad.f, n);
    store_upto(out + 2 * p.H, grad.g, n);
    store_upto(out + 3 * p.H, grad.o, n);
  };
  // Of few units some rows at a time: in place, a load right after stores to a part of what it reads waits
  // for them.
  const int64_t some = p.H < kGradientStates ? kGradientStates / p.H : 1, end = rows.begin + rows.size;
  for (int64_t begin = rows.begin; begin < end; begin += some)
    for (int64_t u = 0; u < p.H; u += N)
      for (int64_t r = begin; r < end && r < begin + some; r++) states(r, u);
}

// The gradient of both biases (4H) = or += the sum of a stretch's grad_gates over its rows, for one panel's
// width of gates; like a product's sums, anew for every kDepth rows.
template <class T>
static void bias_gradient(const Backward<T>& p, Range stretch, int64_t column) {
  using A = Accumulate<T>;
  constexpr int N = kLanes<A>;
  const int64_t n = 4 * p.H - column;
  T* const outs[] = {p.grad_bias_ih, p.grad_bias_hh};
  const T* before = outs[0] ? outs[0] : outs[1];
  for (int v = 0; v < kPanel && v * N < n; v++) {
    const int64_t at = column + v * N;
    Vec<A> total = stretch.begin ? load_upto(before + at, n - v * N) : Vec<A>{};
    for (int64_t begin = 0; begin < stretch.size; begin += kDepth) {
      const int64_t end = begin + kDepth < stretch.size ? begin + kDepth : stretch.size;
      Vec<A> sum{};
      for (int64_t row = begin; row < end; row++)
        sum += load_upto(p.grad_gates + row * p.grad_gates_stride + at, n - v * N);
      total += sum;
    }
    for (T* out : outs)
      if (out) store_upto(out + at, total, n - v * N);
  }
}

template <class T>
static void backward_stretch(const Backward<T>& p, Range stretch, const Pool& pool) {
  using A = Accumulate<T>;
  constexpr int64_t W = kWidth<A>;
  const int64_t G = 4 * p.H, B = stretch.size, begin = stretch.begin;

  struct Pieces {
    const Backward<T>& p;
    Range stretch;
    int64_t count;
  } pieces{p, stretch, 4 * pool.threads};
  pool.run(
      pieces.count, B * p.H * kGradientWork,
      [](const void* context, int64_t i) {
        const Pieces& t = *static_cast<const Pieces*>(context);
        gate_gradients(t.p, t.stretch, piece(i, t.count, t.stretch.size, 1));
      },
      &pieces);

  // All the rest is independent: one list of tasks, so that no thread waits for another's product.
  struct Tasks {
    const Backward<T>& p;
    Range stretch;
    Product<T, Rows<A>> of_rows[2];
    Product<T, Columns<A>> of_weights[2];
  };
  const auto of_rows = [&](const T* weight, T* out, int64_t N) -> Product<T, Rows<A>> {
    return {{p.grad_gates, p.grad_gates_stride, G},
            weight,
            N,
            out ? out + begin * N : nullptr,
            B,
            N,
            true,
            pool};
  };
  const auto of_weights = [&](const T* from, int64_t from_stride, T* out,
                              int64_t N) -> Product<T, Columns<A>> {
    return {{p.grad_gates, p.grad_gates_stride, B},
            out ? from + begin * from_stride : nullptr,
            from_stride,
            out,
            G,
            N,
            begin == 0,
            pool};
  };
  const Tasks tasks{p,
                    stretch,
                    {of_rows(p.weight_ih, p.grad_input, p.I), of_rows(p.weight_hh, p.grad_hx, p.H)},
                    {of_weights(p.input, p.input_stride, p.grad_weight_ih, p.I),
                     of_weights(p.hx, p.hx_stride, p.grad_weight_hh, p.H)}};
  const bool bias = p.grad_bias_ih || p.grad_bias_hh;
  int64_t count = bias ? (G + W - 1) / W : 0, work = bias ? B * G : 0;
  const auto add = [&](const auto& products) {
    for (const auto& product : products) {
      count += product.tasks();
      work += product.work();
    }
  };
  add(tasks.of_rows);
  add(tasks.of_weights);
  pool.run(
      count, work,
      [](const void* context, int64_t i) {
        const Tasks& t = *static_cast<const Tasks*>(context);
        const auto ran = [&i](const auto& products) {
          for (const auto& product : products) {
            if (i < product.tasks()) {
              product.run(i);
              return true;
            }
            i -= product.tasks();
          }
          return false;
        };
        if (!ran(t.of_rows) && !ran(t.of_weights)) bias_gradient(t.p, t.stretch, i * W);
      },
      &tasks);
}

template <class T>
static void backward(const Backward<T>& p, const Pool& pool) {
  const int64_t rows = backward_rows<T>(p.B, p.I, p.H);
  for (int64_t row = 0; row < p.B; row += rows) {
    Backward<T> stretch = p;
    stretch.grad_gates += row % p.rows * p.grad_gates_stride;
    backward_stretch(stretch, {row, p.B - row < rows ? p.B - row : rows}, pool);
  }
}

}  // namespace LSTMFUSED_VARIANT
}  // namespace lstmfused
