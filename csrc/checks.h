// Every check of an argument. They come before any memory is touched; where torch has words, these are
// torch's words first.
#pragma once
#include "ops.h"

namespace lstmfused {

// Ranks as torch.nn.LSTMCell wants them: all (B, ...) or all unbatched.
void check_ranks(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx);

// One step on batched tensors: input (B, I), hx and cx (B, H), weight_ih (4H, I), weight_hh (4H, H),
// biases (4H); one floating dtype, one device, strided.
void check_step(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);

// One step on batched tensors from packed weights, as frozen.cpp has them.
void check_frozen(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight,
                  const Tensor& bias, const OptionalTensor& scale, int64_t inputs, int64_t units);

// What the backward step gets beside the arguments of the step.
void check_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                    const Tensor& cx);

}  // namespace lstmfused
