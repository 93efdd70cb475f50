// The cell's operators on CUDA tensors: Tensor -> struct, stream, choice of path. Compiled without CUDA's
// headers and loaded without its libraries: devices and streams by c10's device-independent interface.
#include <ATen/Context.h>
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <mutex>

#include "../batch.h"
#include "../tensors.h"
#include "kernels/kernels.h"
#include "paths.h"

namespace lstmfused {
namespace cuda {
namespace {

std::atomic<std::optional<Path>> forced{std::nullopt};

constexpr std::array<std::pair<const char*, Path>, 4> kPaths{{{"small_batch", Path::kSmallBatch},
                                                              {"tensor_cores", Path::kTensorCores},
                                                              {"warpgroups", Path::kWarpgroups},
                                                              {"products", Path::kProducts}}};

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

// The attributes of each device, cached: four calls to the driver would be a tenth of a small step.
Device current_device(c10::Device device) {
  constexpr int kKnown = 64;  // as many as c10 allows
  static std::array<Device, kKnown> known;
  static std::array<std::once_flag, kKnown> asked;
  const int index = device.index();
  TORCH_CHECK(index < kKnown, "lstm_cell: expected one of the first ", kKnown, " CUDA devices, got ",
              device);
  std::call_once(asked[index], [&] { check_status(describe(index, known[index])); });
  Device result = known[index];
  result.stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  return result;
}

// As set for matrix products, by any of the three names of that setting.
bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

template <class T>
Path path_of(const Problem& problem, const Device& device) {
  const std::optional<Path> wanted = forced;
  const bool possible = wanted == Path::kSmallBatch ||
                        (wanted == Path::kTensorCores && has_tensor_cores<T>(problem.tf32, device)) ||
                        (wanted == Path::kWarpgroups && has_warpgroups<T>(device)) ||
                        wanted == Path::kProducts;
  return possible ? *wanted : forward_path<T>(problem, device);
}

template <class T>
Path backward_path_of(const Problem& problem, const Device& device) {
  const std::optional<Path> wanted = forced;
  const bool possible = wanted == Path::kSmallBatch || wanted == Path::kProducts;
  return possible ? *wanted : backward_path<T>(problem, device);
}

// torch's operators are called below autograd and autocast.
struct Below {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// (B, 4H) = input @ weight_ih^T + hx @ weight_hh^T by torch's products, in float32 where the tensors are
// half types; written to gates, where these are wanted and of the sums' type.
Tensor sums_of(const ForwardTensors& given, const Tensor& gates) {
  const at::ScalarType dtype = given.input->scalar_type(), wide = at::toOpMathType(dtype);
  Tensor sums = gates.defined() && dtype == wide
                    ? gates
                    : at::empty({given.B, 4 * given.H}, given.input->options().dtype(wide));
  if (dtype == wide) {
    at::mm_out(sums, *given.input, given.weight_ih->t());
    sums.addmm_(*given.hx, given.weight_hh->t());
  } else {
    at::mm_out(sums, *given.input, given.weight_ih->t(), wide);
    at::addmm_out(sums, sums, *given.hx, given.weight_hh->t(), wide);
  }
  return sums;
}

template <class T>
void run_forward(const Forward<T>& p, const ForwardTensors& given, const Tensor& gates,
                 const Device& device) {
  switch (path_of<T>({p.B, p.I, p.H, allow_tf32()}, device)) {
    case Path::kSmallBatch: return check_status(forward_small_batch(p, device));
    case Path::kTensorCores:
      if constexpr (sizeof(T) <= sizeof(float)) check_status(forward_tensor_cores(p, device));
      return;
    case Path::kWarpgroups:
      if constexpr (sizeof(T) == 2) check_status(forward_warpgroups(p, device));
      return;
    case Path::kProducts: return check_status(finish(p, in<Accumulate<T>>(sums_of(given, gates)), device));
  }
}

// gates are undefined where they are not wanted.
State compute(const ForwardTensors& given, const Tensor& gates) {
  TORCH_CHECK_NOT_IMPLEMENTED(!batch_invariant(), "lstm_cell: no batch-invariant kernels for CUDA yet");
  const at::TensorOptions options = given.input->options();
  const Tensor h = at::empty({given.B, given.H}, options),
               c = at::empty({given.B, given.H}, given.cx->options());
  if (h.numel())
    with_type(given.input->scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      run_forward(given.with<T>(h, c, gates), given, gates, current_device(given.input->device()));
    });
  return {h, c};
}

State step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensor& weight_ih,
           const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Below below;
  const c10::DeviceGuard on_device(input.device());
  return with_batch(input, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& h, const Tensor& c) {
    if (!has_kernel(x.scalar_type(), c.scalar_type()))
      return torch_lstm_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
    return compute(forward_tensors(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh), /*gates=*/{});
  });
}

StateAndGates forward(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                      const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh) {
  const Below below;
  const c10::DeviceGuard on_device(input.device());
  const ForwardTensors given = forward_tensors(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor gates = at::empty({given.B, 4 * given.H}, input.options());
  const auto [h, c] = compute(given, gates);
  return {h, c, gates};
}

// result = left @ right, where it is wanted
void product(Tensor result, const Tensor& left, const Tensor& right) {
  if (result.numel()) at::mm_out(result, left, right);
}

Gradients backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                   const OptionalTensor& input, const OptionalTensor& hx, const Tensor& cx,
                   const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                   std::array<bool, 7> output_mask) {
  const Below below;
  const c10::DeviceGuard on_device(gates.device());
  const BackwardTensors given =
      backward_tensors(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
  const auto empty = [&](at::IntArrayRef shape, at::ScalarType dtype) {
    return at::empty(shape, gates.options().dtype(dtype));
  };
  const Gradients gradients = given.gradients(output_mask, empty);
  if (!cx.numel()) return gradients;

  const Device device = current_device(gates.device());
  const Problem problem{given.B, given.I, given.H, allow_tf32()};
  const Tensor grad_gates = empty({given.B, 4 * given.H}, gates.scalar_type());
  with_type(gates.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Backward<T, T> p = given.with<T, T>(grad_gates, gradients);
    const Tensor partial = at::empty({bias_chunks<T>(problem, device), 4 * given.H},
                                     gates.options().dtype(at::toOpMathType(gates.scalar_type())));
    check_status(gate_gradients(p, out<Accumulate<T>>(partial), device));
    if (backward_path_of<T>(problem, device) == Path::kSmallBatch) {
      check_status(backward_small_batch(p, device));
      return;
    }
    product(std::get<0>(gradients), grad_gates, *given.weight_ih);
    product(std::get<1>(gradients), grad_gates, *given.weight_hh);
    product(std::get<3>(gradients), grad_gates.t(), *given.input);
    product(std::get<4>(gradients), grad_gates.t(), *given.hx);
  });
  return gradients;
}

}  // namespace

