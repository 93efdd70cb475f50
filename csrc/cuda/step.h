// The end of a step and the beginning of its gradients, for one state: what all kernels share.
#pragma once
#include <math.h>
#include <string.h>

#include "../cell_math.h"
#include "../lstm.h"
#include "device.h"

namespace lstmfused {
namespace cuda {

constexpr int kWarp = 32;

template <class A>
struct ScalarMath {
  using F = A;
  LSTMFUSED_DEVICE A sigmoid(A x) { return reciprocal(1 + ::exp(-x)); }
  LSTMFUSED_DEVICE A tanh(A x) { return ::tanh(x); }
};

// Both biases of a unit's gates, summed.
template <class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE Gates<A> sum_bias(const Forward<T>& p, int64_t unit) {
  const auto sum = [&](int gate) {
    const int64_t row = gate * p.H + unit;
    return (p.bias_ih ? A(widen(p.bias_ih[row])) : A(0)) + (p.bias_hh ? A(widen(p.bias_hh[row])) : A(0));
  };
  return {sum(0), sum(1), sum(2), sum(3)};
}

// From the sums of the products: c', h' and the gates of one state.
template <class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void finish_state(const Forward<T>& p, int64_t row, int64_t unit, const Gates<A>& sums,
                                   const Gates<A>& bias) {
  using Math = ScalarMath<A>;
  const Gates<A> gate =
      activate<Math>(Gates<A>{sums.i + bias.i, sums.f + bias.f, sums.g + bias.g, sums.o + bias.o});
  const A c = next_cell(gate, A(widen(p.cx[row * p.cx_stride + unit])));
  narrow(c, p.c[row * p.H + unit]);
  narrow(next_hidden<Math>(gate, c), p.h[row * p.H + unit]);
  if (!p.gates) return;
  T* gates = p.gates + row * 4 * p.H + unit;
  narrow(gate.i, gates[0]);
  narrow(gate.f, gates[p.H]);
  narrow(gate.g, gates[2 * p.H]);
  narrow(gate.o, gates[3 * p.H]);
}

// ---------------------------------------------------------------------------------------------------
// Vectors of 16 bytes

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// Whether rows of `size`, `stride` apart, may be read in vectors.
template <class T>
static bool in_vectors(const T* from, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % kVector<T> == 0 && size % kVector<T> == 0;
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace lstmfused
