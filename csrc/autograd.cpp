// What makes the step differentiable: gradients by the fused backward kernels, other derivatives by torch's
// own operators; and autocast.
#include <ATen/OpMathType.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/lstm_cell.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
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
using torch::autograd::edge_list;
using torch::autograd::variable_list;

struct Composed {
  Tensor h, c;
  std::array<Tensor, 4> gates;
};

Composed compose(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                 const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const auto product = [](const Tensor& left, const Tensor& weight, const OptionalTensor& bias) {
    if (weight.dim() == 2 && (!bias || bias->dim() == 1)) return at::linear(left, weight, bias);
    const Tensor sums = at::matmul(left, weight.mT());
    return bias ? sums + bias->unsqueeze(-2) : sums;
  };
  const auto sums = (product(input, weight_ih, bias_ih) + product(hx, weight_hh, bias_hh)).chunk(4, -1);
  const Tensor i = sums[0].sigmoid(), f = sums[1].sigmoid(), g = sums[2].tanh(), o = sums[3].sigmoid();
  const Tensor c = f * cx + i * g;
  const Tensor h = o * c.tanh();
  return {has_kernel(o.scalar_type(), c.scalar_type()) ? h.to(o.scalar_type()) : h, c, {i, f, g, o}};
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Indices of the seven arguments, in the order of the schema.
enum Argument { kInput, kHx, kCx, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kArguments };

// The gradients of the step from those of h, c and the gates, in torch's own differentiable operators. From
// the gates on nothing but tanh(c') is computed again. An argument is there if a wanted gradient takes it.
std::array<Tensor, kArguments> composed_gradients(const Tensor& grad_h, const Tensor& grad_c,
                                                  const Tensor& grad_gates, const Tensor& gates,
                                                  const std::array<Tensor, kBiasIh>& given,
                                                  const std::array<bool, kArguments>& wanted) {
  const at::ScalarType dtype = gates.scalar_type(), wide = at::toOpMathType(dtype);
  const auto gate = gates.to(wide).chunk(4, -1);
  const auto &i = gate[0], &f = gate[1], &g = gate[2], &o = gate[3];
  std::array<Tensor, kArguments> result;
  Tensor grad;  // of the activated gates
  if (grad_h.defined() || grad_c.defined()) {
    const Tensor& c = given[kCx];
    const Tensor tanh_c = (f * c + i * g).tanh();
    Tensor grad_next = grad_c;
    if (grad_h.defined()) {
      const Tensor through_h = grad_h * o * (1 - tanh_c * tanh_c);
      grad_next = grad_c.defined() ? grad_c + through_h : through_h;
    }
    if (wanted[kCx]) result[kCx] = (grad_next * f).to(c.scalar_type());
    const Tensor grad_o = grad_h.defined() ? grad_h * tanh_c : at::zeros_like(o);
    grad = at::cat({grad_next * g, grad_next * c, grad_next * i, grad_o.to(grad_next.scalar_type())}, -1);
  }
  if (grad_gates.defined()) grad = grad.defined() ? grad + grad_gates : grad_gates;
  if (!grad.defined()) return result;
  const Tensor sums = (grad * at::cat({i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)}, -1)).to(dtype);
  if (wanted[kInput]) result[kInput] = sums.mm(given[kWeightIh]);
  if (wanted[kHx]) result[kHx] = sums.mm(given[kWeightHh]);
  if (wanted[kWeightIh]) result[kWeightIh] = sums.t().mm(given[kInput]);
  if (wanted[kWeightHh]) result[kWeightHh] = sums.t().mm(given[kHx]);
  if (wanted[kBiasIh] || wanted[kBiasHh]) {
    const Tensor bias = sums.sum(0);
    if (wanted[kBiasIh]) result[kBiasIh] = bias;
    if (wanted[kBiasHh]) result[kBiasHh] = wanted[kBiasIh] ? bias.clone() : bias;
  }
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
// Set where a bias is absent: bit 0 for bias_ih, bit 1 for bias_hh.
constexpr auto kAbsent = "absent";

// Whether no one will see the gates again: the graph goes, and no hook or mode holds or follows what it
// saved. Two owners are the graph's node and the caller. A post hook runs before the node lets go.
bool last_use(const AutogradContext& context, const Tensor& gates) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !context.saved_data.count(kHooked) &&
         gates.use_count() <= 2 && !gates.unsafeGetTensorImpl()->is_python_dispatch() &&
         gates.has_storage() && gates.storage().use_count() == 1 &&
         c10::impl::TorchDispatchModeTLS::stack_len() == 0 && !in_transform() &&
         torch::autograd::get_current_node()->post_hooks().empty();
}

