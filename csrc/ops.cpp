// Every operator: the table of contents.
//
//   lstm_cell            the step, batched or not                      cpu/lstm_cpu.cpp, cuda/lstm_cuda.cpp
//   lstm_cell_forward    the step on batched tensors, and its gates    cpu/lstm_cpu.cpp, cuda/lstm_cuda.cpp
//   lstm_cell_backward   its gradients                                 cpu/lstm_cpu.cpp, cuda/lstm_cuda.cpp
//   lstm_cell_backward_  the same, and gates are used up               cpu/lstm_cpu.cpp, cuda/lstm_cuda.cpp
//   lstm_cell_frozen     the step from packed weights, batched or not  frozen.cpp
//
// How lstm_cell is differentiated by the three after it is in autograd.cpp.
//
// Shapes: B batch, I input, H units; a gate buffer is (B, 4H) with gates in the order i, f, g, o.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <atomic>

TORCH_LIBRARY(lstmfused, m) {
  m.def(
      "lstm_cell(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih=None, Tensor? bias_hh=None) -> (Tensor h, Tensor c)",
      {at::Tag::pt2_compliant_tag});
  // gates are the activated ones
  m.def(
      "lstm_cell_forward(Tensor input, Tensor hx, Tensor cx, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih, Tensor? bias_hh) -> (Tensor h, Tensor c, Tensor gates)",
      {at::Tag::pt2_compliant_tag});
  // A gradient that output_mask does not ask for has no element. grad_input takes weight_ih, grad_hx
  // weight_hh, grad_weight_ih input and grad_weight_hh hx: what is not needed may be left out.
  m.def(
      "lstm_cell_backward(Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor? input, Tensor? hx, "
      "Tensor cx, Tensor? weight_ih, Tensor? weight_hh, bool[7] output_mask) -> (Tensor grad_input, "
      "Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, "
      "Tensor grad_bias_hh)",
      {at::Tag::pt2_compliant_tag});
  // gates may become anything
  m.def(
      "lstm_cell_backward_(Tensor? grad_h, Tensor? grad_c, Tensor(a!) gates, Tensor? input, Tensor? hx, "
      "Tensor cx, Tensor? weight_ih, Tensor? weight_hh, bool[7] output_mask) -> (Tensor grad_input, "
      "Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, "
      "Tensor grad_bias_hh)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lstm_cell_frozen(Tensor input, Tensor? hx, Tensor? cx, Tensor weight, Tensor bias, Tensor? scale, "
      "int input_size, int hidden_size) -> (Tensor h, Tensor c)",
      {at::Tag::pt2_compliant_tag});
}

namespace lstmfused {

static std::atomic<bool> invariant{false};

bool batch_invariant() { return invariant.load(std::memory_order_relaxed); }
void set_batch_invariant(bool on) { invariant = on; }

// A typed handle, found once: a call through it boxes nothing.
#define LSTMFUSED_HANDLE(op) \
  static const auto handle = \
      c10::Dispatcher::singleton().findSchemaOrThrow("lstmfused::" #op, "").typed<decltype(op)>()

State lstm_cell(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                const OptionalTensor& bias_hh) {
  LSTMFUSED_HANDLE(lstm_cell);
  return handle.call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
}

State redispatch_lstm_cell(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& hx,
                           const OptionalTensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  LSTMFUSED_HANDLE(lstm_cell);
  return handle.redispatch(keys, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
}

StateAndGates lstm_cell_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  LSTMFUSED_HANDLE(lstm_cell_forward);
  return handle.call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
}

Gradients lstm_cell_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                             const Tensor& gates, const OptionalTensor& input, const OptionalTensor& hx,
                             const Tensor& cx, const OptionalTensor& weight_ih,
                             const OptionalTensor& weight_hh, std::array<bool, 7> output_mask) {
  LSTMFUSED_HANDLE(lstm_cell_backward);
  return handle.call(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
}

Gradients lstm_cell_backward_(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                              const Tensor& gates, const OptionalTensor& input, const OptionalTensor& hx,
                              const Tensor& cx, const OptionalTensor& weight_ih,
                              const OptionalTensor& weight_hh, std::array<bool, 7> output_mask) {
  LSTMFUSED_HANDLE(lstm_cell_backward_);
  return handle.call(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
}

State lstm_cell_frozen(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                       const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                       int64_t input_size, int64_t hidden_size) {
  LSTMFUSED_HANDLE(lstm_cell_frozen);
  return handle.call(input, hx, cx, weight, bias, scale, input_size, hidden_size);
}

}  // namespace lstmfused
