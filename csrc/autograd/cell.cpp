// What makes the step differentiable: gradients by the fused backward kernels, what comes after them by
// second_order.cpp.
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/lstm_cell.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "../batch.h"
#include "../checks.h"
#include "composed.h"
#include "second_order.h"

namespace lstmfused {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Set where hooks, which may hold it, packed what the graph saved.
constexpr auto kHooked = "hooked";
// Set where a bias is absent: bit 0 for bias_ih, bit 1 for bias_hh.
constexpr auto kAbsent = "absent";

// Whether the saved gates may be overwritten: the graph is not retained, and no hook, mode or other owner
// than this node and its caller can read them again. A post hook runs while the node still owns them.
bool last_use(const AutogradContext& context, const Tensor& gates) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !context.saved_data.count(kHooked) &&
         gates.use_count() <= 2 && !gates.unsafeGetTensorImpl()->is_python_dispatch() &&
         gates.has_storage() && gates.storage().use_count() == 1 &&
         c10::impl::TorchDispatchModeTLS::stack_len() == 0 && !in_transform() &&
         torch::autograd::get_current_node()->post_hooks().empty();
}

// What first gradients take, and no more: the gradient of a factor takes the other one. All of it where
// others differentiate beside this node, levels below or a traced graph, which must find what the gates are
// made of. The gates come last.
void save(AutogradContext* context, const Tensor& input, const Tensor& hx, const Tensor& cx,
          const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
          const OptionalTensor& bias_hh, const Tensor& gates) {
  const bool all = in_transform() || traced();
  const auto beside = [all](const Tensor& factor, const Tensor& other) {
    return all || other.requires_grad() ? factor : Tensor();
  };
  const auto bias = [all](const OptionalTensor& given) { return all && given ? *given : Tensor(); };
  context->set_materialize_grads(false);
  context->save_for_backward({beside(input, weight_ih), beside(hx, weight_hh), cx, beside(weight_ih, input),
                              beside(weight_hh, hx), bias(bias_ih), bias(bias_hh), gates});
  if (const int64_t absent = !bias_ih + 2 * !bias_hh) context->saved_data[kAbsent] = absent;
  if (!at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) context->saved_data[kHooked] = true;
}

struct Step : torch::autograd::Function<Step> {
  // The step is done: see apply_function.
  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& hx,
                               const Tensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                               const StateAndGates& done) {
    const auto& [h, c, gates] = done;
    save(context, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, gates);
    return {h, c};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list saved = context->get_saved_variables();
    const Tensor gates = std::move(saved[kArguments]);
    const auto found_absent = context->saved_data.find(kAbsent);
    const int64_t absent = found_absent == context->saved_data.end() ? 0 : found_absent->second.toInt();
    std::array<int, kArguments> edges;  // an absent bias has none in the graph
    Wanted wanted;
    for (int i = 0, edge = 0; i < kArguments; i++) {
      edges[i] = i >= kBiasIh && absent >> (i - kBiasIh) & 1 ? -1 : edge++;
      wanted[i] = edges[i] >= 0 && context->needs_input_grad(edges[i]);
    }
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kArguments + 1);
    variable_list result;
    const bool graph = at::GradMode::is_enabled();
    if (graph || in_transform() || has_tangent(grads[0]) || has_tangent(grads[1])) {
      Arguments arguments;
      for (int i = 0; i < kArguments; i++) {
        arguments[i] = std::move(saved[i]);
        if (graph && !arguments[i].defined() && edges[i] >= 0)
          arguments[i] = stand_in(at::empty({}, gates.options()), edges[i]);
      }
      result = lstm_cell_gradients(optional(grads[0]), optional(grads[1]), list(arguments), gates, wanted);
    } else {
      const at::AutoDispatchBelowAutograd guard;
      const auto gradients =
          last_use(*context, gates) ? lstm_cell_backward_reuse_gates : lstm_cell_backward;
      const auto beside = [&](Argument factor, Argument other) {
        return wanted[other] ? optional(saved[factor]) : std::nullopt;
      };
      result = std::apply([](auto&&... gradient) { return variable_list{std::move(gradient)...}; },
                          gradients(optional(grads[0]), optional(grads[1]), gates,
                                    beside(kInput, kWeightIh), beside(kHx, kWeightHh), saved[kCx],
                                    beside(kWeightIh, kInput), beside(kWeightHh, kHx), wanted));
    }
    for (int i = 0; i < kArguments; i++)
      if (!wanted[i]) result[i] = Tensor();
    result.emplace_back();  // of what is done
    return result;
  }
};

