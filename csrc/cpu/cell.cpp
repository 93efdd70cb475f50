// The cell's operators on CPU tensors: Tensor -> struct.
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "../batch.h"
#include "../ops.h"
#include "../tensors.h"
#include "runtime.h"

namespace lstmfused {
namespace {

// gates are undefined where they are not wanted.
State compute(const ForwardTensors& given, const Tensor& gates) {
  const at::ScalarType dtype = given.input->scalar_type();
  const Tensor h = empty_cpu({given.B, given.H}, dtype),
               c = empty_cpu({given.B, given.H}, given.cx->scalar_type());
  if (h.numel())
    with_kernels(dtype, [&](const auto& kernels) {
      using T = typename std::decay_t<decltype(kernels)>::dtype;
      Forward<T> p = given.with<T>(h, c, gates);
      Tensor sums;
      if (p.batch_invariant &&
          p.I) {  // the order of sums is that of a layer, which makes those of the input first
        sums = empty_cpu({given.B, 4 * given.H}, at::toOpMathType(dtype));
        Forward<T> inputs = p;
        inputs.sums = out<Accumulate<T>>(sums);
        kernels.forward(inputs, pool());
        p.I = 0;
        p.bias_ih = p.bias_hh = nullptr;
        p.starting_sums = inputs.sums;
      }
      kernels.forward(p, pool());
    });
  return {h, c};
}

State step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensor& weight_ih,
           const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  return with_batch(input, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& h, const Tensor& c) {
    if (!has_kernel(x.scalar_type(), c.scalar_type()))
      return torch_lstm_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
    return compute(forward_tensors(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh), /*gates=*/{});
  });
}

StateAndGates forward(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                      const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh) {
  const ForwardTensors given = forward_tensors(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor gates = empty_cpu({given.B, 4 * given.H}, input.scalar_type());
  const auto [h, c] = compute(given, gates);
  return {h, c, gates};
}

// With reuse_gates the gate gradients may overwrite the gates, where they are of one type and a gate's
// units fill a cache line: of fewer units, loads would wait for the stores just before them.
template <bool reuse_gates>
Gradients backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                   const OptionalTensor& input, const OptionalTensor& hx, const Tensor& cx,
                   const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                   std::array<bool, 7> output_mask) {
  const BackwardTensors given =
      backward_tensors(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
  const at::ScalarType dtype = gates.scalar_type();
  const Gradients gradients = given.gradients(output_mask, empty_cpu);
  if (!cx.numel()) return gradients;

  with_kernels(dtype, [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::dtype;
    const bool fits = std::is_same_v<T, Accumulate<T>> && given.H * sizeof(T) >= 64;
    const Tensor grad_gates =
        reuse_gates && fits
            ? *given.gates
            : empty_cpu({backward_rows<T>(given.B, given.I, given.H), backward_stride<T>(given.H)},
                        at::toOpMathType(dtype));
    kernels.backward(given.with<T, Accumulate<T>>(grad_gates, gradients), pool());
  });
  return gradients;
}

}  // namespace
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CPU, m) {
  m.impl("lstm_cell", lstmfused::step);
  m.impl("lstm_cell_forward", lstmfused::forward);
  m.impl("lstm_cell_backward", lstmfused::backward<false>);
  m.impl("lstm_cell_backward_reuse_gates", lstmfused::backward<true>);
}
