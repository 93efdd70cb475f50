// The tangents of a step and of its backward.
#pragma once
#include "cpu.h"

// With those inputs alone that a bit of `given` stands for; the others are zero.
template <class T>
static void test_tangents(TangentsKernel<T> kernel, int64_t B, int64_t H, int64_t threads, int given) {
  const int64_t G = 4 * H;
  const Shape shape{B, 0, H};
  const auto uniform_if = [&](int bit, int64_t size) {
    return given >> bit & 1 ? uniform<T>(size) : vector<T>();
  };
  const auto pointer = [](const vector<T>& x) { return x.empty() ? nullptr : x.data(); };
  const auto at = [](const vector<T>& x, int64_t i) { return x.empty() ? 0.0 : double(x[i]); };
  const vector<T> gates = uniform<T>(B * G), cx = uniform<T>(B * H), grad_h = uniform_if(0, B * H),
                  grad_c = uniform_if(1, B * H), sums = uniform_if(2, B * G),
                  cx_tangent = uniform_if(3, B * H), grad_h_tangent = uniform_if(4, B * H),
                  grad_c_tangent = uniform_if(5, B * H);
  Matrix h(B, H), c(B, H), grads(B, G), tangents(B, G), grad_cx(B, H);
  for (int64_t b = 0; b < B; b++)
    for (int64_t u = 0; u < H; u++) {
      const int64_t n = b * H + u, m = b * G + u;
      const double i = gates[m], f = gates[m + H], g = gates[m + 2 * H], o = gates[m + 3 * H], old = cx[n],
                   old_ = at(cx_tangent, n);
      const double i_ = i * (1 - i) * at(sums, m), f_ = f * (1 - f) * at(sums, m + H),
                   g_ = (1 - g * g) * at(sums, m + 2 * H), o_ = o * (1 - o) * at(sums, m + 3 * H);
      c[b][u] = f_ * old + f * old_ + i_ * g + i * g_;
      const double t = tanh(f * old + i * g), t_ = (1 - t * t) * c[b][u];
      h[b][u] = o_ * t + o * t_;
      const double gh = at(grad_h, n), gh_ = at(grad_h_tangent, n);
      const double through = at(grad_c, n) + gh * o * (1 - t * t);
      const double through_ =
          at(grad_c_tangent, n) + (gh_ * o + gh * o_) * (1 - t * t) - 2 * gh * o * t * t_;
      grad_cx[b][u] = through_ * f + through * f_;
      grads[b][u] = through * g * i * (1 - i);
      grads[b][u + H] = through * old * f * (1 - f);
      grads[b][u + 2 * H] = through * i * (1 - g * g);
      grads[b][u + 3 * H] = gh * t * o * (1 - o);
      tangents[b][u] = (through_ * g + through * g_) * i * (1 - i) + through * g * (1 - 2 * i) * i_;
      tangents[b][u + H] =
          (through_ * old + through * old_) * f * (1 - f) + through * old * (1 - 2 * f) * f_;
      tangents[b][u + 2 * H] = (through_ * i + through * i_) * (1 - g * g) - 2 * through * i * g * g_;
      tangents[b][u + 3 * H] = (gh_ * t + gh * t_) * o * (1 - o) + gh * t * (1 - 2 * o) * o_;
    }
  for (const bool with_grads : {true, false}) {
    vector<T> out_h(B * H), out_c(B * H), out_tangents(with_grads ? B * G : 0),
        out_grads(out_tangents.size()), out_cx(with_grads ? B * H : 0);
    kernel({B, H, gates.data(), cx.data(), pointer(grad_h), pointer(grad_c), pointer(sums),
            pointer(cx_tangent), pointer(grad_h_tangent), pointer(grad_c_tangent), out_h.data(),
            out_c.data(), with_grads ? out_tangents.data() : nullptr,
            with_grads ? out_grads.data() : nullptr, with_grads ? out_cx.data() : nullptr},
           pool_of(threads));
    check("h_tangent", out_h, h, 1, shape);
    check("c_tangent", out_c, c, 1, shape);
    if (!with_grads) continue;
    check("grad_gates_tangent", out_tangents, tangents, 1, shape);
    check("grad_gates", out_grads, grads, 1, shape);
    check("grad_cx_tangent", out_cx, grad_cx, 1, shape);
  }
}
