// Every operator: its schema, and which file has it for which dispatch key.
//
//                                  CPU            CUDA       Autograd      Autocast  vmap          fake
//   lstm_cell                      cpu/cell       cuda/cell  cell          autocast  _ops/vmap.py  yes
//   lstm_cell_forward              cpu/cell       cuda/cell  cell                    second_order  yes
//   lstm_cell_backward             cpu/cell       cuda/cell  cell                    cell          yes
//   lstm_cell_backward_reuse_gates cpu/cell       cuda/cell  cell                    cell          yes
//   lstm_cell_gradients            second_order   the same   second_order            second_order
//   lstm_cell_tangents             second_order   the same   second_order            second_order
//   lstm_cell_unit_tangents        cpu/tangents   composed
//   lstm_cell_packed               cpu/packed                cpu/packed    cpu/packed              yes
//   lstm_layer                     cpu/layer      stepped    layer         autocast  _ops/vmap.py  yes
//   lstm_layer_forward             cpu/layer      stepped    layer                                 yes
//   lstm_layer_backward            cpu/layer      stepped    layer                                 yes
//   lstm_layer_packed              cpu/packed                cpu/packed    cpu/packed              yes
//
// autograd/ has cell, layer, autocast, second_order, composed and stepped, the layer as a loop over the
// cell; lstmfused/_ops/fake.py the fake kernels; python.cpp the bindings.
//
// lstm_cell is the step, batched or not; what autograd makes of it is lstm_cell_forward, which also returns
// the gates, and lstm_cell_backward. lstm_cell_gradients are the same gradients, to be differentiated
// again, by lstm_cell_tangents: directional derivatives of step and gradients, of which
// lstm_cell_unit_tangents is the part without products.
//
// lstm_layer is T steps in one direction; lstm_layer_forward and lstm_layer_backward are what autograd
// makes of it.
//
// Shapes: T steps, B batch, I input, H units; a gate buffer is (B, 4H) with gates in the order i, f, g, o.
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
  // The same; the contents of gates are undefined afterwards, since the gate gradients may take their
  // place.
  m.def(
      "lstm_cell_backward_reuse_gates(Tensor? grad_h, Tensor? grad_c, Tensor(a!) gates, Tensor? input, "
      "Tensor? hx, Tensor cx, Tensor? weight_ih, Tensor? weight_hh, bool[7] output_mask) -> (Tensor "
      "grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor "
      "grad_bias_ih, Tensor grad_bias_hh)",
      {at::Tag::pt2_compliant_tag});
  // As lstm_cell_backward. The arguments are the seven of lstm_cell, and their gates are known: derivatives
  // are those with respect to the arguments, on which the gates depend, and there is none to the gates.
  m.def(
      "lstm_cell_gradients(Tensor? grad_h, Tensor? grad_c, Tensor?[] arguments, Tensor gates, "
      "bool[7] output_mask) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  // From the tangents of the seven arguments and of the gradients of h and c: those of h, of c, and of the
  // seven gradients, as far as output_mask asks for them. None is zero, on either side.
  m.def(
      "lstm_cell_tangents(Tensor? grad_h, Tensor? grad_c, Tensor?[] arguments, Tensor gates, "
      "Tensor?[] tangents, Tensor? grad_h_tangent, Tensor? grad_c_tangent, bool[7] output_mask) -> "
      "Tensor[]",
      {at::Tag::pt2_compliant_tag});
  // Of each unit alone, from the tangents of the gates' sums; all in the type that sums are formed in.
  // grad_gates (2, B, 4H) are the tangents of the sums' gradients, then these themselves; they and
  // grad_cx_tangent have no element where there are no gradients.
  m.def(
      "lstm_cell_unit_tangents(Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor cx, "
      "Tensor? sums_tangent, Tensor? cx_tangent, Tensor? grad_h_tangent, Tensor? grad_c_tangent) -> "
      "(Tensor h_tangent, Tensor c_tangent, Tensor grad_gates, Tensor grad_cx_tangent)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lstm_cell_packed(Tensor input, Tensor? hx, Tensor? cx, Tensor weight, Tensor bias, Tensor? scale, "
      "int input_size, int hidden_size, int format) -> (Tensor h, Tensor c)",
      {at::Tag::pt2_compliant_tag});
  // input (T, B, I), hx and cx (B, H). mask (T, B) has a RowMask, see lstm.h, for each row of each step.
  // With reverse the last step comes first; output is the state after each step, h and c are those after
  // the last one that was taken, cells (T, B, H) each c if cell_states, else without an element.
  m.def(
      "lstm_layer(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih, Tensor? bias_hh, Tensor? mask, bool reverse, bool cell_states) -> (Tensor output, "
      "Tensor h, Tensor c, Tensor cells)",
      {at::Tag::pt2_compliant_tag});
  // hidden and cells (T + 1, B, H) begin, or with reverse end, with hx and cx.
  m.def(
      "lstm_layer_forward(Tensor input, Tensor hx, Tensor cx, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih, Tensor? bias_hh, Tensor? mask, bool reverse) -> (Tensor hidden, Tensor cells, "
      "Tensor gates)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lstm_layer_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor? grad_cells, "
      "Tensor? input, Tensor hidden, Tensor cells, Tensor gates, Tensor? weight_ih, Tensor weight_hh, "
      "Tensor? mask, bool reverse, bool[7] output_mask) -> (Tensor grad_input, Tensor grad_hx, "
      "Tensor grad_cx, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, "
      "Tensor grad_bias_hh)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "lstm_layer_packed(Tensor input, Tensor? hx, Tensor? cx, Tensor weight, Tensor bias, Tensor? scale, "
      "Tensor? mask, int input_size, int hidden_size, int format, bool reverse) -> (Tensor output, "
      "Tensor h, Tensor c)",
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

Gradients lstm_cell_backward_reuse_gates(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                         const Tensor& gates, const OptionalTensor& input,
                                         const OptionalTensor& hx, const Tensor& cx,
                                         const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                                         std::array<bool, 7> output_mask) {
  LSTMFUSED_HANDLE(lstm_cell_backward_reuse_gates);
  return handle.call(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
}

std::vector<Tensor> lstm_cell_gradients(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                        const Tensors& arguments, const Tensor& gates,
                                        std::array<bool, 7> output_mask) {
  LSTMFUSED_HANDLE(lstm_cell_gradients);
  return handle.call(grad_h, grad_c, arguments, gates, output_mask);
}

std::vector<Tensor> lstm_cell_tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                       const Tensors& arguments, const Tensor& gates,
                                       const Tensors& tangents, const OptionalTensor& grad_h_tangent,
                                       const OptionalTensor& grad_c_tangent,
                                       std::array<bool, 7> output_mask) {
  LSTMFUSED_HANDLE(lstm_cell_tangents);
  return handle.call(grad_h, grad_c, arguments, gates, tangents, grad_h_tangent, grad_c_tangent,
                     output_mask);
}

UnitTangents lstm_cell_unit_tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                     const Tensor& gates, const Tensor& cx,
                                     const OptionalTensor& sums_tangent, const OptionalTensor& cx_tangent,
                                     const OptionalTensor& grad_h_tangent,
                                     const OptionalTensor& grad_c_tangent) {
  LSTMFUSED_HANDLE(lstm_cell_unit_tangents);
  return handle.call(grad_h, grad_c, gates, cx, sums_tangent, cx_tangent, grad_h_tangent, grad_c_tangent);
}

State lstm_cell_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                       const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                       int64_t input_size, int64_t hidden_size, int64_t format) {
  LSTMFUSED_HANDLE(lstm_cell_packed);
  return handle.call(input, hx, cx, weight, bias, scale, input_size, hidden_size, format);
}

PackedLayerStates lstm_layer_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                                    const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                                    const OptionalTensor& mask, int64_t input_size, int64_t hidden_size,
                                    int64_t format, bool reverse) {
  LSTMFUSED_HANDLE(lstm_layer_packed);
  return handle.call(input, hx, cx, weight, bias, scale, mask, input_size, hidden_size, format, reverse);
}

LayerStates lstm_layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                       const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                       const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse,
                       bool cell_states) {
  LSTMFUSED_HANDLE(lstm_layer);
  return handle.call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse, cell_states);
}

LayerStates redispatch_lstm_layer(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& hx,
                                  const OptionalTensor& cx, const Tensor& weight_ih,
                                  const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                  const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse,
                                  bool cell_states) {
  LSTMFUSED_HANDLE(lstm_layer);
  return handle.redispatch(keys, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse,
                           cell_states);
}

LayerForward lstm_layer_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                                const OptionalTensor& mask, bool reverse) {
  LSTMFUSED_HANDLE(lstm_layer_forward);
  return handle.call(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse);
}

Gradients lstm_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h,
                              const OptionalTensor& grad_c, const OptionalTensor& grad_cells,
                              const OptionalTensor& input, const Tensor& hidden, const Tensor& cells,
                              const Tensor& gates, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                              const OptionalTensor& mask, bool reverse, std::array<bool, 7> output_mask) {
  LSTMFUSED_HANDLE(lstm_layer_backward);
  return handle.call(grad_output, grad_h, grad_c, grad_cells, input, hidden, cells, gates, weight_ih,
                     weight_hh, mask, reverse, output_mask);
}

}  // namespace lstmfused
