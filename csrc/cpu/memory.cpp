// Uninitialized memory for results.
#include <ATen/EmptyTensor.h>
#include <sys/mman.h>

#include "kernels/tuning.h"
#include "runtime.h"

namespace lstmfused {

// Past the dispatcher, which small calls would feel. Fresh memory comes from the system page by page, and a
// page fault costs more than writing the page: large tensors ask for huge pages.
at::Tensor empty_cpu(at::IntArrayRef shape, at::ScalarType dtype) {
  const at::Tensor tensor = at::detail::empty_cpu(shape, dtype);
#ifdef MADV_HUGEPAGE
  if (int64_t(tensor.nbytes()) < kHugePageTensor) return tensor;
  constexpr uintptr_t kAlignment = kHugePageAlignment;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()),
                  first = (begin + kAlignment - 1) / kAlignment * kAlignment,
                  end = (begin + tensor.nbytes()) / kAlignment * kAlignment;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace lstmfused
