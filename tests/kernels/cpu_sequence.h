// A step of a sequence: first what the input adds is made, then rows are stepped, reset or skipped. Forward
// from torch's and from packed weights, and backward with what the next step adds.
#pragma once
#include "cpu.h"
#include "cpu_packed.h"

template <class T>
struct Sequence {
  using A = Accumulate<T>;

  const CellKernels<T>& kernels;
  const Packing& packing;  // for float
  Shape shape;
  Pool pool;
  int64_t B = shape.B, I = shape.I, H = shape.H, G = 4 * H;
  double scale = weight_scale(shape);

  vector<T> input = uniform<T>(B * I), hx = uniform<T>(B * H), cx = uniform<T>(B * H),
            weight_ih = uniform<T>(G * I, scale), weight_hh = uniform<T>(G * H, scale),
            bias = uniform<T>(G), grad_h = uniform<T>(B * H), grad_c = uniform<T>(B * H),
            next_grad_h = uniform<T>(B * H), next_grad_c = uniform<T>(B * H);
  vector<RowMask> mask = vector<RowMask>(B);
  Matrix h = values(hx, B), c = values(cx, B), w = values(weight_hh, G);
  vector<T> gates = vector<T>(B * G);

  template <class Each>
  void rows_that(RowMask kind, const Each& each) const {
    for (int64_t b = 0; b < B; b++)
      if (mask[b] == kind) each(b);
  }

  void draw_mask() {
    for (RowMask& row : mask) row = RowMask(int(3 * (uniform() + 1) / 2) % 3);
    rows_that(RowMask::kReset, [&](int64_t b) {
      for (int64_t u = 0; u < H; u++) {
        h[b][u] = c[b][u] = 0;
        hx[b * H + u] = cx[b * H + u] = from<T>(NAN);  // it must not matter, whatever it is
      }
    });
  }

  void forward() {
    const Matrix of_input = values(input, B) * transposed(values(weight_ih, G)) + values(bias, 1);
    State next = step(of_input + h * transposed(w), c);
    rows_that(RowMask::kSkip, [&](int64_t b) {
      std::copy_n(h[b], H, next.h[b]);
      std::copy_n(c[b], H, next.c[b]);
    });
    // Sums become gates in place, where both are of one type.
    vector<A> wide_sums(B * G);
    A* sums = wide_sums.data();
    if constexpr (std::is_same_v<T, A>) sums = gates.data();
    vector<T> out_h(B * H), out_c(B * H);

    Step<T> inputs{};
    inputs.B = B, inputs.I = I, inputs.H = H;
    inputs.input = input.data(), inputs.input_stride = I;
    inputs.sums = sums;
    inputs.hx = inputs.cx = input.data();  // not looked at
    Step<T> states{};
    states.B = B, states.H = H;
    states.input = states.hx = hx.data(), states.hx_stride = H;
    states.cx = cx.data(), states.cx_stride = H;
    states.h = out_h.data(), states.c = out_c.data(), states.gates = gates.data();
    states.starting_sums = sums;
    states.mask = mask.data();

    const auto check_sums = [&](const char* kind) {
      check(kind, vector<A>(sums, sums + B * G), of_input, double(I), shape);
    };
    const auto check_step = [&](const char* kind) {
      check(kind, out_h, next.h, double(I + H), shape);
      check(kind, out_c, next.c, double(I + H), shape);
      vector<T> of_steps = gates;  // those of rows that are skipped are of no use
      rows_that(RowMask::kSkip, [&](int64_t b) {
        for (int64_t i = 0; i < G; i++) of_steps[b * G + i] = from<T>(next.gates[b][i]);
      });
      check(kind, of_steps, next.gates, double(I + H), shape);
    };
    for (const bool batch_invariant : {false, true}) {
      kernels.forward({inputs, weight_ih.data(), weight_hh.data(), bias.data(), nullptr, batch_invariant},
                      pool);
      check_sums("sums");
      kernels.forward({states, nullptr, weight_hh.data(), nullptr, nullptr, batch_invariant}, pool);
      check_step("masked");
      poison(out_h, out_c);
    }
    if constexpr (std::is_same_v<T, float>) {
      const PackedWeights of_inputs(packing, weight_ih, bias, H, I, pool),
          of_states(packing, weight_hh, bias, H, H, pool);
      packing.kernel({inputs, of_inputs.weight.data(), nullptr, of_inputs.bias.data(), 0, I}, pool);
      check_sums("sums, packed");
      packing.kernel({states, of_states.weight.data(), nullptr, nullptr, 0, H}, pool);
      check_step("masked, packed");
    }
  }

