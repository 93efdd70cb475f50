#pragma once
#include "kernels.h"

namespace lstmfused {

// The kernels that this processor runs: torch's choice, so ATEN_CPU_CAPABILITY is obeyed.
const Kernels& cpu_kernels();

// torch's threads, as many as may be used here and now.
Pool pool();

}  // namespace lstmfused
