// Tensor -> pointer, for every device's operators.
#pragma once
#include <ATen/core/Tensor.h>

#include "ops.h"

namespace lstmfused {

// The same values with contiguous rows; rows themselves may lie apart, as in x[:, t].
inline Tensor rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) <= 1 ? tensor : tensor.contiguous();
}
inline Tensor rows(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? rows(*tensor) : Tensor();
}
inline int64_t row_stride(const Tensor& tensor) { return tensor.defined() ? tensor.stride(0) : 0; }

inline Tensor contiguous(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? tensor->contiguous() : Tensor();
}

// Pointers as the kernels name their types; null for what is undefined or has no element.
template <class T>
const T* in(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}
template <class T>
T* out(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// The gradients that are wanted, uninitialized; the others have no element. A batch of nothing still has
// weight gradients.
template <class Make>
Gradients make_gradients(int64_t B, int64_t I, int64_t H, const std::array<bool, 7>& wanted,
                         const Make& make) {
  const auto gradient = [&](int index, at::IntArrayRef shape) {
    const Tensor tensor = make(wanted[index] ? shape : at::IntArrayRef{0});
    return B ? tensor : tensor.zero_();
  };
  return {gradient(0, {B, I}),     gradient(1, {B, H}),  gradient(2, {B, H}), gradient(3, {4 * H, I}),
          gradient(4, {4 * H, H}), gradient(5, {4 * H}), gradient(6, {4 * H})};
}

}  // namespace lstmfused
