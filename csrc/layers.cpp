// Layers and directions one after the other, for the calls that most are: lstmfused/functional/stack.py has
// them all. In a call of few steps, Python's way through them takes longer than the kernels do.
#include <ATen/TracerMode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/stack.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "autograd/second_order.h"
#include "checks.h"

namespace lstmfused {
namespace {

// By a transform, a mode or a tracer: these follow the operators from Python.
bool followed() {
  return in_transform() || c10::impl::TorchDispatchModeTLS::stack_len() ||
         at::tracer::impl::is_dispatch_enabled();
}

bool is_symbolic(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

// The tensors of one layer and direction among the parameters; 0 where there are others than the kernels'.
int64_t params_each(const std::vector<Tensor>& params, int64_t states, bool packed, bool has_biases) {
  const int64_t all = int64_t(params.size()), each = states > 0 && all % states == 0 ? all / states : 0;
  const bool known = packed ? each == 2 || each == 3 : each == (has_biases ? 4 : 2);
  return known && (packed || params[1].dim() == 2) ? each : 0;
}

bool fits(const Tensor& state, int64_t states, int64_t B, int64_t H) {
  return !is_symbolic(state) && state.sizes() == at::IntArrayRef{states, B, H};
}
bool fits(const Tensor& reset, const Tensor& input) {
  return !is_symbolic(reset) && reset.scalar_type() == at::kBool && reset.device() == input.device() &&
         reset.sizes() == input.sizes().slice(0, 2);
}

Tensor steps_first(const Tensor& tensor, bool batch_first) {
  return batch_first ? tensor.transpose(0, 1) : tensor;
}

// One as a view, which costs less than a copy.
Tensor joined(const std::vector<Tensor>& states) {
  return states.size() == 1 ? states[0].unsqueeze(0) : at::stack(states);
}

}  // namespace

std::optional<PackedLayerStates> lstm_layers(const Tensor& input, const std::vector<Tensor>& hx,
                                             const std::vector<Tensor>& params, const PackedSizes& packed,
                                             const OptionalTensor& reset, bool has_biases,
                                             int64_t num_layers, double dropout, bool bidirectional,
                                             bool batch_first) {
  const int64_t directions = bidirectional ? 2 : 1, states = num_layers * directions;
  const int64_t each = params_each(params, states, packed.H, has_biases);
  if (!each || followed() || is_symbolic(input) || input.dim() != 3) return {};
  const int64_t B = input.size(batch_first ? 0 : 1), H = packed.H ? packed.H : params[1].size(1);
  const bool state = !hx.empty();
  if (state && !(hx.size() == 2 && fits(hx[0], states, B, H) && fits(hx[1], states, B, H))) return {};
  if (!packed.H && !has_kernel(input.scalar_type(), (state ? hx[1] : input).scalar_type())) return {};
  if (reset && (bidirectional || !fits(*reset, input))) return {};

  const OptionalTensor mask =
      reset ? OptionalTensor(steps_first(*reset, batch_first).view(at::kByte)) : std::nullopt;
  Tensor x = steps_first(input, batch_first);
  std::vector<Tensor> h(states), c(states);
  for (int64_t layer = 0; layer < num_layers; layer++) {
    std::array<Tensor, 2> outputs;
    for (int64_t direction = 0; direction < directions; direction++) {
      const int64_t k = layer * directions + direction;
      const Tensor* const p = &params[k * each];
      const auto at_k = [&](int i) { return state ? OptionalTensor(hx[i].select(0, k)) : std::nullopt; };
      const auto param = [&](int64_t i) { return i < each ? OptionalTensor(p[i]) : std::nullopt; };
      if (packed.H)
        std::tie(outputs[direction], h[k], c[k]) =
            lstm_layer_packed(x, at_k(0), at_k(1), p[0], p[1], param(2), mask,
                              layer ? directions * H : packed.I, H, packed.format, direction == 1);
      else
        std::tie(outputs[direction], h[k], c[k], std::ignore) =
            lstm_layer(x, at_k(0), at_k(1), p[0], p[1], param(2), param(3), mask, direction == 1,
                       /*cell_states=*/false);
    }
    x = bidirectional ? at::cat({outputs[0], outputs[1]}, 2) : std::move(outputs[0]);
    if (dropout > 0 && layer < num_layers - 1) x = at::dropout(x, dropout, /*train=*/true);
  }
  return PackedLayerStates{steps_first(x, batch_first), joined(h), joined(c)};
}

}  // namespace lstmfused
