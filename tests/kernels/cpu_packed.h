// Packed weights: from torch's layout or Keras's by the kernel, and in lstm.h's own, made here.
#pragma once
#include "cpu.h"

struct Packing {
  PackedKernel<float> kernel;
  void (*pack)(const Pack&, const Pool&);
};

// weight (4H, K) and bias (4H), packed by the kernel; it must be the same from (K, 4H), in two pieces.
struct PackedWeights {
  vector<float> weight, bias;

  PackedWeights(const Packing& packing, const vector<float>& w, const vector<float>& b, int64_t H,
                int64_t K, const Pool& pool)
      : weight(K * 4 * packed_units(H)), bias(4 * packed_units(H)) {
    packing.pack({H, K, w.data(), K, 1, weight.data(), 0, K}, pool);
    packing.pack({H, 1, b.data(), 1, 0, bias.data(), 0, 1}, pool);
    vector<float> transposed(w.size()), again(weight.size());
    for (int64_t row = 0; row < 4 * H; row++)
      for (int64_t k = 0; k < K; k++) transposed[k * 4 * H + row] = w[row * K + k];
    const int64_t half = K / 2;
    packing.pack({H, half, transposed.data(), 1, 4 * H, again.data(), 0, K}, pool);
    packing.pack({H, K - half, transposed.data() + half * 4 * H, 1, 4 * H, again.data(), half, K}, pool);
    if (again != weight) {
      failures++;
      printf("packed weights differ: H %d, K %d\n", int(H), int(K));
    }
  }
};

template <class W>
static void test_packed(PackedKernel<W> kernel, Shape shape, int64_t threads) {
  const int64_t B = shape.B, I = shape.I, H = shape.H, G = 4 * H, K = I + H, padded = packed_units(H);
  constexpr bool is_int8 = sizeof(W) == 1;
  const double size = weight_scale(shape);
  const vector<float> input = uniform<float>(B * I), hx = uniform<float>(B * H), cx = uniform<float>(B * H);
  vector<W> weight(4 * padded * K);
  vector<float> bias(4 * padded), scale(is_int8 ? 4 * padded : 0);
  Matrix weights(G, K), biases(1, G);
  for (int64_t u0 = 0; u0 < H; u0 += kPackedUnits) {
    const int64_t width = std::min<int64_t>(kPackedUnits, padded - u0);
    for (int64_t gate = 0; gate < 4; gate++)
      for (int64_t u = 0; u < width && u0 + u < H; u++) {
        const int64_t row = gate * H + u0 + u, at = gate * width + u;
        biases[0][row] = bias[4 * u0 + at] = float(uniform());
        if (is_int8) scale[4 * u0 + at] = float((2 + uniform()) * size / 254);
        for (int64_t k = 0; k < K; k++) {
          W& to = weight[4 * u0 * K + k * 4 * width + at];
          if constexpr (is_int8) {
            to = W(uniform() * 127);
            weights[row][k] = to * double(scale[4 * u0 + at]);
          } else {
            to = from<W>(uniform() * size);
            weights[row][k] = widen(to);
          }
        }
      }
  }
  Matrix factors(B, K);
  for (int64_t b = 0; b < B; b++) {
    std::copy_n(input.begin() + b * I, I, factors[b]);
    std::copy_n(hx.begin() + b * H, H, factors[b] + I);
  }
  const State next = step(factors * transposed(weights) + biases, values(cx, B));
  vector<float> h(B * H), c(B * H);
  const float* const scales = is_int8 ? scale.data() : nullptr;
  const auto check_states = [&](const char* kind) {
    check(kind, h, next.h, double(K), shape);
    check(kind, c, next.c, double(K), shape);
    poison(h, c);
  };
  const Step<float> all{B, I, H, input.data(), I, hx.data(), H, cx.data(), H, h.data(), c.data(), nullptr};
  kernel({all, weight.data(), scales, bias.data(), 0, K}, pool_of(threads));
  check_states("packed");

  if (!I) return;
  vector<float> sums(B * G);
  Step<float> inputs = all, states = all;
  inputs.sums = sums.data();
  states.I = 0;
  states.starting_sums = sums.data();
  kernel({inputs, weight.data(), scales, bias.data(), 0, K}, pool_of(threads));
  kernel({states, weight.data(), scales, nullptr, I, K}, pool_of(threads));
  check_states("packed, in two calls");
}
