// What the kernels run with: an instruction set, torch's threads, memory for results.
#pragma once
#include <ATen/core/Tensor.h>

#include "kernels/kernels.h"

namespace lstmfused {

// The kernels that this processor runs: torch's choice, so ATEN_CPU_CAPABILITY is obeyed.
const Kernels& cpu_kernels();

// torch's threads, as many as may be used here and now.
Pool pool();

// at::empty on the CPU.
at::Tensor empty_cpu(at::IntArrayRef shape, at::ScalarType dtype);

}  // namespace lstmfused
