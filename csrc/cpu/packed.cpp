// The step from packed weights, for inference on the CPU alone. lstmfused/modules/packed.py packs them:
// weight and bias, and for int8 scale, as the struct Packed of lstm.h has them, each flat.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../batch.h"
#include "../checks.h"
#include "../ops.h"
#include "../tensors.h"
#include "runtime.h"

namespace lstmfused {
namespace {

State step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensor& weight,
           const Tensor& bias, const OptionalTensor& scale, int64_t input_size, int64_t hidden_size,
           int64_t format) {
  return with_batch(
      input, hx, cx, [&] { return hidden_size; },
      [&](const Tensor& given_x, const Tensor& given_h, const Tensor& given_c) -> State {
        check_packed(given_x, given_h, given_c, weight, bias, scale, input_size, hidden_size, format);
        const int64_t B = given_x.size(0);
        const MaybeOwned x = rows(given_x), hidden = rows(given_h), cell = rows(given_c);
        const MaybeOwned w = contiguous(weight), b = contiguous(bias), s = contiguous(scale);
        const Tensor next_h = empty_cpu({B, hidden_size}, at::kFloat);
        const Tensor next_c = empty_cpu({B, hidden_size}, at::kFloat);
        const auto run = [&](auto kernel, auto element) {
          using W = decltype(element);
          Packed<W> p{{B, input_size, hidden_size, in<float>(*x), x->stride(0), in<float>(*hidden),
                       hidden->stride(0), in<float>(*cell), cell->stride(0), out<float>(next_h),
                       out<float>(next_c)},
                      in<W>(*w),
                      in<float>(*s),
                      in<float>(*b)};
          kernel(p, pool());
        };
        const Kernels& kernels = cpu_kernels();
        if (!next_h.numel()) return {next_h, next_c};
        switch (weight.scalar_type()) {
          case at::kFloat: run(kernels.packed_f32, float()); break;
          case at::kBFloat16: run(kernels.packed_bf16, bfloat16()); break;
          default: run(kernels.packed_i8, int8_t());  // checks.cpp admits no other
        }
        return {next_h, next_c};
      });
}

State without_gradients(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                        const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                        int64_t input_size, int64_t hidden_size, int64_t format) {
  const auto wanted = [](const Tensor& t) {
    return (at::GradMode::is_enabled() && t.requires_grad()) || has_tangent(t);
  };
  TORCH_CHECK(!wanted(input) && !(hx && wanted(*hx)) && !(cx && wanted(*cx)) && !wanted(weight) &&
                  !wanted(bias) && !(scale && wanted(*scale)),
              "a packed LSTM cell computes no gradients, but an argument requires one: call it under "
              "torch.no_grad(), or train the cell that it was made from");
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_cell_packed(input, hx, cx, weight, bias, scale, input_size, hidden_size, format);
}

// Half types become float32, in which a packed cell computes.
State autocast(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
               const Tensor& weight, const Tensor& bias, const OptionalTensor& scale, int64_t input_size,
               int64_t hidden_size, int64_t format) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const auto cast = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, at::kCPU); };
  return lstm_cell_packed(cast(input), cast(hx), cast(cx), weight, bias, scale, input_size, hidden_size,
                          format);
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

}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CPU, m) { m.impl("lstm_cell_packed", lstmfused::step); }
TORCH_LIBRARY_IMPL(lstmfused, Autograd, m) { m.impl("lstm_cell_packed", lstmfused::without_gradients); }
TORCH_LIBRARY_IMPL(lstmfused, AutocastCPU, m) { m.impl("lstm_cell_packed", lstmfused::autocast); }
