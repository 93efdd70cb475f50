// Step and layer from packed weights, for inference on the CPU alone. lstmfused/modules/packing.py packs
// them: weight and bias, and for int8 scale, as the struct Packed of lstm.h has them, each flat.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../batch.h"
#include "../checks.h"
#include "../ops.h"
#include "steps.h"

namespace lstmfused {
namespace {

// What is packed, as it is checked.
struct PackedWeights {
  MaybeOwned weight, bias, scale;
  int64_t depth;

  PackedWeights(const Tensor& w, const Tensor& b, const OptionalTensor& s, int64_t all)
      : weight(contiguous(w)), bias(contiguous(b)), scale(contiguous(s)), depth(all) {}

  void run(const Step<float>& step, const Pool& pool) const {
    const auto run = [&](auto kernel, auto element) {
      using W = decltype(element);
      kernel(packed_step(step, in<W>(*weight), in<float>(*scale), in<float>(*bias), depth), pool);
    };
    const Kernels& kernels = cpu_kernels();
    switch (weight->scalar_type()) {
      case at::kFloat: return run(kernels.packed_f32, float());
      case at::kBFloat16: return run(kernels.packed_bf16, bfloat16());
      default: run(kernels.packed_i8, int8_t());  // checks.cpp admits no other
    }
  }
};

State step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensor& weight,
           const Tensor& bias, const OptionalTensor& scale, int64_t input_size, int64_t hidden_size,
           int64_t format) {
  return with_batch(
      input, hx, cx, [&] { return hidden_size; },
      [&](const Tensor& given_x, const Tensor& given_h, const Tensor& given_c) -> State {
        check_packed(given_x, given_h, given_c, weight, bias, scale, input_size, hidden_size, format);
        const int64_t B = given_x.size(0);
        const MaybeOwned x = rows(given_x), hidden = rows(given_h), cell = rows(given_c);
        const Tensor next_h = empty_cpu({B, hidden_size}, at::kFloat);
        const Tensor next_c = empty_cpu({B, hidden_size}, at::kFloat);
        if (next_h.numel())
          PackedWeights(weight, bias, scale, input_size + hidden_size)
              .run({B, input_size, hidden_size, in<float>(*x), x->stride(0), in<float>(*hidden),
                    hidden->stride(0), in<float>(*cell), cell->stride(0), out<float>(next_h),
                    out<float>(next_c)},
                   pool());
        return {next_h, next_c};
      });
}

PackedLayerStates layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                        const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                        const OptionalTensor& given_mask, int64_t input_size, int64_t hidden_size,
                        int64_t format, bool reverse) {
  return with_states(
      input, hx, cx, hidden_size, [&](const Tensor& h, const Tensor& c) -> PackedLayerStates {
        check_packed_layer(input, h, c, weight, bias, scale, given_mask, input_size, hidden_size, format);
        const Inputs x(input);
        const MaybeOwned mask = contiguous(given_mask);
        const Steps steps{input.size(0), input.size(1), input_size, hidden_size, reverse, row_mask(*mask)};
        const Tensor hidden = empty_cpu({steps.T + 1, steps.B, steps.H}, at::kFloat),
                     cell = empty_cpu({steps.B, steps.H}, at::kFloat);
        Step<float> given{};
        given.I = steps.I;
        given.H = steps.H;
        given.input = in<float>(*x.tensor);
        given.input_stride = x.stride;
        const PackedWeights weights(weight, bias, scale, input_size + hidden_size);
        const bool together = batch_invariant() || joint(steps);  // in this mode as the cell does
        take_steps<float>(steps, given, together, h, c, hidden, cell, /*gates=*/{}, [&](const Pool&) {
          return [&](const Step<float>& taken, const Pool& pool) { weights.run(taken, pool); };
        });
        auto [output, last_h, last_c, none] = last_states(steps, hidden, cell);
        return {std::move(output), std::move(last_h), std::move(last_c)};
      });
}

void check_no_gradients(const char* what, const Tensor& input, const OptionalTensor& hx,
                        const OptionalTensor& cx, const Tensor& weight, const Tensor& bias,
                        const OptionalTensor& scale) {
  const auto wanted = [](const Tensor& t) {
    return (at::GradMode::is_enabled() && t.requires_grad()) || has_tangent(t);
  };
  TORCH_CHECK(!wanted(input) && !(hx && wanted(*hx)) && !(cx && wanted(*cx)) && !wanted(weight) &&
                  !wanted(bias) && !(scale && wanted(*scale)),
              "a packed LSTM ", what,
              " computes no gradients, but an argument requires one: call it under torch.no_grad(), or "
              "train the ",
              what, " that it was made from");
}

State step_without_gradients(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                             const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                             int64_t input_size, int64_t hidden_size, int64_t format) {
  check_no_gradients("cell", input, hx, cx, weight, bias, scale);
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_cell_packed(input, hx, cx, weight, bias, scale, input_size, hidden_size, format);
}

PackedLayerStates layer_without_gradients(const Tensor& input, const OptionalTensor& hx,
                                          const OptionalTensor& cx, const Tensor& weight,
                                          const Tensor& bias, const OptionalTensor& scale,
                                          const OptionalTensor& mask, int64_t input_size,
                                          int64_t hidden_size, int64_t format, bool reverse) {
  check_no_gradients("layer", input, hx, cx, weight, bias, scale);
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_layer_packed(input, hx, cx, weight, bias, scale, mask, input_size, hidden_size, format,
                           reverse);
}

// Half types become float32, in which packed weights are computed with.
template <class Given>
auto to_float(const Given& tensor) {
  return at::autocast::cached_cast(at::kFloat, tensor, at::kCPU);
}

State autocast_step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                    const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                    int64_t input_size, int64_t hidden_size, int64_t format) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return lstm_cell_packed(to_float(input), to_float(hx), to_float(cx), weight, bias, scale, input_size,
                          hidden_size, format);
}

PackedLayerStates autocast_layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                                 const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                                 const OptionalTensor& mask, int64_t input_size, int64_t hidden_size,
                                 int64_t format, bool reverse) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return lstm_layer_packed(to_float(input), to_float(hx), to_float(cx), weight, bias, scale, mask,
                           input_size, hidden_size, format, reverse);
}

}  // namespace

void check_lstm_cell_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                            const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                            int64_t input_size, int64_t hidden_size, int64_t format) {
  with_batch(
      input, hx, cx, [&] { return hidden_size; },
      [&](const Tensor& x, const Tensor& h, const Tensor& c) -> State {
        check_packed(x, h, c, weight, bias, scale, input_size, hidden_size, format);
        return {h, c};
      });
}

void check_lstm_layer_packed(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                             const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                             const OptionalTensor& mask, int64_t input_size, int64_t hidden_size,
                             int64_t format) {
  with_states(input, hx, cx, hidden_size, [&](const Tensor& h, const Tensor& c) {
    check_packed_layer(input, h, c, weight, bias, scale, mask, input_size, hidden_size, format);
    return State{h, c};
  });
}

}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CPU, m) {
  m.impl("lstm_cell_packed", lstmfused::step);
  m.impl("lstm_layer_packed", lstmfused::layer);
}
TORCH_LIBRARY_IMPL(lstmfused, Autograd, m) {
  m.impl("lstm_cell_packed", lstmfused::step_without_gradients);
  m.impl("lstm_layer_packed", lstmfused::layer_without_gradients);
}
TORCH_LIBRARY_IMPL(lstmfused, AutocastCPU, m) {
  m.impl("lstm_cell_packed", lstmfused::autocast_step);
  m.impl("lstm_layer_packed", lstmfused::autocast_layer);
}
