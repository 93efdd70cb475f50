// Derivatives beyond the first gradients.
//
// With L = <grad_h, h> + <grad_c, c>, the gradients of a step are those of L. The second derivatives of L
// are symmetric, so that the gradient of <v, gradients> with respect to the arguments, which double
// backward asks for, is the derivative of the gradients in the direction v, which forward mode asks for;
// and with respect to grad_h and grad_c it is that of h and c. One operator, lstm_cell_tangents, computes
// them all, from the gates that the step has kept.
#include "second_order.h"

#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "composed.h"

namespace lstmfused {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Arguments array(const Tensors& given) {
  TORCH_CHECK(given.size() == kArguments, "lstm_cell: expected ", int(kArguments), " tensors or None, got ",
              given.size());
  Arguments result;
  for (int i = 0; i < kArguments; i++) result[i] = given.get(i).value_or(Tensor());
  return result;
}

// A list as the operators return it: what is not wanted has no element.
std::vector<Tensor> dense(Arguments gradients, const Tensor& like) {
  for (Tensor& gradient : gradients)
    if (!gradient.defined()) gradient = at::empty({0}, like.options());
  return {std::make_move_iterator(gradients.begin()), std::make_move_iterator(gradients.end())};
}

// In the type that sums are formed in.
OptionalTensor wide(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->to(at::toOpMathType(tensor->scalar_type()))) : tensor;
}

std::vector<Tensor> tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Arguments& a,
                             const Tensor& gates, const Arguments& v, const OptionalTensor& grad_h_tangent,
                             const OptionalTensor& grad_c_tangent, const Wanted& wanted,
                             decltype(lstm_cell_unit_tangents)& unit_tangents) {
  Tensor sums;  // tangents of the gates before activation, (B, 4H), or (4H) for every row
  for (const Tensor& bias : {v[kBiasIh], v[kBiasHh]})
    if (bias.defined()) sums = sums.defined() ? sums.add(bias) : bias;
  const auto add = [&](const Tensor& left, const Tensor& weight) {
    if (!left.defined() || !weight.defined()) return;
    sums = sums.defined() ? at::addmm(sums, left, weight.t()) : at::mm(left, weight.t());
  };
  add(v[kInput], a[kWeightIh]);
  add(a[kInput], v[kWeightIh]);
  add(v[kHx], a[kWeightHh]);
  add(a[kHx], v[kWeightHh]);
  if (sums.defined()) sums = sums.expand_as(gates);

  const auto [h, c, grad_gates, grad_cx] =
      unit_tangents(wide(grad_h), wide(grad_c), *wide(gates), *wide(a[kCx]), wide(optional(sums)),
                    wide(optional(v[kCx])), wide(grad_h_tangent), wide(grad_c_tangent));
  const auto narrow = [](const Tensor& tensor, const Tensor& like) {
    return tensor.to(like.scalar_type());
  };
  std::vector<Tensor> result{narrow(h, gates), narrow(c, a[kCx])};
  Arguments gradients;
  if (grad_h || grad_c || grad_h_tangent || grad_c_tangent) {
    const Tensor both = narrow(grad_gates, gates), tangent = both.select(0, 0), grad = both.select(0, 1);
    const Tensor stacked = both.reshape_symint({2 * both.sym_size(1), both.sym_size(2)});
    // (tangent, grad) @ (weight, weight's tangent)
    const auto of_rows = [&](int weight) {
      const Tensor product = at::mm(tangent, a[weight]);
      return v[weight].defined() ? at::addmm(product, grad, v[weight]) : product;
    };
    // (tangent, grad)^T @ (rows, rows' tangent): one product, that writes a weight's gradient once
    const auto of_weights = [&](int rows) {
      return v[rows].defined() ? at::mm(stacked.t(), at::cat({a[rows], v[rows]}))
                               : at::mm(tangent.t(), a[rows]);
    };
    if (wanted[kInput]) gradients[kInput] = of_rows(kWeightIh);
    if (wanted[kHx]) gradients[kHx] = of_rows(kWeightHh);
    if (wanted[kCx]) gradients[kCx] = narrow(grad_cx, a[kCx]);
    if (wanted[kWeightIh]) gradients[kWeightIh] = of_weights(kInput);
    if (wanted[kWeightHh]) gradients[kWeightHh] = of_weights(kHx);
    if (wanted[kBiasIh]) gradients[kBiasIh] = tangent.sum(0);
    if (wanted[kBiasHh]) gradients[kBiasHh] = wanted[kBiasIh] ? gradients[kBiasIh].clone() : tangent.sum(0);
  }
  for (Tensor& gradient : dense(std::move(gradients), gates)) result.push_back(std::move(gradient));
  return result;
}

