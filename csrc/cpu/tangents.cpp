// lstm_cell_unit_tangents on CPU tensors.
#include <torch/library.h>

#include "../ops.h"
#include "../tensors.h"
#include "runtime.h"

namespace lstmfused {
namespace {

UnitTangents unit_tangents(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                           const Tensor& cx, const OptionalTensor& sums_tangent,
                           const OptionalTensor& cx_tangent, const OptionalTensor& grad_h_tangent,
                           const OptionalTensor& grad_c_tangent) {
  const at::ScalarType dtype = cx.scalar_type();
  TORCH_CHECK(cx.dim() == 2 && (dtype == at::kFloat || dtype == at::kDouble),
              "lstm_cell_unit_tangents: expected cx of shape [batch, units] in float32 or float64, got ",
              cx.sizes(), " in ", dtype);
  const int64_t B = cx.size(0), H = cx.size(1);
  const auto check = [&](const OptionalTensor& tensor, at::IntArrayRef shape) {
    TORCH_CHECK(!tensor || (tensor->is_cpu() && tensor->sizes() == shape && tensor->scalar_type() == dtype),
                "lstm_cell_unit_tangents: expected a tensor of shape ", shape, " in ", dtype,
                " beside cx, got ", tensor->sizes(), " in ", tensor->scalar_type());
  };
  for (const auto& state : {grad_h, grad_c, cx_tangent, grad_h_tangent, grad_c_tangent})
    check(state, {B, H});
  for (const auto& gate : {OptionalTensor(gates), sums_tangent}) check(gate, {B, 4 * H});
  const bool grads = grad_h || grad_c || grad_h_tangent || grad_c_tangent;
  const UnitTangents result{empty_cpu({B, H}, dtype), empty_cpu({B, H}, dtype),
                            empty_cpu(grads ? at::IntArrayRef{2, B, 4 * H} : at::IntArrayRef{0}, dtype),
                            empty_cpu(grads ? at::IntArrayRef{B, H} : at::IntArrayRef{0}, dtype)};
  if (!cx.numel()) return result;
  const MaybeOwned gate = contiguous(gates), c = contiguous(cx), sums = contiguous(sums_tangent),
                   c_tangent = contiguous(cx_tangent), g_h = contiguous(grad_h), g_c = contiguous(grad_c),
                   g_h_tangent = contiguous(grad_h_tangent), g_c_tangent = contiguous(grad_c_tangent);
  const auto run = [&](auto kernel, auto element) {
    using T = decltype(element);
    const auto& [h_out, c_out, gates_out, cx_out] = result;
    T* const gates_tangent = out<T>(gates_out);
    kernel({B, H, in<T>(*gate), in<T>(*c), in<T>(*g_h), in<T>(*g_c), in<T>(*sums), in<T>(*c_tangent),
            in<T>(*g_h_tangent), in<T>(*g_c_tangent), out<T>(h_out), out<T>(c_out), gates_tangent,
            gates_tangent ? gates_tangent + B * 4 * H : nullptr, out<T>(cx_out)},
           pool());
  };
  dtype == at::kFloat ? run(cpu_kernels().tangents_f32, float())
                      : run(cpu_kernels().tangents_f64, double());
  return result;
}

}  // namespace
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CPU, m) { m.impl("lstm_cell_unit_tangents", lstmfused::unit_tangents); }
