// The operators as C++ functions; their schemas are in ops.cpp.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace lstmfused {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using MaybeOwned = c10::MaybeOwned<Tensor>;  // one that is only looked at, unless it had to be made

using State = std::tuple<Tensor, Tensor>;                                              // h, c
using StateAndGates = std::tuple<Tensor, Tensor, Tensor>;                              // h, c, gates
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // as in ops.cpp

using LayerStates = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // output, h, c, cells
using PackedLayerStates = std::tuple<Tensor, Tensor, Tensor>;    // output, h, c
using LayerForward = std::tuple<Tensor, Tensor, Tensor>;         // hidden, cells, gates

// The seven arguments of a step, in the order of the schema, or something for each of them; an absent bias
// is undefined.
enum Argument { kInput, kHx, kCx, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kArguments };
using Arguments = std::array<Tensor, kArguments>;
using Wanted = std::array<bool, kArguments>;
using Tensors = c10::List<OptionalTensor>;                        // torch's Tensor?[]
using UnitTangents = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // as in ops.cpp

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline Arguments array(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                       const Tensor& weight_hh, const OptionalTensor& bias_ih,
                       const OptionalTensor& bias_hh) {
  return {input, hx, cx, weight_ih, weight_hh, bias_ih.value_or(Tensor()), bias_hh.value_or(Tensor())};
}

// Calls through the dispatcher.
State lstm_cell(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                const OptionalTensor& bias_hh);
// The same from within a kernel, by the keys that are left: cheaper than to ask the arguments again.
State redispatch_lstm_cell(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& hx,
                           const OptionalTensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);
StateAndGates lstm_cell_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);
Gradients lstm_cell_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                             const Tensor& gates, const OptionalTensor& input, const OptionalTensor& hx,
                             const Tensor& cx, const OptionalTensor& weight_ih,
                             const OptionalTensor& weight_hh, std::array<bool, 7> output_mask);
Gradients lstm_cell_backward_reuse_gates(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                         const Tensor& gates, const OptionalTensor& input,
                                         const OptionalTensor& hx, const Tensor& cx,
                                         const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                                         std::array<bool, 7> output_mask);

// The gradients, as an operator that can be differentiated itself; and the tangents of step and gradients.
std::vector<Tensor> lstm_cell_gradients(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                        const Tensors& arguments, const Tensor& gates,
                                        std::array<bool, 7> output_mask);
std::vector<Tensor> lstm_cell_tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                       const Tensors& arguments, const Tensor& gates,
                                       const Tensors& tangents, const OptionalTensor& grad_h_tangent,
                                       const OptionalTensor& grad_c_tangent,
                                       std::array<bool, 7> output_mask);
UnitTangents lstm_cell_unit_tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                     const Tensor& gates, const Tensor& cx,
                                     const OptionalTensor& sums_tangent, const OptionalTensor& cx_tangent,
                                     const OptionalTensor& grad_h_tangent,
                                     const OptionalTensor& grad_c_tangent);

// From packed weights: see struct Packed in lstm.h.
State lstm_cell_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                       const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                       int64_t input_size, int64_t hidden_size, int64_t format);

PackedLayerStates lstm_layer_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                                    const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                                    const OptionalTensor& mask, int64_t input_size, int64_t hidden_size,
                                    int64_t format, bool reverse);

// A layer: T steps in one direction.
LayerStates lstm_layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                       const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                       const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse,
                       bool cell_states);
LayerStates redispatch_lstm_layer(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& hx,
                                  const OptionalTensor& cx, const Tensor& weight_ih,
                                  const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                  const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse,
                                  bool cell_states);
LayerForward lstm_layer_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                const Tensor& weight_ih, const Tensor& weight_hh,
                                const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                                const OptionalTensor& mask, bool reverse);
Gradients lstm_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h,
                              const OptionalTensor& grad_c, const OptionalTensor& grad_cells,
                              const OptionalTensor& input, const Tensor& hidden, const Tensor& cells,
                              const Tensor& gates, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                              const OptionalTensor& mask, bool reverse, std::array<bool, 7> output_mask);

struct PackedSizes {
  int64_t I, H, format;  // 0 where weights are not packed
};
// All layers and directions: output, h and c as functional.lstm returns them, or none where Python has to
// see to it: what has no kernel, what is in error, what is followed by a transform, a mode or a tracer. hx
// is empty or h and c; params are, of each layer and direction, weights and biases or, packed, weight, bias
// and perhaps scale.
std::optional<PackedLayerStates> lstm_layers(const Tensor& input, const std::vector<Tensor>& hx,
                                             const std::vector<Tensor>& params, const PackedSizes& packed,
                                             const OptionalTensor& reset, bool has_biases,
                                             int64_t num_layers, double dropout, bool bidirectional,
                                             bool batch_first);

// What lstm_layer returns with the cell states of every step, of buffers of T + 1 states. None shares
// memory that is written with another.
LayerStates layer_states(const Tensor& hidden, const Tensor& cells, bool reverse);

// torch's own cell, for the dtypes without kernels: see has_kernel.
State torch_lstm_cell(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                      const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh);

// The step in torch's own differentiable operators, for the derivatives that no kernel computes (of a step
// in both modes at once) and for weights that differ from batch to batch: every argument may have a further
// dimension in front.
State lstm_cell_composed(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                         const Tensor& weight_hh, const OptionalTensor& bias_ih,
                         const OptionalTensor& bias_hh);

// lstm_cell_backward, likewise.
Gradients lstm_cell_backward_composed(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                      const Tensor& gates, const OptionalTensor& input,
                                      const OptionalTensor& hx, const Tensor& cx,
                                      const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                                      std::array<bool, 7> output_mask);

// Whether a row of h and c is to depend on nothing but the row, to the bit: for the whole process.
bool batch_invariant();
void set_batch_invariant(bool on);

// Raises what lstm_cell does for these arguments, and does nothing else.
void check_lstm_cell(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                     const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                     const OptionalTensor& bias_hh);

// The same for lstm_layer.
void check_lstm_layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                      const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh, const OptionalTensor& mask);

void check_lstm_cell_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                            const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                            int64_t input_size, int64_t hidden_size, int64_t format);
void check_lstm_layer_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                             const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                             const OptionalTensor& mask, int64_t input_size, int64_t hidden_size,
                             int64_t format);

}  // namespace lstmfused