// What backward may need, and no more: the gradient of a factor takes the other one. The gates come last.
void save(AutogradContext* context, const Tensor& input, const Tensor& hx, const Tensor& cx,
          const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
          const OptionalTensor& bias_hh, const Tensor& gates) {
  const auto beside = [](const Tensor& factor, const Tensor& other) {
    return other.requires_grad() ? factor : Tensor();
  };
  context->set_materialize_grads(false);
  context->save_for_backward({beside(input, weight_ih), beside(hx, weight_hh), cx, beside(weight_ih, input),
                              beside(weight_hh, hx), gates});
  if (const int64_t absent = !bias_ih + 2 * !bias_hh) context->saved_data[kAbsent] = absent;
  if (!at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) context->saved_data[kHooked] = true;
}

// As this version of torch owns its nodes.
template <class T>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>)
    return c10::make_intrusive<T>();
  else
    return std::make_shared<T>();
}

// The gates as a function of the arguments of a step: what gradients that are differentiated again depend
// on beside what they are given. Their node has the edges of the step's.
struct GatesNode : torch::autograd::Node {
  std::array<torch::autograd::SavedVariable, kBiasIh> given;
  torch::autograd::SavedVariable gates;
  std::array<int, kArguments> edges;  // to the arguments, or -1

  std::string name() const override { return "LSTMCellGatesBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::array<Tensor, kBiasIh> unpacked;
    for (int i = 0; i < kBiasIh; i++) unpacked[i] = given[i].unpack();
    std::array<bool, kArguments> wanted;
    for (int i = 0; i < kArguments; i++) wanted[i] = edges[i] >= 0 && task_should_compute_output(edges[i]);
    const auto found = composed_gradients({}, {}, grads[0], gates.unpack(getptr()), unpacked, wanted);
    variable_list result(num_outputs());
    for (int i = 0; i < kArguments; i++)
      if (edges[i] >= 0) result[edges[i]] = found[i];
    return result;
  }
  void release_variables() override {
    for (auto& variable : given) variable.reset_data();
    gates.reset_data();
  }
};

Tensor connected_gates(const Tensor& gates, const std::array<Tensor, kBiasIh>& given,
                       const std::array<int, kArguments>& edges) {
  const auto step = torch::autograd::get_current_node();
  TORCH_CHECK_NOT_IMPLEMENTED(step, "lstm_cell: compiled autograd cannot create a graph");
  const auto node = make_node<GatesNode>();
  node->set_next_edges(edge_list(step->next_edges()));
  node->edges = edges;
  for (int i = 0; i < kBiasIh; i++) node->given[i] = {given[i], /*is_output=*/false};
  const Tensor result = gates.detach();
  torch::autograd::set_history(result, node);
  node->gates = {result, /*is_output=*/true};
  return result;
}

