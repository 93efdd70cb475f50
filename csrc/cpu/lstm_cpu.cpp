// The operators on CPU tensors: Tensor -> struct, threads, choice of instruction set.
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "../batch.h"
#include "../ops.h"
#include "../tensors.h"
#include "variant.h"

namespace lstmfused {

const Kernels& cpu_kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef __x86_64__
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512")
      return __builtin_cpu_supports("avx512bf16") ? kernels_avx512_bf16 : kernels_avx512;
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
  // A thread takes the same tasks call after call, whose weights its own cache may still hold, and then
  // those of who is behind; which thread ran one leaves no trace in its result.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t kMostShares = 64;
  const int64_t n = std::min(threads, kMostShares);
  Share shares[kMostShares];  // on the stack, whose lines this core has at hand
  for (int64_t s = 0; s < n; s++) {
    shares[s].next.store(tasks * s / n, std::memory_order_relaxed);
    shares[s].end = tasks * (s + 1) / n;
  }
  // What a thread has to know it gets by value, together: each line that it fetches from this core is time.
  at::parallel_for(0, threads, 1, [task, context, n, first = &shares[0]](int64_t thread, int64_t) {
    for (int64_t s = 0; s < n; s++) {
      Share& share = first[(thread + s) % n];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;  // cheaper than to write
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        task(context, i);
    }
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

}  // namespace

Pool pool() { return {run, usable_threads(), cache_size()}; }

namespace {

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

// Memory that is new to the process comes page by page, and a page costs more to get than to write. Where
// Linux gives large ones to who asks for them, large tensors ask.
void ask_for_large_pages([[maybe_unused]] const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLarge = 4 << 20, kPage = 64 << 10;  // whole pages wherever these are no larger
  if (tensor.nbytes() < kLarge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()),
                  first = (begin + kPage - 1) / kPage * kPage,
                  end = (begin + tensor.nbytes()) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// at::empty without its trip through the dispatcher, which small calls would feel.
Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) {
  const Tensor tensor = at::detail::empty_cpu(shape, dtype);
  ask_for_large_pages(tensor);
  return tensor;
}

// gates are undefined where they are not wanted.
State compute(const ForwardTensors& given, const Tensor& gates) {
  const at::ScalarType dtype = given.input->scalar_type();
  const Tensor h = empty({given.B, given.H}, dtype), c = empty({given.B, given.H}, given.cx->scalar_type());
  if (h.numel())
    with_kernels(dtype, [&](const auto& kernels) {
      using T = typename std::decay_t<decltype(kernels)>::dtype;
      kernels.forward(given.with<T>(h, c, gates), pool());
    });
  return {h, c};
}

State step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensor& weight_ih,
           const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  return with_batch(input, hx, cx, weight_hh, [&](const Tensor& x, const Tensor& h, const Tensor& c) {
    if (!has_kernel(x.scalar_type(), c.scalar_type()))
      return torch_lstm_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
    return compute(forward_tensors(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh), /*gates=*/{});
  });
}

StateAndGates forward(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                      const Tensor& weight_hh, const OptionalTensor& bias_ih,
                      const OptionalTensor& bias_hh) {
  const ForwardTensors given = forward_tensors(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor gates = empty({given.B, 4 * given.H}, input.scalar_type());
  const auto [h, c] = compute(given, gates);
  return {h, c, gates};
}

// The gate gradients may take the gates' place, where they are of one type and a gate's units fill a line:
// of fewer units, loads would wait for the stores just before them.
template <bool in_place>
Gradients backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                   const OptionalTensor& input, const OptionalTensor& hx, const Tensor& cx,
                   const OptionalTensor& weight_ih, const OptionalTensor& weight_hh,
                   std::array<bool, 7> output_mask) {
  const BackwardTensors given =
      backward_tensors(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask);
  const at::ScalarType dtype = gates.scalar_type();
  const Gradients gradients = given.gradients(output_mask, empty);
  if (!cx.numel()) return gradients;

  with_kernels(dtype, [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::dtype;
    const bool fits = std::is_same_v<T, Accumulate<T>> && given.H * sizeof(T) >= 64;
    const Tensor grad_gates =
        in_place && fits ? *given.gates
                         : empty({backward_rows<T>(given.B, given.I, given.H), backward_stride<T>(given.H)},
                                 at::toOpMathType(dtype));
    kernels.backward(given.with<T, Accumulate<T>>(grad_gates, gradients), pool());
  });
  return gradients;
}

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
  const UnitTangents result{empty({B, H}, dtype), empty({B, H}, dtype),
                            empty(grads ? at::IntArrayRef{2, B, 4 * H} : at::IntArrayRef{0}, dtype),
                            empty(grads ? at::IntArrayRef{B, H} : at::IntArrayRef{0}, dtype)};
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

TORCH_LIBRARY_IMPL(lstmfused, CPU, m) {
  m.impl("lstm_cell", lstmfused::step);
  m.impl("lstm_cell_forward", lstmfused::forward);
  m.impl("lstm_cell_backward", lstmfused::backward<false>);
  m.impl("lstm_cell_backward_", lstmfused::backward<true>);
  m.impl("lstm_cell_unit_tangents", lstmfused::unit_tangents);
}
