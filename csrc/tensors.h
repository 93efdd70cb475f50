// Tensors -> the structs of lstm.h, for the operators of every device: checked, with contiguous rows.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstring>

#include "checks.h"
#include "lstm.h"
#include "ops.h"

namespace lstmfused {

// The same values with contiguous rows; rows themselves may lie apart, as in x[:, t].
inline MaybeOwned rows(const Tensor& tensor) {
  const bool as_it_is = tensor.stride(1) == 1 || tensor.size(1) <= 1;
  return as_it_is ? MaybeOwned::borrowed(tensor) : MaybeOwned::owned(tensor.contiguous());
}
inline MaybeOwned contiguous(const Tensor& tensor) { return tensor.expect_contiguous(); }

inline MaybeOwned rows(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? rows(*tensor) : MaybeOwned();
}
// Whether a matrix is a contiguous one transposed, as weights are that come from Keras: (I, 4H) there.
inline bool is_transposed(const Tensor& matrix) {
  return !matrix.is_contiguous() && matrix.stride(0) == 1 && matrix.stride(1) == matrix.size(0);
}

inline MaybeOwned contiguous(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? contiguous(*tensor) : MaybeOwned();
}
inline int64_t row_stride(const Tensor& tensor) { return tensor.defined() ? tensor.stride(0) : 0; }

// Pointers as the kernels name their types; null for what is undefined or has no element.
template <class T>
const T* in(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}
template <class T>
T* out(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// Contiguous memory to zeros. On the CPU by this thread: after fork, torch's fill in parallel would hang.
inline void set_zero(const Tensor& tensor) {
  if (!tensor.numel()) return;
  if (tensor.is_cpu())
    std::memset(tensor.mutable_data_ptr(), 0, tensor.nbytes());
  else
    tensor.zero_();
}

struct ForwardTensors {
  int64_t B, I, H;
  MaybeOwned input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh;

  template <class T>
  Forward<T> with(const Tensor& h, const Tensor& c, const Tensor& gates) const {
    return {{B, I, H, in<T>(*input), input->stride(0), in<T>(*hx), hx->stride(0), in<T>(*cx), cx->stride(0),
             out<T>(h), out<T>(c), out<T>(gates), cx->scalar_type() != input->scalar_type()},
            in<T>(*weight_ih),
            in<T>(*weight_hh),
            in<T>(*bias_ih),
            in<T>(*bias_hh),
            batch_invariant()};
  }
};

inline ForwardTensors forward_tensors(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                      const Tensor& weight_ih, const Tensor& weight_hh,
                                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  check_step(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  return {input.size(0),
          input.size(1),
          hx.size(1),
          rows(input),
          rows(hx),
          rows(cx),
          contiguous(weight_ih),
          contiguous(weight_hh),
          contiguous(bias_ih),
          contiguous(bias_hh)};
}

struct BackwardTensors {
  int64_t B, I, H;
  MaybeOwned grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh;

  // The gradients that are wanted, by make(shape, dtype); the others have no element. They are
  // uninitialized, but zeros where there is no state to be computed from: no row still has weight
  // gradients, and no unit those of the input.
  template <class Make>
  Gradients gradients(const std::array<bool, 7>& wanted, const Make& make) const {
    const auto gradient = [&](int index, at::IntArrayRef shape) {
      const Tensor tensor =
          make(wanted[index] ? shape : at::IntArrayRef{0}, (index == 2 ? cx : gates)->scalar_type());
      if (!B || !H) set_zero(tensor);
      return tensor;
    };
    return {gradient(0, {B, I}),     gradient(1, {B, H}),  gradient(2, {B, H}), gradient(3, {4 * H, I}),
            gradient(4, {4 * H, H}), gradient(5, {4 * H}), gradient(6, {4 * H})};
  }

  // grad_gates is scratch: rows of the batch by what lies between them.
  template <class T, class X>
  Backward<T, X> with(const Tensor& grad_gates, const Gradients& gradients) const {
    const auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh] =
        gradients;
    return {B,
            I,
            H,
            in<T>(*grad_h),
            row_stride(*grad_h),
            in<T>(*grad_c),
            row_stride(*grad_c),
            in<T>(*gates),
            in<T>(*input),
            row_stride(*input),
            in<T>(*hx),
            row_stride(*hx),
            in<T>(*cx),
            cx->stride(0),
            in<T>(*weight_ih),
            in<T>(*weight_hh),
            grad_gates.size(0),
            out<X>(grad_gates),
            grad_gates.size(1),
            out<T>(grad_input),
            out<T>(grad_hx),
            out<T>(grad_cx),
            out<T>(grad_weight_ih),
            out<T>(grad_weight_hh),
            out<T>(grad_bias_ih),
            out<T>(grad_bias_hh),
            cx->scalar_type() != gates->scalar_type()};
  }
};

inline BackwardTensors backward_tensors(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                        const Tensor& gates, const OptionalTensor& input,
                                        const OptionalTensor& hx, const Tensor& cx,
                                        const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                                        const std::array<bool, 7>& wanted) {
  check_backward(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, wanted);
  const OptionalTensor& wide = input ? input : weight_ih;
  return {cx.size(0),   wide ? wide->size(1) : 0, cx.size(1),           rows(grad_h),
          rows(grad_c), contiguous(gates),        rows(input),          rows(hx),
          rows(cx),     contiguous(weight_ih),    contiguous(weight_hh)};
}

}  // namespace lstmfused
