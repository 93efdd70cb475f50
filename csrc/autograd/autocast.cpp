// The step under autocast: c stays in float32, all else is cast to the autocast dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../batch.h"
#include "../ops.h"

namespace lstmfused {
namespace {

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
  return with_batch(
      cast(input), hx, cx, weight_hh, [&](const Tensor& x, const Tensor& zeros, const Tensor&) {
        return step(x, zeros,
                    x.scalar_type() == dtype ? zero_state(x, weight_hh.sym_size(-1), at::kFloat) : zeros);
      });
}

}  // namespace
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, AutocastCPU, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(lstmfused, AutocastCUDA, m) { m.impl("lstm_cell", lstmfused::autocast<at::kCUDA>); }