void set_path(const std::string& name) {
  if (name.empty()) return forced.store(std::nullopt);
  for (const auto& [known, path] : kPaths)
    if (name == known) return forced.store(path);
  TORCH_CHECK_VALUE(false, "expected small_batch, tensor_cores, warpgroups, products or nothing, got '",
                    name, "'");
}

static std::string name_of(Path path) {
  for (const auto& [name, known] : kPaths)
    if (path == known) return name;
  return "";
}

std::string path(at::ScalarType dtype, int64_t B, int64_t I, int64_t H, bool tf32) {
  const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
  const Device device = current_device(guard.getDevice());
  return name_of(
      with_type(dtype, [&](auto zero) { return path_of<decltype(zero)>({B, I, H, tf32}, device); }));
}

std::pair<std::string, std::string> paths_on(int capability, int multiprocessors, int shared_memory,
                                             at::ScalarType dtype, int64_t B, int64_t I, int64_t H,
                                             bool tf32) {
  const Device device{capability, multiprocessors, shared_memory, nullptr, 0};
  const Problem problem{B, I, H, tf32};
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return std::pair{name_of(forward_path<T>(problem, device)), name_of(backward_path<T>(problem, device))};
  });
}

}  // namespace cuda
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CUDA, m) {
  m.impl("lstm_cell", lstmfused::cuda::step);
  m.impl("lstm_cell_forward", lstmfused::cuda::forward);
  m.impl("lstm_cell_backward", lstmfused::cuda::backward);
  m.impl("lstm_cell_backward_reuse_gates",
         lstmfused::cuda::backward);  // gates stay as they are, which they may
}