// Set while a step asks for gates whose derivatives it knows: levels below need not follow them.
thread_local bool gates_known = false;

// A step on batched, checked arguments. Its gates have no derivatives of their own: who uses them knows
// that the arguments made them.
StateAndGates derived(const Asked& asked, const Tensor& input, const Tensor& hx, const Tensor& cx,
                      const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh) {
  Arguments arguments;
  if (asked.tangents) arguments = array(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (asked.tangents && asked.gradients) return composed_step(arguments);
  StateAndGates done;
  auto& [h, c, gates] = done;
  std::vector<Tensor> tangents;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    {
      const auto restore =
          c10::make_scope_exit([before = std::exchange(gates_known, true)] { gates_known = before; });
      done = lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
    }
    if (asked.tangents)
      tangents =
          lstm_cell_tangents({}, {}, list(arguments), gates, list(tangents_of(arguments)), {}, {}, {});
  }
  if (asked.tangents) {
    set_tangent(h, tangents[0]);
    set_tangent(c, tangents[1]);
  }
  if (asked.gradients) {
    variable_list state = apply_function<Step>(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, done);
    h = std::move(state[0]);
    c = std::move(state[1]);
  }
  return done;
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

State differentiable(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& hx,
                     const OptionalTensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                     const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const auto dtype = input.scalar_type(), cell = cx ? cx->scalar_type() : dtype;
  if (!has_kernel(dtype, cell))
    return with_batch(input, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& h, const Tensor& c) {
      return torch_lstm_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
    });
  const Asked asked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (!asked.tangents && !asked.gradients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_lstm_cell(keys & c10::after_ADInplaceOrView_keyset, input, hx, cx, weight_ih,
                                weight_hh, bias_ih, bias_hh);
  }
  return checked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh,
                 [&](const Tensor& x, const Tensor& h, const Tensor& c) -> State {
                   auto [next_h, next_c, gates] =
                       derived(asked, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
                   return {std::move(next_h), std::move(next_c)};
                 });
}

// The inner operators stand in graphs that were traced with what is above; these may be differentiated.
StateAndGates differentiable_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                     const Tensor& weight_ih, const Tensor& weight_hh,
                                     const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Asked asked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (!asked.tangents && !asked.gradients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  }
  check_step(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  const bool known = gates_known;
  auto [h, c, gates] = derived(asked, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (!known) gates = with_history(gates, array(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh));
  return {h, c, gates};
}

template <bool reuse_gates>
Gradients differentiable_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                  const Tensor& gates, const OptionalTensor& input,
                                  const OptionalTensor& hx, const Tensor& cx,
                                  const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                                  std::array<bool, 7> output_mask) {
  const Asked asked(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh);
  if (asked.tangents || asked.gradients)
    return lstm_cell_backward_composed(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh,
                                       output_mask);
  const at::AutoDispatchBelowAutograd guard;
  return (reuse_gates ? lstm_cell_backward_reuse_gates : lstm_cell_backward)(
      grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
}

// Whoever saved the gates meets torch's error about modified variables.
Gradients backward_reusing_gates(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                 const Tensor& gates, const OptionalTensor& input, const OptionalTensor& hx,
                                 const Tensor& cx, const OptionalTensor& weight_ih,
                                 const OptionalTensor& weight_hh, std::array<bool, 7> output_mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  torch::autograd::increment_version(gates);
  return lstm_cell_backward_reuse_gates(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh,
                                        output_mask);
}

}  // namespace

