// A step backward: the gates' gradients, and the products of the path for a small batch.
#pragma once
#include "cuda.h"

// C is the type of the cell state, T or Accumulate<T>.
template <class T, class C>
static void test_backward(int64_t B, int64_t I, int64_t H, Layout layout) {
  using A = Accumulate<T>;
  const int64_t G = 4 * H;
  const double scale = 1 / sqrt(double(std::max(I, H)));
  Array<T> input = layout.apart_or_repeated<T>(B, I).fill(-1, 1),
           hx = layout.apart_or_repeated<T>(B, H).fill(-1, 1),
           weight_ih = layout.dense<T>(G, I).fill(-scale, scale),
           weight_hh = layout.dense<T>(G, H).fill(-scale, scale),
           grad_h = layout.apart_or_repeated<T>(B, H).fill(-1, 1), gates = layout.dense<T>(B, G).fill(0, 1),
           grad_gates = layout.apart<T>(B, G), grad_bias_ih = layout.dense<T>(1, G),
           grad_bias_hh = layout.dense<T>(1, G), grad_input = layout.dense<T>(B, I),
           grad_hx = layout.dense<T>(B, H), grad_weight_ih = layout.dense<T>(G, I),
           grad_weight_hh = layout.dense<T>(G, H);
  Array<C> cx = layout.apart_or_repeated<C>(B, H).fill(-1, 1),
           grad_c = layout.apart_or_repeated<C>(B, H).fill(-1, 1), grad_cx = layout.dense<C>(B, H);
  const auto if_wanted = [&](auto& array) { return layout.wanted() ? array.data() : nullptr; };
  Backward<T, T> p{};
  p.B = p.rows = B, p.I = I, p.H = H;
  p.grad_h = if_wanted(grad_h), p.grad_h_stride = grad_h.stride;
  p.grad_c = as<T>(if_wanted(grad_c)), p.grad_c_stride = grad_c.stride;
  p.gates = gates.data();
  p.input = input.data(), p.input_stride = input.stride;
  p.hx = hx.data(), p.hx_stride = hx.stride;
  p.cx = as<T>(cx.data()), p.cx_stride = cx.stride;
  p.wide_cell = sizeof(C) != sizeof(T);
  p.weight_ih = weight_ih.data(), p.weight_hh = weight_hh.data();
  p.grad_gates = grad_gates.data(), p.grad_gates_stride = grad_gates.stride;
  p.grad_input = if_wanted(grad_input), p.grad_hx = if_wanted(grad_hx);
  p.grad_cx = as<T>(if_wanted(grad_cx));
  p.grad_weight_ih = if_wanted(grad_weight_ih), p.grad_weight_hh = if_wanted(grad_weight_hh);
  p.grad_bias_ih = if_wanted(grad_bias_ih), p.grad_bias_hh = if_wanted(grad_bias_hh);
  const Where where{B, I, H, layout, "", {}};

  const GateGradients grad =
      gate_gradients(gates.values(), cx.values(), p.grad_h ? grad_h.values() : Matrix(B, H),
                     p.grad_c ? grad_c.values() : Matrix(B, H));
  const Matrix bias = sum_of_rows(grad.sums);
  run<T>(
      where, "gate_gradients", {grad_gates, grad_cx, grad_bias_ih, grad_bias_hh},
      [&](Device on) {
        Array<A> partial(bias_chunks<T>({B, I, H, false}, on), G);
        return cuda::gate_gradients(p, partial.data(), on);
      },
      [&](const Where& at) {
        check(at, "grad_gates", grad_gates, grad.sums, 1);
        if (p.grad_cx) check(at, "grad_cx", grad_cx, grad.cx, 1);
        if (p.grad_bias_ih) check(at, "grad_bias_ih", grad_bias_ih, bias, double(B));
        if (p.grad_bias_hh) check(at, "grad_bias_hh", grad_bias_hh, bias, double(B));
      });

  if (!are_few(B, I, H)) return;
  grad_gates.poison();
  const Matrix d = grad_gates.fill(-1, 1).values(), dx = d * weight_ih.values(),
               dh = d * weight_hh.values(), dwi = transposed(d) * input.values(),
               dwh = transposed(d) * hx.values();
  run<T>(
      where, "backward_small_batch", {grad_input, grad_hx, grad_weight_ih, grad_weight_hh},
      [&](Device on) { return backward_small_batch(p, on); },
      [&](const Where& at) {
        if (p.grad_input) check(at, "grad_input", grad_input, dx, double(G));
        if (p.grad_hx) check(at, "grad_hx", grad_hx, dh, double(G));
        if (p.grad_weight_ih) check(at, "grad_weight_ih", grad_weight_ih, dwi, double(B));
        if (p.grad_weight_hh) check(at, "grad_weight_hh", grad_weight_hh, dwh, double(B));
      });
}
