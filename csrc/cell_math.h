// The LSTM equations and their derivatives: the only copy, for host vectors and device scalars alike.
//
//   i, f, o = sigmoid(pre)   g = tanh(pre)   c' = f * c + i * g   h' = o * tanh(c')
//
// Hochreiter & Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers et al. (2000),
// as in torch.nn.LSTMCell. Math names a number type F and its sigmoid and tanh.
#pragma once

#ifdef __CUDACC__
#define LSTMFUSED_FN static __device__ __forceinline__
#else
#define LSTMFUSED_FN static inline __attribute__((always_inline))
#endif

namespace lstmfused {

template <class F>
struct Gates {
  F i, f, g, o;
};

template <class Math, class F = typename Math::F>
LSTMFUSED_FN Gates<F> activate(const Gates<F>& pre) {
  return {Math::sigmoid(pre.i), Math::sigmoid(pre.f), Math::tanh(pre.g), Math::sigmoid(pre.o)};
}

template <class F>
LSTMFUSED_FN F next_cell(const Gates<F>& gate, F c) {
  return gate.f * c + gate.i * gate.g;
}

template <class Math, class F = typename Math::F>
LSTMFUSED_FN F next_hidden(const Gates<F>& gate, F c_next) {
  return gate.o * Math::tanh(c_next);
}

// From the gradients of h' and c': returns those of the four sums before activation, and in grad_c that
// of c. tanh(c') is computed again, so only the activated gates need be kept from the forward step.
template <class Math, class F = typename Math::F>
LSTMFUSED_FN Gates<F> step_backward(const Gates<F>& gate, F c, F grad_h, F& grad_c) {
  const F tanh_c = Math::tanh(next_cell(gate, c));
  const F grad_c_next = grad_c + grad_h * gate.o * (1 - tanh_c * tanh_c);
  grad_c = grad_c_next * gate.f;
  return {grad_c_next * gate.g * gate.i * (1 - gate.i),  //
          grad_c_next * c * gate.f * (1 - gate.f),       //
          grad_c_next * gate.i * (1 - gate.g * gate.g),  //
          grad_h * tanh_c * gate.o * (1 - gate.o)};
}

// A number and its derivative in some direction, its tangent. The equations above, evaluated with these,
// give the tangents of a step and of its backward.
template <class F>
struct Dual {
  F value, tangent;
};

template <class F>
LSTMFUSED_FN Dual<F> operator+(const Dual<F>& a, const Dual<F>& b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class F>
LSTMFUSED_FN Dual<F> operator*(const Dual<F>& a, const Dual<F>& b) {
  return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
}
template <class F>
LSTMFUSED_FN Dual<F> operator-(int /* 1: GCC takes a vector only from a literal */, const Dual<F>& b) {
  return {1 - b.value, -b.tangent};
}

template <class Math>
struct DualMath {
  using F = Dual<typename Math::F>;
  LSTMFUSED_FN F tanh(const F& x) {
    const auto y = Math::tanh(x.value);
    return {y, x.tangent * (1 - y * y)};
  }
};

// From the activated gates and the tangents of the sums before activation.
template <class F>
LSTMFUSED_FN Gates<Dual<F>> dual_gates(const Gates<F>& gate, const Gates<F>& sums) {
  return {{gate.i, sums.i * (gate.i * (1 - gate.i))},
          {gate.f, sums.f * (gate.f * (1 - gate.f))},
          {gate.g, sums.g * (1 - gate.g * gate.g)},
          {gate.o, sums.o * (gate.o * (1 - gate.o))}};
}

}  // namespace lstmfused
