// One step of a cell, forward and backward.
#pragma once
#include "cpu.h"

// C is the type of the cell state, T or Accumulate<T>.
template <class C, class T>
static void test_cell(const CellKernels<T>& kernels, Shape shape, int64_t threads) {
  using A = Accumulate<T>;
  constexpr bool wide = !std::is_same_v<C, T>;
  const auto cells = [](auto& cell) {  // as the structs have them
    if constexpr (std::is_const_v<std::remove_reference_t<decltype(cell)>>)
      return reinterpret_cast<const T*>(cell.data());
    else
      return reinterpret_cast<T*>(cell.data());
  };
  const int64_t B = shape.B, I = shape.I, H = shape.H, G = 4 * H;
  const Pool pool = pool_of(threads);
  const double scale = weight_scale(shape);
  const vector<T> input = uniform<T>(B * I), hx = uniform<T>(B * H), weight_ih = uniform<T>(G * I, scale),
                  weight_hh = uniform<T>(G * H, scale), bias_ih = uniform<T>(G), bias_hh = uniform<T>(G),
                  grad_h = uniform<T>(B * H);
  const vector<C> cx = uniform<C>(B * H), grad_c = uniform<C>(B * H);

  Forward<T> forward{};
  forward.B = B, forward.I = I, forward.H = H;
  forward.input = input.data(), forward.input_stride = I;
  forward.hx = hx.data(), forward.hx_stride = H;
  forward.cx = cells(cx), forward.cx_stride = H;
  forward.wide_cell = wide;
  forward.weight_ih = weight_ih.data(), forward.weight_hh = weight_hh.data();
  forward.bias_ih = bias_ih.data(), forward.bias_hh = bias_hh.data();
  const Matrix x = values(input, B), h = values(hx, B), c = values(cx, B), wi = values(weight_ih, G),
               wh = values(weight_hh, G);
  const State next =
      step(x * transposed(wi) + h * transposed(wh) + values(bias_ih, 1) + values(bias_hh, 1), c);
  vector<T> gates(B * G);
  for (const auto& [save_gates, batch_invariant] :
       {std::pair{false, false}, {false, true}, {true, false}}) {
    vector<T> out_h(B * H);
    vector<C> out_c(B * H);
    poison(out_h, out_c, gates);
    forward.h = out_h.data(), forward.c = cells(out_c);
    forward.gates = save_gates ? gates.data() : nullptr;
    forward.batch_invariant = batch_invariant;
    kernels.forward(forward, pool);
    check("h", out_h, next.h, double(I + H), shape);
    check("c", out_c, next.c, double(I + H), shape);
    if (save_gates) check("gates", gates, next.gates, double(I + H), shape);
  }

  vector<T> grad_input(B * I), grad_hx(B * H), grad_weight_ih(G * I), grad_weight_hh(G * H),
      grad_bias_ih(G), grad_bias_hh(G);
  vector<C> grad_cx(B * H);
  Backward<T> backward{};
  backward.B = B, backward.I = I, backward.H = H;
  backward.grad_h = grad_h.data(), backward.grad_h_stride = H;
  backward.grad_c = cells(grad_c), backward.grad_c_stride = H;
  backward.gates = gates.data();
  backward.input = input.data(), backward.input_stride = I;
  backward.hx = hx.data(), backward.hx_stride = H;
  backward.cx = cells(cx), backward.cx_stride = H;
  backward.wide_cell = wide;
  backward.weight_ih = weight_ih.data(), backward.weight_hh = weight_hh.data();
  backward.grad_input = grad_input.data(), backward.grad_hx = grad_hx.data();
  backward.grad_cx = cells(grad_cx);
  backward.grad_weight_ih = grad_weight_ih.data(), backward.grad_weight_hh = grad_weight_hh.data();
  backward.grad_bias_ih = grad_bias_ih.data(), backward.grad_bias_hh = grad_bias_hh.data();
  const GateGradients grad = gate_gradients(values(gates, B), c, values(grad_h, B), values(grad_c, B));
  const auto run = [&](int64_t rows, A* grad_gates, int64_t stride) {
    backward.rows = rows;
    backward.grad_gates = grad_gates, backward.grad_gates_stride = stride;
    poison(grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh);
    kernels.backward(backward, pool);
    check("grad_input", grad_input, grad.sums * wi, double(G), shape);
    check("grad_hx", grad_hx, grad.sums * wh, double(G), shape);
    check("grad_cx", grad_cx, grad.cx, 1, shape);
    check("grad_weight_ih", grad_weight_ih, transposed(grad.sums) * x, double(B), shape);
    check("grad_weight_hh", grad_weight_hh, transposed(grad.sums) * h, double(B), shape);
    check("grad_bias_ih", grad_bias_ih, sum_of_rows(grad.sums), double(B), shape);
    check("grad_bias_hh", grad_bias_hh, sum_of_rows(grad.sums), double(B), shape);
  };
  const int64_t rows = backward_rows<T>(B, I, H), stride = backward_stride<T>(H);
  vector<A> scratch(rows * stride);
  run(rows, scratch.data(), stride);
  if constexpr (std::is_same_v<T, A>) {  // the gate gradients take the gates' place
    const auto results = [&] {
      return vector{grad_input,     grad_hx,      grad_cx,     grad_weight_ih,
                    grad_weight_hh, grad_bias_ih, grad_bias_hh};
    };
    const auto apart = results();
    run(B, gates.data(), G);
    if (results() != apart) {
      failures++;
      printf("gradients differ in place: B %d, I %d, H %d, %d bytes an element\n", int(B), int(I), int(H),
             int(sizeof(T)));
    }
  }
}
