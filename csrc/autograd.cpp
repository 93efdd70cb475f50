// What makes the step differentiable: gradients by the fused backward kernels, other derivatives by torch's
// own operators; and autocast.
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "batch.h"
#include "checks.h"
#include "composed.h"
#include "second_order.h"

namespace lstmfused {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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
  // The step is done: see apply_function.
  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& hx,
                               const Tensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                               const StateAndGates& done) {
    const auto& [h, c, gates] = done;
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
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kArguments + 1);
    const Tensor& gates = saved[kArguments];
    variable_list result;
    if (at::GradMode::is_enabled() || in_transform() || has_tangent(grads[0]) || has_tangent(grads[1])) {
      Arguments arguments;
      std::copy_n(saved.begin(), int(kArguments), arguments.begin());
      result = lstm_cell_gradients(optional(grads[0]), optional(grads[1]), list(arguments), gates, wanted);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      const auto gradients = last_use(*context, gates) ? lstm_cell_backward_ : lstm_cell_backward;
      result = std::apply([](auto&&... gradient) { return variable_list{std::move(gradient)...}; },
                          gradients(optional(grads[0]), optional(grads[1]), gates, saved[kInput],
                                    saved[kHx], saved[kCx], saved[kWeightIh], saved[kWeightHh], wanted));
    }
    for (int i = 0; i < kArguments; i++)
      if (!wanted[i]) result[i] = Tensor();
    result.emplace_back();  // of what is done
    return result;
  }
};

// A step on batched, checked arguments. Its gates have no derivatives of their own: who uses them knows
// that the arguments made them.
StateAndGates derived(const Asked& asked, const Tensor& input, const Tensor& hx, const Tensor& cx,
                      const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh) {
  StateAndGates done;
  auto& [h, c, gates] = done;
  if (asked.tangents) {
    const Arguments a{
        input, hx, cx, weight_ih, weight_hh, bias_ih.value_or(Tensor()), bias_hh.value_or(Tensor())};
    if (asked.gradients) return composed_step(a);
    std::vector<Tensor> tangents;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      done = lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
      tangents = lstm_cell_tangents({}, {}, list(a), gates, list(tangents_of(a)), {}, {}, {});
    }
    set_tangent(h, tangents[0]);
    set_tangent(c, tangents[1]);
    return done;
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    done = lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  }
  if (asked.gradients) {
    variable_list state = apply_function<Step>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, done);
    h = std::move(state[0]);
    c = std::move(state[1]);
  }
  return done;
}

StateAndGates forward_differentiable(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                     const Tensor& weight_ih, const Tensor& weight_hh,
                                     const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Asked asked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  return derived(asked, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
}

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
  const Asked asked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (!asked.tangents && !asked.gradients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_cell(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  }
  return checked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh,
                 [&](const Tensor& x, const Tensor& h, const Tensor& c) -> State {
                   auto [next_h, next_c, gates] =
                       derived(asked, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
                   return {std::move(next_h), std::move(next_c)};
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
  auto [h, c, gates] = composed_step(
      {input, hx, cx, weight_ih, weight_hh, bias_ih.value_or(Tensor()), bias_hh.value_or(Tensor())});
  return {std::move(h), std::move(c)};
}

void check_lstm_cell(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                     const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                     const OptionalTensor& bias_hh) {
  checked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh,
          [](const Tensor& x, const Tensor& h, const Tensor&) -> State { return {h, h}; });
}

}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, Autograd, m) {
  m.impl("lstm_cell", lstmfused::differentiable);
  m.impl("lstm_cell_forward", lstmfused::forward_differentiable);
}
TORCH_LIBRARY_IMPL(lstmfused, AutocastCPU, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(lstmfused, AutocastCUDA, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCUDA>); }
