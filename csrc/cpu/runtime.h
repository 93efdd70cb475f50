// What the kernels run with: an instruction set, torch's threads, memory for results.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>

#include "kernels/kernels.h"

namespace lstmfused {

// The kernels that this processor runs: torch's choice, so ATEN_CPU_CAPABILITY is obeyed.
const Kernels& cpu_kernels();

// f(the kernels of a dtype); checks.cpp admits no other.
template <class F>
auto with_kernels(at::ScalarType dtype, F&& f) {
  const Kernels& kernels = cpu_kernels();
  switch (dtype) {
    case at::kFloat: return f(kernels.f32);
    case at::kDouble: return f(kernels.f64);
    case at::kBFloat16: return f(kernels.bf16);
    default: return f(kernels.f16);
  }
}

// torch's threads, as many as may be used here and now.
Pool pool();

// Runs body(pool) with a pool whose threads stay together from run to run, for many runs that together
// are as much work, in multiply-adds. Within body no operator of torch's is called.
void with_team(int64_t work, const std::function<void(const Pool&)>& body);

// at::empty on the CPU.
at::Tensor empty_cpu(at::IntArrayRef shape, at::ScalarType dtype);

}  // namespace lstmfused