  // In two calls, as a sequence makes them: first of the states, then of the weights.
  void backward() {
    const Matrix gh = values(grad_h, B) + values(next_grad_h, B),
                 gc = values(grad_c, B) + values(next_grad_c, B);
    GateGradients grad = gate_gradients(values(gates, B), c, gh, gc);
    rows_that(RowMask::kSkip, [&](int64_t b) { std::fill_n(grad.sums[b], G, 0.0); });
    Matrix dh = grad.sums * w;
    rows_that(RowMask::kSkip, [&](int64_t b) {
      std::copy_n(gh[b], H, dh[b]);
      std::copy_n(gc[b], H, grad.cx[b]);
    });
    rows_that(RowMask::kReset, [&](int64_t b) {
      std::fill_n(dh[b], H, 0.0);
      std::fill_n(grad.cx[b], H, 0.0);
      std::fill_n(&hx[b * H], H, from<T>(0));  // as a sequence has it in the products
    });

    const int64_t stride = backward_stride<T>(H);
    vector<A> scratch(B * stride);
    vector<T> grad_hx(B * H), grad_cx(B * H);
    Backward<T> states{};
    states.B = states.rows = B;
    states.H = states.grad_h_stride = states.grad_c_stride = states.cx_stride = H;
    states.grad_h = grad_h.data(), states.grad_c = grad_c.data();
    states.next_grad_h = next_grad_h.data(), states.next_grad_c = next_grad_c.data();
    states.gates = gates.data(), states.cx = cx.data();
    states.mask = mask.data();
    states.weight_hh = weight_hh.data();
    states.grad_gates = scratch.data(), states.grad_gates_stride = stride;
    states.grad_hx = grad_hx.data(), states.grad_cx = grad_cx.data();
    kernels.backward(states, pool);
    check("masked grad_hx", grad_hx, dh, double(G), shape);
    check("masked grad_cx", grad_cx, grad.cx, 1, shape);
    if constexpr (std::is_same_v<T, float>)
      if (H % 4 == 0) {
        vector<float> packed(G * packed_units(H / 4) * 4);
        packing.pack({H / 4, G, weight_hh.data(), 1, H, packed.data(), 0, G}, pool);
        states.weight_hh = nullptr;
        states.packed_hh = packed.data();
        poison(grad_hx);
        kernels.backward(states, pool);
        check("masked grad_hx, packed", grad_hx, dh, double(G), shape);
      }

    const Matrix dw = transposed(grad.sums) * h, db = sum_of_rows(grad.sums);
    vector<T> grad_weight(G * H), grad_bias(G);
    Backward<T> products{};
    products.B = products.rows = B;
    products.H = products.hx_stride = H;
    products.hx = hx.data();
    products.grad_gates = scratch.data(), products.grad_gates_stride = stride;
    products.grad_weight_hh = grad_weight.data(), products.grad_bias_hh = grad_bias.data();
    kernels.backward(products, pool);
    check("masked grad_weight_hh", grad_weight, dw, double(B), shape);
    check("masked grad_bias_hh", grad_bias, db, double(B), shape);
    if (!std::is_same_v<T, A>) return;
    products.accumulate = true;
    kernels.backward(products, pool);
    check("masked grad_weight_hh, twice", grad_weight, 2 * dw, double(2 * B), shape);
    check("masked grad_bias_hh, twice", grad_bias, 2 * db, double(2 * B), shape);
    products.accumulate = false;
    products.transposed = true;
    poison(grad_weight, grad_bias);
    kernels.backward(products, pool);
    check("transposed grad_weight_hh", grad_weight, transposed(dw), double(B), shape);
  }
};

template <class T>
static void test_sequence(const CellKernels<T>& kernels, const Packing& packing, Shape shape,
                          int64_t threads) {
  shape.I = std::max<int64_t>(shape.I, 1);
  Sequence<T> sequence{kernels, packing, shape, pool_of(threads)};
  sequence.draw_mask();
  sequence.forward();
  sequence.backward();
}
