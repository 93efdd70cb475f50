// The operators on CUDA tensors: Tensor -> struct, stream, choice of path. Made without CUDA's headers, and
// loaded without its libraries: what torch has for a CUDA device is reached through c10's interface to any.
#include <ATen/Context.h>
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <atomic>

#include "../checks.h"
#include "../ops.h"
#include "../tensors.h"
#include "kernels.h"
#include "paths.h"

namespace lstmfused {
namespace cuda {
namespace {

std::atomic<std::optional<Path>> forced{std::nullopt};

constexpr std::array<std::pair<const char*, Path>, 3> kPaths{
    {{"few_rows", Path::kFewRows}, {"tensor_cores", Path::kTensorCores}, {"products", Path::kProducts}}};

// f(T{}) with the kernels' name of a dtype; checks.cpp admits no other.
template <class F>
auto with_type(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat: return f(float{});
    case at::kDouble: return f(double{});
    case at::kBFloat16: return f(bfloat16{});
    default: return f(float16{});
  }
}

void check_status(const char* error) { TORCH_CHECK(!error, "lstm_cell: CUDA error: ", error); }

Device current_device(c10::Device device) {
  Device result;
  check_status(describe(device.index(), result));
  result.stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  return result;
}

// As it is set for matrix products, by whichever of the three names that has.
bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

template <class T>
Path path_of(const Problem& problem, const Device& device) {
  const std::optional<Path> wanted = forced;
  const bool possible = wanted == Path::kFewRows ||
                        (wanted == Path::kTensorCores && has_tensor_cores<T>(problem.tf32, device)) ||
                        (wanted == Path::kProducts && has_finish<T>);
  return possible ? *wanted : forward_path<T>(problem, device);
}

template <class T>
void run_forward(const Forward<T, T>& p, const Tensor& input, const Tensor& hx, const Tensor& weight_ih,
                 const Tensor& weight_hh, const Tensor& gates, const Device& device) {
  switch (path_of<T>({p.B, p.I, p.H, allow_tf32()}, device)) {
    case Path::kFewRows: return check_status(forward_few_rows(p, device));
    case Path::kTensorCores:
      if constexpr (sizeof(T) <= 4) check_status(forward_tensor_cores(p, device));
      return;
    case Path::kProducts:
      if constexpr (has_finish<T>) {
        Tensor sums = gates.numel() ? gates : at::empty({p.B, 4 * p.H}, input.options());
        at::mm_out(sums, input, weight_ih.t());
        sums.addmm_(hx, weight_hh.t());
        check_status(finish(p, in<T>(sums), device));
      }
  }
}

// Inside the operators torch's own are called as they are: no graph, no autocast.
struct Below {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

StateAndGates forward(const Tensor& input_, const Tensor& hx_, const Tensor& cx_, const Tensor& weight_ih_,
                      const Tensor& weight_hh_, const OptionalTensor& bias_ih_,
                      const OptionalTensor& bias_hh_, bool save_gates) {
  check_step(input_, hx_, cx_, weight_ih_, weight_hh_, bias_ih_, bias_hh_);
  const c10::DeviceGuard on_device(input_.device());
  const Below below;
  const int64_t B = input_.size(0), I = input_.size(1), H = hx_.size(1);
  const Tensor input = rows(input_), hx = rows(hx_), cx = rows(cx_);
  const Tensor weight_ih = weight_ih_.contiguous(), weight_hh = weight_hh_.contiguous();
  const Tensor bias_ih = contiguous(bias_ih_), bias_hh = contiguous(bias_hh_);

  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, input.options()); };
  const Tensor h = empty({B, H}), c = empty({B, H}), gates = empty({save_gates ? B : 0, 4 * H});
  if (h.numel())
    with_type(input.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      run_forward<T>({B, I, H, in<T>(input), input.stride(0), in<T>(hx), hx.stride(0), in<T>(cx),
                      cx.stride(0), in<T>(weight_ih), in<T>(weight_hh), in<T>(bias_ih), in<T>(bias_hh),
                      out<T>(h), out<T>(c), out<T>(gates)},
                     input, hx, weight_ih, weight_hh, gates, current_device(input.device()));
    });
  return {h, c, gates};
}