// ---------------------------------------------------------------------------------------------------
// The gradients as a node of the graph

// What is known before a Function records it: see apply_function.
struct Done {
  Tensor gates;
  variable_list gradients;
};

// Named for what anomaly mode and profilers show.
struct StepBackward : torch::autograd::Function<StepBackward> {
  static variable_list forward(AutogradContext* context, const OptionalTensor& grad_h,
                               const OptionalTensor& grad_c, const OptionalTensor& input,
                               const OptionalTensor& hx, const OptionalTensor& cx,
                               const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                               const Done& done) {
    context->set_materialize_grads(false);
    variable_list saved;
    for (const auto& tensor :
         {grad_h, grad_c, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, optional(done.gates)})
      saved.push_back(tensor.value_or(Tensor()));
    context->save_for_backward(std::move(saved));
    return done.gradients;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    constexpr int kGiven = 2 + kArguments;
    variable_list result(kGiven + 1);
    std::array<bool, kGiven> asked;
    for (int i = 0, edge = 0; i < kGiven; i++)
      asked[i] = saved[i].defined() && context->needs_input_grad(edge++);
    Arguments arguments, directions;
    Wanted wanted;
    bool any = false;
    for (int i = 0; i < kArguments; i++) {
      arguments[i] = saved[2 + i];
      directions[i] = grads[i];
      wanted[i] = asked[2 + i];
      any |= grads[i].defined();
    }
    if (!any) return result;
    const std::vector<Tensor> found =
        lstm_cell_tangents(optional(saved[0]), optional(saved[1]), list(arguments), saved[kGiven],
                           list(directions), {}, {}, wanted);
    for (int i = 0; i < kGiven; i++)
      if (asked[i]) result[i] = found[i];
    return result;
  }
};

// The gates as a function of the arguments, from their known values; to be differentiated to any order.
struct GatesOf : torch::autograd::Function<GatesOf> {
  static Tensor forward(AutogradContext* context, const OptionalTensor& input, const OptionalTensor& hx,
                        const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                        const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const Done& done) {
    variable_list saved;
    for (const auto& tensor :
         {input, hx, weight_ih, weight_hh, bias_ih, bias_hh, OptionalTensor(done.gates)})
      saved.push_back(tensor.value_or(Tensor()));
    context->save_for_backward(std::move(saved));
    return done.gates;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    constexpr std::array kGiven{kInput, kHx, kWeightIh, kWeightHh, kBiasIh, kBiasHh};
    Arguments arguments;
    Wanted wanted{};
    for (size_t i = 0, edge = 0; i < kGiven.size(); i++) {
      arguments[kGiven[i]] = saved[i];
      wanted[kGiven[i]] = saved[i].defined() && context->needs_input_grad(edge++);
    }
    const Arguments found = composed_gradients_of_gates(grads[0], arguments, saved[kGiven.size()], wanted);
    variable_list result(kGiven.size() + 1);
    for (size_t i = 0; i < kGiven.size(); i++) result[i] = found[kGiven[i]];
    return result;
  }
};

}  // namespace

