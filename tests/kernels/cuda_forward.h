// A step forward, by every path.
#pragma once
#include "cuda.h"

static Matrix to_nearest_tf32(Matrix x) {
  for (double& element : x.elements) {
    int exponent;
    const double fraction = frexp(element, &exponent);
    element = ldexp(round(ldexp(fraction, 11)), exponent - 11);
  }
  return x;
}

// C is the type of the cell state, T or Accumulate<T>.
template <class T, class C>
static void test_forward(int64_t B, int64_t I, int64_t H, Layout layout) {
  const int64_t G = 4 * H;
  const double scale = 1 / sqrt(double(std::max(I, H)));
  Array<T> input = layout.apart_or_repeated<T>(B, I).fill(-1, 1),
           hx = layout.apart_or_repeated<T>(B, H).fill(-1, 1),
           weight_ih = layout.dense<T>(G, I).fill(-scale, scale),
           weight_hh = layout.dense<T>(G, H).fill(-scale, scale),
           bias_ih = layout.dense<T>(1, G).fill(-1, 1), bias_hh = layout.dense<T>(1, G).fill(-1, 1),
           h = layout.dense<T>(B, H), gates = layout.dense<T>(B, G);
  Array<C> cx = layout.apart_or_repeated<C>(B, H).fill(-1, 1), c = layout.dense<C>(B, H);
  const bool with_bias_ih = layout.wanted(), with_bias_hh = layout.wanted();
  const Where where{B, I, H, layout, "", {}};
  const auto save_gates = [] { return simt::order != simt::Order::kBackward; };
  const auto problem = [&] {
    return Forward<T>{{B, I, H, input.data(), input.stride, hx.data(), hx.stride, as<T>(cx.data()),
                       cx.stride, h.data(), as<T>(c.data()), save_gates() ? gates.data() : nullptr,
                       /*wide_cell=*/sizeof(C) != sizeof(T)},
                      weight_ih.data(),
                      weight_hh.data(),
                      with_bias_ih ? bias_ih.data() : nullptr,
                      with_bias_hh ? bias_hh.data() : nullptr,
                      /*batch_invariant=*/false};
  };
  const auto sums_of = [&](Matrix (*rounded)(Matrix)) {
    return rounded(input.values()) * transposed(rounded(weight_ih.values())) +
           rounded(hx.values()) * transposed(rounded(weight_hh.values()));
  };
  const auto expected_of = [&](Matrix sums) {
    if (with_bias_ih) sums = std::move(sums) + bias_ih.values();
    if (with_bias_hh) sums = std::move(sums) + bias_hh.values();
    return step(sums, cx.values());
  };
  const auto compare = [&](const Where& at, const State& expected, bool with_gates) {
    check(at, "h", h, expected.h, double(I + H));
    check(at, "c", c, expected.c, double(I + H));
    if (with_gates) check(at, "gates", gates, expected.gates, double(I + H));
  };

  const Matrix sums = sums_of([](Matrix x) { return x; });
  const State expected = expected_of(sums);
  if (are_few(B, I, H))
    run<T>(
        where, "forward_small_batch", {h, c}, [&](Device on) { return forward_small_batch(problem(), on); },
        [&](const Where& at) {
          compare(at, expected, save_gates());
          if (B == 1 || simt::order != simt::Order::kForward) return;
          for (int64_t b : {int64_t(0), B / 2, B - 1}) {
            Array<T> row_h(1, H);
            Array<C> row_c(1, H);
            Forward<T> p = problem();
            p.B = 1;
            p.input = input.row(b);
            p.hx = hx.row(b);
            p.cx = as<T>(cx.row(b));
            p.h = row_h.data();
            p.c = as<T>(row_c.data());
            p.gates = nullptr;
            if (const char* error = forward_small_batch(p, at.device)) fail(at, sizeof(T), error);
            if (memcmp(row_h.data(), h.row(b), H * sizeof(T)) ||
                memcmp(row_c.data(), c.row(b), H * sizeof(C)))
              fail(at, sizeof(T), "a row alone is not as in the batch");
          }
        });

  if constexpr (sizeof(T) < 8) {
    const State rounded = sizeof(T) == 4 ? expected_of(sums_of(to_nearest_tf32)) : expected;
    run<T>(
        where, "forward_tensor_cores", {h, c},
        [&](Device on) { return forward_tensor_cores(problem(), on); },
        [&](const Where& at) { compare(at, rounded, save_gates()); });
    if constexpr (sizeof(T) == 2)
      run<T>(
          where, "forward_warpgroups", {h, c},
          [&](Device on) {
            return has_warpgroups<T>(on) ? forward_warpgroups(problem(), on)
                                         : forward_tensor_cores(problem(), on);
          },
          [&](const Where& at) { compare(at, rounded, save_gates()); });
  }

  Array<Accumulate<T>> given(B, G);
  const auto give = [&](auto* to) {
    std::transform(sums.elements.begin(), sums.elements.end(), to,
                   [](double sum) { return Accumulate<T>(sum); });
  };
  run<T>(
      where, "finish", {h, c},
      [&](Device on) {
        give(given.data());
        return finish(problem(), given.data(), on);
      },
      [&](const Where& at) { compare(at, expected, save_gates()); });
  if constexpr (sizeof(T) > 2)
    run<T>(
        where, "finish in place", {h, c},
        [&](Device on) {
          Forward<T> p = problem();
          give(gates.data());
          p.gates = gates.data();
          return finish(p, gates.data(), on);
        },
        [&](const Where& at) { compare(at, expected, true); });
}
