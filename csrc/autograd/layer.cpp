// What makes a layer differentiable: gradients by its kernels; all else by the cell's, step by step.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../batch.h"
#include "../checks.h"
#include "../lstm.h"
#include "second_order.h"

namespace lstmfused {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// step(t, x, h, c) -> State for all steps; returns every h and every c, by time.
template <class Step>
std::pair<variable_list, variable_list> each_step(const Arguments& a, const OptionalTensor& mask,
                                                  bool reverse, const Step& step) {
  const int64_t T = a[kInput].sym_size(0).guard_int(__FILE__, __LINE__);
  Tensor resets, skips, input = a[kInput];
  if (mask) {
    resets = mask->eq(int64_t(RowMask::kReset)).unsqueeze(-1);
    skips = mask->eq(int64_t(RowMask::kSkip)).unsqueeze(-1);
    input = input.masked_fill(skips, 0);  // where it may be anything, NaN among it
  }
  variable_list hidden(T), cells(T);
  Tensor h = a[kHx], c = a[kCx];
  for (int64_t k = 0; k < T; k++) {
    const int64_t t = reverse ? T - 1 - k : k;
    const Tensor x = input.select(0, t);
    if (mask) {
      const Tensor reset = resets.select(0, t), skip = skips.select(0, t);
      const auto [next_h, next_c] = step(t, x, h.masked_fill(reset, 0), c.masked_fill(reset, 0));
      h = at::where(skip, h, next_h);
      c = at::where(skip, c, next_c);
    } else {
      std::tie(h, c) = step(t, x, h, c);
    }
    hidden[t] = h;
    cells[t] = c;
  }
  return {std::move(hidden), std::move(cells)};
}

// By the cell, whose derivatives are known to any order.
LayerStates stepped(const Arguments& a, const OptionalTensor& mask, bool reverse, bool cell_states) {
  const auto [hidden, cells] =
      each_step(a, mask, reverse, [&](int64_t, const Tensor& x, const Tensor& h, const Tensor& c) {
        return lstm_cell(x, h, c, a[kWeightIh], a[kWeightHh], optional(a[kBiasIh]), optional(a[kBiasHh]));
      });
  const auto stack = [](const variable_list& states, const Tensor& like) {
    return states.empty() ? like.new_empty_symint({0, like.sym_size(0), like.sym_size(1)})
                          : at::stack(states);
  };
  const auto last = [reverse](const variable_list& states, const Tensor& first) {
    return states.empty() ? first.clone() : reverse ? states.front() : states.back();
  };
  return {stack(hidden, a[kHx]), last(hidden, a[kHx]), last(cells, a[kCx]),
          cell_states ? stack(cells, a[kCx]) : at::empty({0}, a[kCx].options())};
}

LayerStates stepped_layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                          const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                          const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse,
                          bool cell_states) {
  return with_states(input, hx, cx, weight_hh, [&](const Tensor& h, const Tensor& c) {
    check_layer(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, mask);
    return stepped(array(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh), mask, reverse, cell_states);
  });
}

// ---------------------------------------------------------------------------------------------------
// The layer as a node of the graph

// Set where a bias is absent: bit 0 for bias_ih, bit 1 for bias_hh.
constexpr auto kAbsent = "absent";
constexpr auto kReverse = "reverse";

enum Saved { kSavedInput, kSavedWeightIh, kSavedWeightHh, kHidden, kCells, kGates, kMask };

struct Done {
  LayerForward steps;
  LayerStates states;
};

