// What makes the step differentiable: gradients by the fused backward kernels, other derivatives by torch's
// own operators; and autocast.
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "batch.h"
#include "checks.h"
#include "ops.h"

namespace lstmfused {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

State compose(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
              const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const auto product = [](const Tensor& left, const Tensor& weight, const OptionalTensor& bias) {
    if (weight.dim() == 2 && (!bias || bias->dim() == 1)) return at::linear(left, weight, bias);
    const Tensor sums = at::matmul(left, weight.mT());
    return bias ? sums + bias->unsqueeze(-2) : sums;
  };
  const auto gates = (product(input, weight_ih, bias_ih) + product(hx, weight_hh, bias_hh)).chunk(4, -1);
  const Tensor c = gates[1].sigmoid() * cx + gates[0].sigmoid() * gates[2].tanh();
  return {gates[3].sigmoid() * c.tanh(), c};
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Indices of the seven arguments, in the order of the schema.
enum Argument { kInput, kHx, kCx, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kArguments };

// Gradients that can be differentiated again: those of the composed step. Each argument enters under an
// alias, so that one computed from another (hx from an earlier input, say) still gets its own share only.
variable_list composed_gradients(const variable_list& saved, const std::array<bool, kArguments>& wanted,
                                 const variable_list& grads) {
  std::array<Tensor, kArguments> a;
  variable_list wanted_inputs;
  for (int i = 0; i < kArguments; i++) {
    if (!saved[i].defined()) continue;
    a[i] = saved[i].view_as(saved[i]);
    if (wanted[i]) wanted_inputs.push_back(a[i]);
  }
  const auto [h, c] = compose(a[kInput], a[kHx], a[kCx], a[kWeightIh], a[kWeightHh], optional(a[kBiasIh]),
                              optional(a[kBiasHh]));
  variable_list outputs, output_grads;
  for (const auto& [output, grad] : {std::pair{h, grads[0]}, std::pair{c, grads[1]}})
    if (grad.defined()) {
      outputs.push_back(output);
      output_grads.push_back(grad);
    }
  variable_list result(kArguments);
  if (outputs.empty() || wanted_inputs.empty()) return result;
  const variable_list found = torch::autograd::grad(outputs, wanted_inputs, output_grads,
                                                    /*retain_graph=*/true, /*create_graph=*/true,
                                                    /*allow_unused=*/true);
  for (int i = 0, next = 0; i < kArguments; i++)
    if (wanted[i] && a[i].defined()) result[i] = found[next++];
  return result;
}

// Inside torch.func.grad, jvp and the like, which refuse a Function made in C++.
bool in_transform() {
  const c10::DispatchKeySet active = c10::impl::tls_local_dispatch_key_set().included_;
  return active.has_any(c10::DispatchKeySet(
      {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
}

// Set where hooks, which may hold it, packed what the graph saved.
constexpr auto kHooked = "hooked";

// Whether no one will see the gates again: the graph goes, and no hook or mode holds or follows what it
// saved. Two owners are the graph's node and the caller.
bool last_use(const AutogradContext& context, const Tensor& gates) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !context.saved_data.count(kHooked) &&
         gates.use_count() <= 2 && !gates.unsafeGetTensorImpl()->is_python_dispatch() &&
         gates.has_storage() && gates.storage().use_count() == 1 &&
         c10::impl::TorchDispatchModeTLS::stack_len() == 0 && !in_transform();
}

struct Step : torch::autograd::Function<Step> {
  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& hx,
                               const Tensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [h, c, gates] = lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
    context->set_materialize_grads(false);
    context->save_for_backward({input, hx, cx, weight_ih, weight_hh, bias_ih.value_or(Tensor()),
                                bias_hh.value_or(Tensor()), gates});
    if (!at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) context->saved_data[kHooked] = true;
    return {h, c};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    std::array<bool, kArguments> wanted;
    for (int i = 0, edge = 0; i < kArguments; i++)  // an absent bias has no edge in the graph
      wanted[i] = saved[i].defined() && context->needs_input_grad(edge++);
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kArguments);
    if (at::GradMode::is_enabled()) return composed_gradients(saved, wanted, grads);

    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor& gates = saved[kArguments];
    const auto gradients = last_use(*context, gates) ? lstm_cell_backward_ : lstm_cell_backward;
    variable_list result =
        std::apply([](auto&&... gradient) { return variable_list{std::move(gradient)...}; },
                   gradients(optional(grads[0]), optional(grads[1]), gates, saved[kInput], saved[kHx],
                             saved[kCx], saved[kWeightIh], saved[kWeightHh], wanted));
    for (int i = 0; i < kArguments; i++)
      if (!wanted[i]) result[i] = Tensor();
    return result;
  }
};

// body gets batched arguments, checked.
template <class Body>
State checked(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
              const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
              const OptionalTensor& bias_hh, const Body& body) {
  return with_batch(input, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& h, const Tensor& c) {
    check_step(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
    return body(x, h, c);
  });
}

State differentiable(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                     const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                     const OptionalTensor& bias_hh) {
  const auto any = [&](auto&& property) {
    return property(input) || (hx && property(*hx)) || (cx && property(*cx)) || property(weight_ih) ||
           property(weight_hh) || (bias_ih && property(*bias_ih)) || (bias_hh && property(*bias_hh));
  };
  const bool composed = in_transform() || any(has_tangent);
  if (!composed &&
      !(at::GradMode::is_enabled() && any([](const Tensor& t) { return t.requires_grad(); }))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_cell(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  }
  return checked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh,
                 [&](const Tensor& x, const Tensor& h, const Tensor& c) -> State {
                   if (composed) return lstm_cell_composed(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
                   const variable_list state = Step::apply(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
                   return {state[0], state[1]};
                 });
}

template <at::DeviceType device>
State autocast(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
               const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
               const OptionalTensor& bias_hh) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [dtype](const auto& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return lstm_cell(cast(input), cast(hx), cast(cx), cast(weight_ih), cast(weight_hh), cast(bias_ih),
                   cast(bias_hh));
}

}  // namespace

State lstm_cell_composed(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                         const Tensor& weight_hh, const OptionalTensor& bias_ih,
                         const OptionalTensor& bias_hh) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !batch_invariant(),
      "lstm_cell: forward-mode derivatives, torch.func's and stacked weights are not "
      "batch-invariant: leave lstmfused.batch_invariant() for them");
  return compose(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
}

void check_lstm_cell(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                     const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                     const OptionalTensor& bias_hh) {
  checked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh,
          [](const Tensor& x, const Tensor& h, const Tensor&) -> State { return {h, h}; });
}

}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, Autograd, m) { m.impl("lstm_cell", lstmfused::differentiable); }
TORCH_LIBRARY_IMPL(lstmfused, AutocastCPU, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(lstmfused, AutocastCUDA, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCUDA>); }
