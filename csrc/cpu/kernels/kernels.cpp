// One variant of the kernels; LSTMFUSED_ISA names it, and the compiler's flags say what it may use.
// Includes neither torch nor the standard library's headers: see vec.h.
#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "packed.h"
#include "tangents.h"

#define LSTMFUSED_TEXT(x) #x
#define LSTMFUSED_STRING(x) LSTMFUSED_TEXT(x)

namespace lstmfused {

template <class T>
static constexpr CellKernels<T> cell_kernels() {
  return {LSTMFUSED_VARIANT::forward<T>, LSTMFUSED_VARIANT::backward<T>};
}

#ifdef __AVX512BF16__
const CellKernels<bfloat16> LSTMFUSED_NAME(kernels_, LSTMFUSED_ISA) = cell_kernels<bfloat16>();
#else
const Kernels LSTMFUSED_NAME(kernels_, LSTMFUSED_ISA) = {
    LSTMFUSED_STRING(LSTMFUSED_ISA),
    cell_kernels<float>(),
    cell_kernels<double>(),
    cell_kernels<bfloat16>(),
    cell_kernels<float16>(),
    LSTMFUSED_VARIANT::tangents<float>,
    LSTMFUSED_VARIANT::tangents<double>,
    LSTMFUSED_VARIANT::forward_packed<float>,
    LSTMFUSED_VARIANT::forward_packed<bfloat16>,
    LSTMFUSED_VARIANT::forward_packed<int8_t>,
    LSTMFUSED_VARIANT::pack,
};
#endif

}  // namespace lstmfused
