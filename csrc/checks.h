// Every check of an argument. They come before any memory is touched; where torch has words, these are
// torch's words first.
#pragma once
#include "ops.h"

namespace lstmfused {

// Ranks as torch.nn.LSTMCell wants them: all (B, ...) or all unbatched.
void check_ranks(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx);

// Whether there are kernels for these dtypes of the input and of c, which beside a half type may be in
// float32. What else torch's cell takes is left to it.
inline bool has_kernel(at::ScalarType input, at::ScalarType cx) {
  const bool half = input == at::kBFloat16 || input == at::kHalf;
  return (half && cx == at::kFloat) ||
         (cx == input && (half || input == at::kFloat || input == at::kDouble));
}

// One step on batched tensors: input (B, I), hx and cx (B, H), weight_ih (4H, I), weight_hh (4H, H),
// biases (4H).
void check_shapes(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                  const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);

// The same, and dtypes that have kernels, one device, strided.
void check_step(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);

// A layer: input (T, B, I), states (B, H), or none of them.
void check_layer_ranks(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx);
void check_layer_ranks(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                       const Tensor& weight_hh);

// The same, and what check_step checks of each step; mask uint8 (T, B).
void check_layer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                 const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                 const OptionalTensor& mask);

// A layer backward: gates (T, B, 4H), hidden and cells (T + 1, B, H).
void check_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h,
                          const OptionalTensor& grad_c, const OptionalTensor& grad_cells,
                          const OptionalTensor& input, const Tensor& hidden, const Tensor& cells,
                          const Tensor& gates, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                          const OptionalTensor& mask, const Wanted& wanted);

// One step on batched tensors from packed weights, see struct Packed in lstm.h.
void check_packed(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight,
                  const Tensor& bias, const OptionalTensor& scale, int64_t inputs, int64_t units,
                  int64_t format);

// The same of each step of a layer; mask uint8 (T, B).
void check_packed_layer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight,
                        const Tensor& bias, const OptionalTensor& scale, const OptionalTensor& mask,
                        int64_t inputs, int64_t units, int64_t format);

// Whether those are there that the wanted gradients take.
void check_needed(const OptionalTensor& input, const OptionalTensor& hx, const OptionalTensor& weight_ih,
                  const OptionalTensor& weight_hh, const std::array<bool, 7>& wanted);

// One step backward; see check_needed.
void check_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                    const OptionalTensor& input, const OptionalTensor& hx, const Tensor& cx,
                    const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                    const std::array<bool, 7>& wanted);

}  // namespace lstmfused
