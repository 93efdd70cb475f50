// Step and layer under autocast: c stays in float32, all else is cast to the autocast dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../batch.h"
#include "../ops.h"

namespace lstmfused {
namespace {

template <at::DeviceType device>
struct Autocast {
  c10::impl::ExcludeDispatchKeyGuard below{
      at::autocast::get_autocast_dispatch_key_from_device_type(device)};
  at::ScalarType dtype = at::autocast::get_autocast_dtype(device);

  template <class Given>
  auto cast(const Given& tensor) const {
    return at::autocast::cached_cast(dtype, tensor, device);
  }
  Tensor cell(const Tensor& c) const { return at::autocast::cached_cast(at::kFloat, c, device); }
  // A c of zeros beside x, which was cast, and h.
  Tensor zero_cell(const Tensor& x, const Tensor& h) const {
    return x.scalar_type() == dtype ? zero_state(x, h.sym_size(-1), at::kFloat) : h;
  }
};

template <at::DeviceType device>
State step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensor& weight_ih,
           const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Autocast<device> to;
  const auto cast_step = [&](const Tensor& x, const Tensor& h, const Tensor& c) {
    return lstm_cell(x, h, c, to.cast(weight_ih), to.cast(weight_hh), to.cast(bias_ih), to.cast(bias_hh));
  };
  if (hx && cx) return cast_step(to.cast(input), to.cast(*hx), to.cell(*cx));
  return with_batch(
      to.cast(input), hx, cx, weight_hh,
      [&](const Tensor& x, const Tensor& h, const Tensor&) { return cast_step(x, h, to.zero_cell(x, h)); });
}

template <at::DeviceType device>
LayerStates layer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                  const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                  const OptionalTensor& bias_hh, const OptionalTensor& mask, bool reverse,
                  bool cell_states) {
  const Autocast<device> to;
  const Tensor x = to.cast(input);
  return with_states(x, hx, cx, weight_hh, [&](const Tensor& h, const Tensor& c) {
    return lstm_layer(x, to.cast(h), cx ? to.cell(c) : to.zero_cell(x, h), to.cast(weight_ih),
                      to.cast(weight_hh), to.cast(bias_ih), to.cast(bias_hh), mask, reverse, cell_states);
  });
}

}  // namespace
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, AutocastCPU, m) {
  m.impl("lstm_cell", lstmfused::step<at::kCPU>);
  m.impl("lstm_layer", lstmfused::layer<at::kCPU>);
}
TORCH_LIBRARY_IMPL(lstmfused, AutocastCUDA, m) {
  m.impl("lstm_cell", lstmfused::step<at::kCUDA>);
  m.impl("lstm_layer", lstmfused::layer<at::kCUDA>);
}