struct LSTMLayer : torch::autograd::Function<LSTMLayer> {
  // The steps are done: see apply_function.
  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& hx,
                               const Tensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                               const OptionalTensor& mask, bool reverse, const Done& done) {
    const auto& [hidden, cells, gates] = done.steps;
    const bool all = traced();
    const auto beside = [all](const Tensor& factor, const Tensor& other) {
      return all || other.requires_grad() ? factor : Tensor();
    };
    context->set_materialize_grads(false);
    context->save_for_backward({beside(input, weight_ih), beside(weight_ih, input), weight_hh, hidden,
                                cells, gates, mask.value_or(Tensor())});
    context->saved_data[kAbsent] = int64_t(!bias_ih) + 2 * int64_t(!bias_hh);
    context->saved_data[kReverse] = reverse;
    const auto& [output, h, c, c_all] = done.states;
    // Whoever writes into what is returned meets torch's error about modified variables.
    const auto share_version = [](const Tensor& view, const Tensor& base) {
      if (!view.unsafeGetTensorImpl()->is_python_dispatch())
        torch::autograd::impl::set_version_counter(view, torch::autograd::impl::version_counter(base));
    };
    share_version(output, hidden);
    share_version(c_all, cells);
    return {output, h, c, c_all};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const int64_t absent = context->saved_data[kAbsent].toInt();
    const bool reverse = context->saved_data[kReverse].toBool();
    std::array<int, kArguments> edges;  // an absent bias has none in the graph
    Wanted wanted;
    int edge = 0;
    for (int i = 0; i < kArguments; i++) {
      edges[i] = i >= kBiasIh && absent >> (i - kBiasIh) & 1 ? -1 : edge++;
      wanted[i] = edges[i] >= 0 && context->needs_input_grad(edges[i]);
    }
    variable_list result(kArguments + 3);
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); }))
      return result;
    const OptionalTensor mask = optional(saved[kMask]);
    if (at::GradMode::is_enabled()) {
      const variable_list found = differentiable(saved, mask, reverse, edges, wanted, grads);
      std::move(found.begin(), found.end(), result.begin());
      return result;
    }
    const at::AutoDispatchBelowAutograd guard;
    auto found = std::apply(
        [](auto&&... gradient) { return variable_list{std::move(gradient)...}; },
        lstm_layer_backward(optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]),
                            wanted[kWeightIh] ? optional(saved[kSavedInput]) : std::nullopt, saved[kHidden],
                            saved[kCells], saved[kGates],
                            wanted[kInput] ? optional(saved[kSavedWeightIh]) : std::nullopt,
                            saved[kSavedWeightHh], mask, reverse, wanted));
    for (int i = 0; i < kArguments; i++)
      if (wanted[i]) result[i] = std::move(found[i]);
    return result;
  }

  // Gradients that can be differentiated again: those of a graph of steps whose results are known.
  static variable_list differentiable(const variable_list& saved, const OptionalTensor& mask, bool reverse,
                                      const std::array<int, kArguments>& edges, const Wanted& wanted,
                                      const variable_list& grads) {
    Tensor gates = saved[kGates];
    const Tensor &hidden = saved[kHidden], &cells = saved[kCells], &weight_hh = saved[kSavedWeightHh];
    const int64_t T = gates.size(0), B = gates.size(1), H = hidden.size(2), first = reverse ? T : 0;
    const Tensor &input = saved[kSavedInput], &weight_ih = saved[kSavedWeightIh];
    const int64_t I = input.defined() ? input.size(2) : weight_ih.defined() ? weight_ih.size(1) : 0;
    // What was not saved has numbers that no derivative takes; but for the state's, which are known.
    const auto any = [&](at::IntArrayRef shape) { return at::empty({}, gates.options()).expand(shape); };
    Arguments a{any({T, B, I}),  hidden.select(0, first), cells.select(0, first),
                any({4 * H, I}), any({4 * H, H}),         any({4 * H}),
                any({4 * H})};
    variable_list inputs;
    for (int i = 0; i < kArguments; i++) {
      const Tensor& known = i == kInput      ? input
                            : i == kWeightIh ? weight_ih
                            : i == kWeightHh ? weight_hh
                                             : Tensor();
      if (known.defined())
        a[i] = known;
      else if (wanted[i])
        a[i] = stand_in(a[i], edges[i]);
      else if (i >= kBiasIh)
        a[i] = Tensor();
      // Gradients of this use of an argument alone, not of what other arguments were made from.
      if (wanted[i]) inputs.push_back(a[i] = a[i].view_as(a[i]));
    }
    if (mask) gates = gates.masked_fill(mask->eq(int64_t(RowMask::kSkip)).unsqueeze(-1), 0);
    const auto step = [&](int64_t t, const Tensor& x, const Tensor& h, const Tensor& c) {
      const int64_t after = reverse ? t : t + 1;
      return recorded_step(
          {x, h, c, a[kWeightIh], a[kWeightHh], a[kBiasIh], a[kBiasHh]},
          {hidden.select(0, after).detach(), cells.select(0, after).detach(), gates.select(0, t).detach()});
    };
    const auto [h, c] = each_step(a, mask, reverse, step);
    variable_list outputs, of_outputs;
    const auto add = [&](const Tensor& output, const Tensor& grad) {
      outputs.push_back(output);
      of_outputs.push_back(grad);
    };
    for (int64_t t = 0; t < T; t++) {
      if (grads[0].defined()) add(h[t], grads[0].select(0, t));
      if (grads[3].defined()) add(c[t], grads[3].select(0, t));
    }
    const int64_t last = reverse ? 0 : T - 1;
    if (grads[1].defined()) add(T ? h[last] : a[kHx], grads[1]);
    if (grads[2].defined()) add(T ? c[last] : a[kCx], grads[2]);
    const variable_list found =
        torch::autograd::grad(outputs, inputs, of_outputs, /*retain_graph=*/true, /*create_graph=*/true,
                              /*allow_unused=*/true);
    variable_list result(kArguments);
    for (size_t i = 0, n = 0; i < kArguments; i++)
      if (wanted[i]) result[i] = found[n++];
    return result;
  }
};