// In a transform, and in forward mode, the arguments have to make the gates again: there the levels below
// would not see what a Function knows.
Tensor with_history(const Tensor& gates, const Arguments& a) {
  if (whole(a) && (in_transform() || Asked(a).tangents)) return std::get<2>(composed_forward(a));
  TORCH_CHECK_NOT_IMPLEMENTED(whole(a) || !a[kCx].key_set().has(c10::DispatchKey::FuncTorchGradWrapper),
                              "lstm_cell: a transform of the gradients of a step outside it has no third "
                              "derivatives: take the step "
                              "inside it");
  return apply_function<GatesOf>(optional(a[kInput]), optional(a[kHx]), optional(a[kWeightIh]),
                                 optional(a[kWeightHh]), optional(a[kBiasIh]), optional(a[kBiasHh]),
                                 Done{gates.detach(), {}});
}

namespace {

// ---------------------------------------------------------------------------------------------------
// The operators: below autograd, what autograd makes of them, and under vmap

std::vector<Tensor> gradients(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                              const Tensors& arguments, const Tensor& gates, Wanted wanted) {
  const Arguments a = array(arguments);
  const auto beside = [&](Argument factor, Argument other) {
    return wanted[other] ? optional(a[factor]) : std::nullopt;
  };
  return std::apply(
      [](auto&&... gradient) { return std::vector<Tensor>{std::move(gradient)...}; },
      lstm_cell_backward(grad_h, grad_c, gates, beside(kInput, kWeightIh), beside(kHx, kWeightHh), a[kCx],
                         beside(kWeightIh, kInput), beside(kWeightHh, kHx), wanted));
}

// By torch's operators, from gates that have a history of their own, or need none.
std::vector<Tensor> gradients_from(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                   const Tensors& arguments, const Tensor& gates, Wanted wanted) {
  return dense(composed_gradients(grad_h.value_or(Tensor()), grad_c.value_or(Tensor()), array(arguments),
                                  gates, wanted),
               gates);
}

std::vector<Tensor> gradients_derived(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                      const Tensors& arguments, const Tensor& gates, Wanted wanted) {
  const Arguments a = array(arguments);
  const Asked asked(grad_h, grad_c, a);
  // A subclass may know torch's operators only.
  const bool subclass = gates.unsafeGetTensorImpl()->is_python_dispatch() &&
                        c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  if (asked.gradients && (asked.tangents || subclass))
    return gradients_from(grad_h, grad_c, arguments, with_history(gates, a), wanted);

  Done done{gates, {}};
  std::vector<Tensor> tangents;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    done.gradients = lstm_cell_gradients(grad_h, grad_c, arguments, gates, wanted);
    if (asked.tangents)
      tangents = lstm_cell_tangents(grad_h, grad_c, arguments, gates, list(tangents_of(a)),
                                    grad_h ? tangent_of(*grad_h) : grad_h,
                                    grad_c ? tangent_of(*grad_c) : grad_c, wanted);
  }
  if (asked.tangents)
    for (int i = 0; i < kArguments; i++)
      if (wanted[i]) set_tangent(done.gradients[i], tangents[2 + i]);
  if (!asked.gradients) return done.gradients;
  return apply_function<StepBackward>(grad_h, grad_c, optional(a[kInput]), optional(a[kHx]),
                                      optional(a[kCx]), optional(a[kWeightIh]), optional(a[kWeightHh]),
                                      optional(a[kBiasIh]), optional(a[kBiasHh]), done);
}

std::vector<Tensor> tangents_from_gates(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                        const Tensors& arguments, const Tensor& gates,
                                        const Tensors& directions, const OptionalTensor& grad_h_tangent,
                                        const OptionalTensor& grad_c_tangent, Wanted wanted) {
  return tangents(grad_h, grad_c, array(arguments), gates, array(directions), grad_h_tangent,
                  grad_c_tangent, wanted, lstm_cell_unit_tangents);
}

std::vector<Tensor> tangents_from(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                  const Tensors& arguments, const Tensor& gates, const Tensors& directions,
                                  const OptionalTensor& grad_h_tangent,
                                  const OptionalTensor& grad_c_tangent, Wanted wanted) {
  return tangents(grad_h, grad_c, array(arguments), gates, array(directions), grad_h_tangent,
                  grad_c_tangent, wanted, composed_unit_tangents);
}