variable_list step_backward(AutogradContext* context, const variable_list& grads) {
  variable_list saved = context->get_saved_variables();
  const Tensor gates = std::move(saved[kBiasIh]);
  const auto found_absent = context->saved_data.find(kAbsent);
  const int64_t absent_biases =
      found_absent == context->saved_data.end() ? 0 : found_absent->second.toInt();
  std::array<int, kArguments> edges;  // an absent bias has none in the graph
  std::array<bool, kArguments> wanted;
  for (int i = 0, edge = 0; i < kArguments; i++) {
    const bool absent = i >= kBiasIh && absent_biases >> (i - kBiasIh) & 1;
    edges[i] = absent ? -1 : edge++;
    wanted[i] = !absent && context->needs_input_grad(edges[i]);
  }
  const auto defined = [&](size_t i) { return i < grads.size() && grads[i].defined(); };
  if (!defined(0) && !defined(1) && !defined(2)) return variable_list(kArguments);

  if (at::GradMode::is_enabled() || defined(2)) {
    std::array<Tensor, kBiasIh> given;
    std::move(saved.begin(), saved.begin() + kBiasIh, given.begin());
    const bool output = gates.requires_grad();  // one of the step's own
    const auto found = composed_gradients(
        grads[0], grads[1], defined(2) ? grads[2] : Tensor(),
        output || !at::GradMode::is_enabled() ? gates : connected_gates(gates, given, edges), given,
        wanted);
    return variable_list(found.begin(), found.end());
  }

  const at::AutoDispatchBelowAutograd guard;
  const auto gradients = last_use(*context, gates) ? lstm_cell_backward_ : lstm_cell_backward;
  variable_list result =
      std::apply([](auto&&... gradient) { return variable_list{std::move(gradient)...}; },
                 gradients(optional(grads[0]), optional(grads[1]), gates, optional(saved[kInput]),
                           optional(saved[kHx]), saved[kCx], optional(saved[kWeightIh]),
                           optional(saved[kWeightHh]), wanted));
  for (int i = 0; i < kArguments; i++)
    if (!wanted[i]) result[i] = Tensor();
  return result;
}

template <class Self, bool with_gates>
struct StepFunction : torch::autograd::Function<Self> {
  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& hx,
                               const Tensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [h, c, gates] = lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
    save(context, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, gates);
    return with_gates ? variable_list{h, c, gates} : variable_list{h, c};
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return step_backward(context, grads);
  }
};
struct Step : StepFunction<Step, false> {};
struct StepAndGates : StepFunction<StepAndGates, true> {};

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

template <class... Tensors, class Property>
bool any(const Property& property, const Tensors&... tensors) {
  const auto has = [&](const auto& tensor) {
    if constexpr (std::is_same_v<std::decay_t<decltype(tensor)>, Tensor>)
      return property(tensor);
    else
      return tensor.has_value() && property(*tensor);
  };
  return (has(tensors) || ...);
}

// How a call is to be differentiated: not at all, through torch's operators, or by a node of its own.
enum class Way { kNone, kComposed, kNode };
template <class... Tensors>
Way way(const Tensors&... tensors) {
  if (in_transform() || any(has_tangent, tensors...)) return Way::kComposed;
  const bool recorded =
      at::GradMode::is_enabled() && any([](const Tensor& t) { return t.requires_grad(); }, tensors...);
  return recorded ? Way::kNode : Way::kNone;
}

State differentiable(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& hx,
                     const OptionalTensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                     const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const auto dtype = input.scalar_type(), cell = cx ? cx->scalar_type() : dtype;
  if (!has_kernel(dtype, cell))
    return with_batch(input, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& h, const Tensor& c) {
      return torch_lstm_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
    });
  const Way how = way(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (how == Way::kNone) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_lstm_cell(keys & c10::after_ADInplaceOrView_keyset, input, hx, cx, weight_ih,
                                weight_hh, bias_ih, bias_hh);
  }
  return checked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh,
                 [&](const Tensor& x, const Tensor& h, const Tensor& c) -> State {
                   if (how == Way::kComposed)
                     return lstm_cell_composed(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
                   const variable_list state = Step::apply(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
                   return {state[0], state[1]};
                 });
}

