// The operators on CPU tensors: Tensor -> struct, threads, choice of instruction set.
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <pthread.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "../checks.h"
#include "../ops.h"
#include "../tensors.h"
#include "variant.h"

namespace lstmfused {

const Kernels& cpu_kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef __x86_64__
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_avx512;
    if (capability == "AVX2") return kernels_avx2;
#endif
    return kernels_default;
  }();
  return chosen;
}

namespace {

// ---------------------------------------------------------------------------------------------------
// Threads: torch's own pool

// Less work than this, in multiply-adds, is done sooner by one thread than handed to another.
constexpr int64_t kWorkPerThread = 100'000;

// The threads of OpenMP do not survive a fork: a child that asked for them would wait for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t usable_threads() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

void run(int64_t tasks, int64_t work, void (*task)(const void*, int64_t), const void* context) {
  const int64_t threads = std::min({usable_threads(), tasks, work / kWorkPerThread});
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(context, i);
    return;
  }
  // Tasks go to whoever is free; which thread ran one leaves no trace in its result.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i);
  });
}

// Of a core's second-level cache, where the system tells.
int64_t cache_size() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 1 << 20;
}

Pool pool() { return {run, usable_threads(), cache_size()}; }

// ---------------------------------------------------------------------------------------------------
// Tensor -> struct

template <class F>
auto with_kernels(at::ScalarType dtype, F&& f) {
  const Kernels& kernels = cpu_kernels();
  switch (dtype) {
    case at::kFloat: return f(kernels.f32);
    case at::kDouble: return f(kernels.f64);
    case at::kBFloat16: return f(kernels.bf16);
    default: return f(kernels.f16);  // checks.cpp admits no other
  }
}

// at::empty without its trip through the dispatcher, which small calls would feel.
Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) { return at::detail::empty_cpu(shape, dtype); }

StateAndGates forward(const Tensor& input_, const Tensor& hx_, const Tensor& cx_, const Tensor& weight_ih_,
                      const Tensor& weight_hh_, const OptionalTensor& bias_ih_,
                      const OptionalTensor& bias_hh_, bool save_gates) {
  check_step(input_, hx_, cx_, weight_ih_, weight_hh_, bias_ih_, bias_hh_);
  const int64_t B = input_.size(0), I = input_.size(1), H = hx_.size(1);
  // The left factors of the products are small: half types are widened once, here.
  const at::ScalarType sums = at::toOpMathType(input_.scalar_type());
  const auto widened = [sums](const Tensor& t) { return t.scalar_type() == sums ? t : t.to(sums); };
  const Tensor input = rows(widened(input_)), hx = rows(widened(hx_)), cx = rows(cx_);
  const Tensor weight_ih = weight_ih_.contiguous(), weight_hh = weight_hh_.contiguous();
  const Tensor bias_ih = contiguous(bias_ih_), bias_hh = contiguous(bias_hh_);

  const at::ScalarType dtype = input_.scalar_type();
  const Tensor h = empty({B, H}, dtype), c = empty({B, H}, dtype);
  const Tensor gates = empty({save_gates ? B : 0, 4 * H}, dtype);
  if (h.numel())
    with_kernels(dtype, [&](const auto& kernels) {
      using T = typename std::decay_t<decltype(kernels)>::dtype;
      using A = Accumulate<T>;
      kernels.forward({B, I, H, in<A>(input), input.stride(0), in<A>(hx), hx.stride(0), in<T>(cx),
                       cx.stride(0), in<T>(weight_ih), in<T>(weight_hh), in<T>(bias_ih), in<T>(bias_hh),
                       out<T>(h), out<T>(c), out<T>(gates)},
                      pool());
    });
  return {h, c, gates};
}

Gradients backward(const OptionalTensor& grad_h_, const OptionalTensor& grad_c_, const Tensor& gates_,
                   const Tensor& input_, const Tensor& hx_, const Tensor& cx_, const Tensor& weight_ih_,
                   const Tensor& weight_hh_, std::array<bool, 7> output_mask) {
  check_step(input_, hx_, cx_, weight_ih_, weight_hh_, {}, {});
  check_backward(grad_h_, grad_c_, gates_, cx_);
  const int64_t B = input_.size(0), I = input_.size(1), H = hx_.size(1);
  const Tensor grad_h = rows(grad_h_), grad_c = rows(grad_c_);
  const Tensor gates = gates_.contiguous(), input = rows(input_), hx = rows(hx_), cx = rows(cx_);
  const Tensor weight_ih = weight_ih_.contiguous(), weight_hh = weight_hh_.contiguous();

  const at::ScalarType dtype = input_.scalar_type(), sums = at::toOpMathType(dtype);
  const Gradients gradients =
      make_gradients(B, I, H, output_mask, [&](at::IntArrayRef shape) { return empty(shape, dtype); });
  const auto& [grad_input, grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh] =
      gradients;
  if (!cx.numel()) return gradients;

  with_kernels(dtype, [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::dtype;
    using A = Accumulate<T>;
    const int64_t stretch = backward_rows<T>(B, I, H), stride = backward_stride<T>(H);
    const Tensor grad_gates = empty({stretch, stride}, sums);
    kernels.backward({B,
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
                      stretch,
                      out<A>(grad_gates),
                      stride,
                      out<T>(grad_input),
                      out<T>(grad_hx),
                      out<T>(grad_cx),
                      out<T>(grad_weight_ih),
                      out<T>(grad_weight_hh),
                      out<T>(grad_bias_ih),
                      out<T>(grad_bias_hh)},
                     pool());
  });
  return gradients;
}

}  // namespace
}  // namespace lstmfused

TORCH_LIBRARY_IMPL(lstmfused, CPU, m) {
  m.impl("lstm_cell_forward", lstmfused::forward);
  m.impl("lstm_cell_backward", lstmfused::backward);
}