std::vector<Tensor> tangents_derived(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                     const Tensors& arguments, const Tensor& gates,
                                     const Tensors& directions, const OptionalTensor& grad_h_tangent,
                                     const OptionalTensor& grad_c_tangent, Wanted wanted) {
  const Arguments a = array(arguments);
  const Asked asked(grad_h, grad_c, a, array(directions), grad_h_tangent, grad_c_tangent);
  if (asked.tangents || asked.gradients)
    return tangents_from(grad_h, grad_c, arguments, with_history(gates, a), directions, grad_h_tangent,
                         grad_c_tangent, wanted);
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_cell_tangents(grad_h, grad_c, arguments, gates, directions, grad_h_tangent, grad_c_tangent,
                            wanted);
}

// Under vmap torch's operators keep the samples apart, where a kernel would add up their rows; the gates
// that the step has kept will do, unless whoever comes below vmap asks for derivatives.
bool asked_below_vmap(const Arguments& arguments) {
  constexpr c10::DispatchKeySet kTransformed(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  return std::any_of(arguments.begin(), arguments.end(), [&](const Tensor& tensor) {
    if (!tensor.defined()) return false;
    const auto* stack = at::functorch::maybeGetBatchedImpl(tensor);
    const Tensor& value = stack ? stack->value() : tensor;
    return value.key_set().has_any(kTransformed) || tangent_of(value) ||
           (at::GradMode::is_enabled() && value.requires_grad());
  });
}

StateAndGates forward_batched(const Tensor& input, const Tensor& hx, const Tensor& cx,
                              const Tensor& weight_ih, const Tensor& weight_hh,
                              const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  return composed_step(lstmfused::array(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh));
}

Tensor gates_under_vmap(const Tensor& gates, const Tensors& arguments) {
  const Arguments a = array(arguments);
  if (!asked_below_vmap(a)) return gates;
  return whole(a) ? std::get<2>(composed_forward(a)) : with_history(gates, a);
}

std::vector<Tensor> gradients_batched(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                      const Tensors& arguments, const Tensor& gates, Wanted wanted) {
  return gradients_from(grad_h, grad_c, arguments, gates_under_vmap(gates, arguments), wanted);
}

std::vector<Tensor> tangents_batched(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                     const Tensors& arguments, const Tensor& gates,
                                     const Tensors& directions, const OptionalTensor& grad_h_tangent,
                                     const OptionalTensor& grad_c_tangent, Wanted wanted) {
  return tangents_from(grad_h, grad_c, arguments, gates_under_vmap(gates, arguments), directions,
                       grad_h_tangent, grad_c_tangent, wanted);
}

}  // namespace
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CompositeExplicitAutograd, m) {
  m.impl("lstm_cell_gradients", lstmfused::gradients);
  m.impl("lstm_cell_tangents", lstmfused::tangents_from_gates);
  m.impl("lstm_cell_unit_tangents", lstmfused::composed_unit_tangents);
}
TORCH_LIBRARY_IMPL(lstmfused, Autograd, m) {
  m.impl("lstm_cell_gradients", lstmfused::gradients_derived);
  m.impl("lstm_cell_tangents", lstmfused::tangents_derived);
}
TORCH_LIBRARY_IMPL(lstmfused, FuncTorchBatched, m) {
  m.impl("lstm_cell_forward", lstmfused::forward_batched);
  m.impl("lstm_cell_gradients", lstmfused::gradients_batched);
  m.impl("lstm_cell_tangents", lstmfused::tangents_batched);
}
// The vmap of is_grads_batched loops over what it does not know, but not over lists.
TORCH_LIBRARY_IMPL(lstmfused, Batched, m) {
  m.impl("lstm_cell_gradients", lstmfused::gradients_batched);
  m.impl("lstm_cell_tangents", lstmfused::tangents_batched);
}