// The inner operators stand in graphs that were traced with what is above; these may be differentiated.
StateAndGates differentiable_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                     const Tensor& weight_ih, const Tensor& weight_hh,
                                     const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Way how = way(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (how == Way::kNone) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  }
  check_step(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (how == Way::kComposed) {
    const auto [h, c, gates] = compose(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
    return {h, c, at::cat(gates, -1)};
  }
  const variable_list found = StepAndGates::apply(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  return {found[0], found[1], found[2]};
}

template <bool in_place>
Gradients differentiable_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                  const Tensor& gates, const OptionalTensor& input,
                                  const OptionalTensor& hx, const Tensor& cx,
                                  const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                                  std::array<bool, 7> output_mask) {
  if (way(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh) != Way::kNone)
    return lstm_cell_backward_composed(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh,
                                       output_mask);
  const at::AutoDispatchBelowAutograd guard;
  return (in_place ? lstm_cell_backward_ : lstm_cell_backward)(grad_h, grad_c, gates, input, hx, cx,
                                                               weight_ih, weight_hh, output_mask);
}

// Who saved the gates before is to notice.
Gradients backward_in_place(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                            const OptionalTensor& input, const OptionalTensor& hx, const Tensor& cx,
                            const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                            std::array<bool, 7> output_mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  torch::autograd::increment_version(gates);
  return lstm_cell_backward_(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
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
  const auto step = [&](const Tensor& x, const Tensor& h, const Tensor& c) {
    return lstm_cell(x, h, c, cast(weight_ih), cast(weight_hh), cast(bias_ih), cast(bias_hh));
  };
  if (hx && cx) return step(cast(input), cast(*hx), at::autocast::cached_cast(at::kFloat, *cx, device));
  const Tensor x = cast(input);
  return with_batch(x, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& zeros, const Tensor&) {
    return step(x, zeros,
                x.scalar_type() == dtype ? zero_state(x, weight_hh.sym_size(-1), at::kFloat) : zeros);
  });
}

}  // namespace

State lstm_cell_composed(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                         const Tensor& weight_hh, const OptionalTensor& bias_ih,
                         const OptionalTensor& bias_hh) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !batch_invariant(),
      "lstm_cell: forward-mode derivatives, torch.func's and stacked weights are not "
      "batch-invariant: leave lstmfused.batch_invariant() for them");
  const auto [h, c, gates] = compose(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  return {h, c};
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
  // The operator has zeros where a node has no gradient.
  const Tensor grad = grad_h || grad_c ? tensor(grad_c) : at::zeros_like(cx);
  auto found = composed_gradients(tensor(grad_h), grad, {}, gates,
                                  {tensor(input), tensor(hx), cx, tensor(weight_ih), tensor(weight_hh)},
                                  output_mask);
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
  m.impl("lstm_cell_backward_", lstmfused::differentiable_backward<true>);
}
TORCH_LIBRARY_IMPL(lstmfused, ADInplaceOrView, m) {
  m.impl("lstm_cell_backward_", lstmfused::backward_in_place);
}
// Under vmap, torch.func's and that of is_grads_batched, whose rules then are those of torch's operators.
TORCH_LIBRARY_IMPL(lstmfused, FuncTorchBatched, m) {
  m.impl("lstm_cell_backward", lstmfused::lstm_cell_backward_composed);
  m.impl("lstm_cell_backward_", lstmfused::lstm_cell_backward_composed);
}
TORCH_LIBRARY_IMPL(lstmfused, Batched, m) {
  m.impl("lstm_cell_backward", lstmfused::lstm_cell_backward_composed);
  m.impl("lstm_cell_backward_", lstmfused::lstm_cell_backward_composed);
}
TORCH_LIBRARY_IMPL(lstmfused, AutocastCPU, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(lstmfused, AutocastCUDA, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCUDA>); }