Gradients backward(const OptionalTensor& grad_h_, const OptionalTensor& grad_c_, const Tensor& gates_,
                   const Tensor& input_, const Tensor& hx_, const Tensor& cx_, const Tensor& weight_ih_,
                   const Tensor& weight_hh_, std::array<bool, 7> output_mask) {
  check_step(input_, hx_, cx_, weight_ih_, weight_hh_, {}, {});
  check_backward(grad_h_, grad_c_, gates_, cx_);
  const c10::DeviceGuard on_device(input_.device());
  const Below below;
  const int64_t B = input_.size(0), I = input_.size(1), H = hx_.size(1);
  const Tensor grad_h = rows(grad_h_), grad_c = rows(grad_c_);
  const Tensor gates = gates_.contiguous(), input = rows(input_), hx = rows(hx_), cx = rows(cx_);
  const Tensor weight_ih = weight_ih_.contiguous(), weight_hh = weight_hh_.contiguous();

  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, input.options()); };
  const Gradients gradients = make_gradients(B, I, H, output_mask, empty);
  const auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh] =
      gradients;
  if (!cx.numel()) return gradients;

  const Device device = current_device(input.device());
  const Problem problem{B, I, H, allow_tf32()};
  const Tensor grad_gates = empty({B, 4 * H});
  with_type(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Tensor partial = at::empty({bias_pieces<T>(problem, device), 4 * H},
                                     input.options().dtype(at::toOpMathType(input.scalar_type())));
    const Backward<T, T> p{B,
                           I,
                           H,
                           in<T>(grad_h),
                           row_stride(grad_h),
                           in<T>(grad_c),
                           row_stride(grad_c),
                           in<T>(gates),
                           in<T>(input),
                           input.stride(0),
                           in<T>(hx),
                           hx.stride(0),
                           in<T>(cx),
                           cx.stride(0),
                           in<T>(weight_ih),
                           in<T>(weight_hh),
                           B,
                           out<T>(grad_gates),
                           4 * H,
                           out<T>(grad_input),
                           out<T>(grad_hx),
                           out<T>(grad_cx),
                           out<T>(grad_weight_ih),
                           out<T>(grad_weight_hh),
                           out<T>(grad_bias_ih),
                           out<T>(grad_bias_hh)};
    check_status(gate_gradients(p, out<Accumulate<T>>(partial), device));
    const std::optional<Path> wanted = forced;
    const bool few_rows = wanted == Path::kFewRows || (wanted != Path::kProducts &&
                                                       backward_path<T>(problem, device) == Path::kFewRows);
    if (few_rows)
      check_status(backward_few_rows(p, device));
    else {
      const auto product = [](const Tensor& result, const Tensor& left, const Tensor& right) {
        if (result.numel()) {
          Tensor to = result;
          at::mm_out(to, left, right);
        }
      };
      product(grad_input, grad_gates, weight_ih);
      product(grad_hx, grad_gates, weight_hh);
      product(grad_weight_ih, grad_gates.t(), input);
      product(grad_weight_hh, grad_gates.t(), hx);
    }
  });
  return gradients;
}

}  // namespace

void set_path(const std::string& name) {
  if (name.empty()) return forced.store(std::nullopt);
  for (const auto& [known, path] : kPaths)
    if (name == known) return forced.store(path);
  TORCH_CHECK_VALUE(false, "expected few_rows, tensor_cores, products or nothing, got '", name, "'");
}

std::string path(at::ScalarType dtype, int64_t B, int64_t I, int64_t H, bool tf32) {
  const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
  const Device device = current_device(guard.getDevice());
  const Path chosen =
      with_type(dtype, [&](auto zero) { return path_of<decltype(zero)>({B, I, H, tf32}, device); });
  for (const auto& [name, path] : kPaths)
    if (path == chosen) return name;
  return "";
}

}  // namespace cuda
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CUDA, m) {
  m.impl("lstm_cell_forward", lstmfused::cuda::forward);
  m.impl("lstm_cell_backward", lstmfused::cuda::backward);
}