bool traced() {
  using Modes = c10::impl::TorchDispatchModeTLS;
  using c10::impl::TorchDispatchModeKey;
  return Modes::stack_len() && Modes::get_mode(TorchDispatchModeKey::PROXY) &&
         !Modes::get_mode(TorchDispatchModeKey::FUNCTIONAL);
}

Tensor stand_in(const Tensor& numbers, size_t edge) {
  const auto node = torch::autograd::get_current_node();
  TORCH_CHECK_NOT_IMPLEMENTED(node, "lstm_cell: compiled autograd cannot create a graph");
  const auto& next = node->next_edge(edge);
  if (!next.is_valid()) return {};
  const Tensor result = numbers.detach();
  torch::autograd::impl::set_gradient_edge(result, next);
  return result;
}

State recorded_step(const Arguments& a, const StateAndGates& done) {
  variable_list state = apply_function<Step>(a[kInput], a[kHx], a[kCx], a[kWeightIh], a[kWeightHh],
                                             optional(a[kBiasIh]), optional(a[kBiasHh]), done);
  return {std::move(state[0]), std::move(state[1])};
}

State lstm_cell_composed(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                         const Tensor& weight_hh, const OptionalTensor& bias_ih,
                         const OptionalTensor& bias_hh) {
  auto [h, c, gates] = composed_step(array(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh));
  return {std::move(h), std::move(c)};
}

State torch_lstm_cell(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                      const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh) {
  TORCH_CHECK_NOT_IMPLEMENTED(!batch_invariant(), "lstm_cell: no batch-invariant kernels for ",
                              input.scalar_type(), " with a cell state in ", cx.scalar_type());
  return at::lstm_cell(input, {hx, cx}, weight_ih, weight_hh, bias_ih, bias_hh);
}

Gradients lstm_cell_backward_composed(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                      const Tensor& gates, const OptionalTensor& input,
                                      const OptionalTensor& hx, const Tensor& cx,
                                      const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                                      std::array<bool, 7> output_mask) {
  check_needed(input, hx, weight_ih, weight_hh, output_mask);
  const auto tensor = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
  Arguments found = composed_gradients(
      tensor(grad_h), tensor(grad_c), {tensor(input), tensor(hx), cx, tensor(weight_ih), tensor(weight_hh)},
      gates, output_mask);
  for (int i = 0; i < kArguments; i++)
    if (!output_mask[i]) found[i] = at::empty({0}, (i == kCx ? cx : gates).options());
  return std::tuple_cat(found);
}

void check_lstm_cell(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                     const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                     const OptionalTensor& bias_hh) {
  with_batch(input, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& h, const Tensor& c) -> State {
    const bool kernel = has_kernel(x.scalar_type(), c.scalar_type());
    (kernel ? check_step : check_shapes)(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
    return {h, c};
  });
}

}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, Autograd, m) {
  m.impl("lstm_cell", lstmfused::differentiable);
  m.impl("lstm_cell_forward", lstmfused::differentiable_forward);
  m.impl("lstm_cell_backward", lstmfused::differentiable_backward<false>);
  m.impl("lstm_cell_backward_reuse_gates", lstmfused::differentiable_backward<true>);
}
TORCH_LIBRARY_IMPL(lstmfused, ADInplaceOrView, m) {
  m.impl("lstm_cell_backward_reuse_gates", lstmfused::backward_reusing_gates);
}
// Under vmap, torch.func's and that of is_grads_batched, whose rules then are those of torch's operators.
TORCH_LIBRARY_IMPL(lstmfused, FuncTorchBatched, m) {
  m.impl("lstm_cell_backward", lstmfused::lstm_cell_backward_composed);
  m.impl("lstm_cell_backward_reuse_gates", lstmfused::lstm_cell_backward_composed);
}
TORCH_LIBRARY_IMPL(lstmfused, Batched, m) {
  m.impl("lstm_cell_backward", lstmfused::lstm_cell_backward_composed);
  m.impl("lstm_cell_backward_reuse_gates", lstmfused::lstm_cell_backward_composed);
}