LayerStates differentiable_layer(c10::DispatchKeySet keys, const Tensor& input, const OptionalTensor& hx,
                                 const OptionalTensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
                                 const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                                 const OptionalTensor& mask, bool reverse, bool cell_states) {
  const Asked asked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  if (!asked.tangents && !asked.gradients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_lstm_layer(keys & c10::after_ADInplaceOrView_keyset, input, hx, cx, weight_ih,
                                 weight_hh, bias_ih, bias_hh, mask, reverse, cell_states);
  }
  // A transform, or a subclass that knows torch's operators and the cell's, follows the steps.
  if (asked.tangents || in_transform() || !input.device().is_cpu())
    return stepped_layer(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse, cell_states);
  return with_states(input, hx, cx, weight_hh, [&](const Tensor& h, const Tensor& c) -> LayerStates {
    Done done;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      done.steps = lstm_layer_forward(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse);
      const auto& [hidden, cells, gates] = done.steps;
      done.states = layer_states(hidden, cells, reverse);
    }
    variable_list states =
        apply_function<LSTMLayer>(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse, done);
    if (!cell_states) states[3] = at::empty({0}, c.options());
    return {std::move(states[0]), std::move(states[1]), std::move(states[2]), std::move(states[3])};
  });
}

// The inner operators have no derivatives of their own: those of lstm_layer are made of them.
void check_underived(const Asked& asked) {
  TORCH_CHECK_NOT_IMPLEMENTED(!asked.tangents && !asked.gradients,
                              "lstm_layer_forward and lstm_layer_backward have no derivatives: "
                              "differentiate lstm_layer, and a graph of its gradients while it is traced");
}

LayerForward underived_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                               const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                               const OptionalTensor& mask, bool reverse) {
  check_underived(Asked(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh));
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_layer_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mask, reverse);
}

Gradients underived_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h,
                             const OptionalTensor& grad_c, const OptionalTensor& grad_cells,
                             const OptionalTensor& input, const Tensor& hidden, const Tensor& cells,
                             const Tensor& gates, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                             const OptionalTensor& mask, bool reverse, Wanted wanted) {
  check_underived(
      Asked(grad_output, grad_h, grad_c, grad_cells, input, hidden, cells, gates, weight_ih, weight_hh));
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_layer_backward(grad_output, grad_h, grad_c, grad_cells, input, hidden, cells, gates,
                             weight_ih, weight_hh, mask, reverse, wanted);
}

}  // namespace

LayerStates layer_states(const Tensor& hidden, const Tensor& cells, bool reverse) {
  const c10::SymInt T = hidden.sym_size(0) - 1, first = reverse ? 0 : 1;
  const auto last = [&](const Tensor& states) {
    return states.select_symint(0, reverse ? c10::SymInt(0) : T).clone();
  };
  return {hidden.narrow_symint(0, first, T), last(hidden), last(cells), cells.narrow_symint(0, first, T)};
}

void check_lstm_layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                      const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh, const OptionalTensor& mask) {
  with_states(input, hx, cx, weight_hh, [&](const Tensor& h, const Tensor& c) {
    check_layer(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, mask);
    return State{h, c};
  });
}

}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, Autograd, m) {
  m.impl("lstm_layer", lstmfused::differentiable_layer);
  m.impl("lstm_layer_forward", lstmfused::underived_forward);
  m.impl("lstm_layer_backward", lstmfused::underived_backward);
}
// For devices that have a cell and no layer.
TORCH_LIBRARY_IMPL(lstmfused, CompositeExplicitAutograd, m) {
  m.impl("lstm_layer", lstmfused::stepped_layer);
}
