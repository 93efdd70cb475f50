// Which kernel serves which problem, and the instances of all of them.
#include "few_rows.h"
#include "gradients.h"
#include "pointwise.h"
#include "tensor_cores.h"

namespace lstmfused {
namespace cuda {

// Batches up to which weights read once per few rows beat what comes next. Estimates: not yet measured.
constexpr int64_t kFewForTensorCores = 8;
constexpr int64_t kFewForProducts = 32;
constexpr int64_t kFewForGradients = 32;

template <class T>
bool has_tensor_cores(bool tf32, const Device& device) {
  const bool has = device.capability >= 80 && device.shared_memory >= MediumTile::kShared;
  return has && (sizeof(T) == 2 || (sizeof(T) == 4 && tf32));
}

template <class T>
Path forward_path(const Problem& problem, const Device& device) {
  if (has_tensor_cores<T>(problem.tf32, device))
    return problem.B <= kFewForTensorCores ? Path::kFewRows : Path::kTensorCores;
  return problem.B <= kFewForProducts || !has_finish<T> ? Path::kFewRows : Path::kProducts;
}

template <class T>
Path backward_path(const Problem& problem, const Device&) {
  return problem.B <= kFewForGradients ? Path::kFewRows : Path::kProducts;
}

#ifndef LSTMFUSED_SIMT  // there are no devices then
const char* describe(int index, Device& device) {
  const auto get = [index](cudaDeviceAttr attribute, int& value) {
    const cudaError_t status = cudaDeviceGetAttribute(&value, attribute, index);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  };
  int major = 0, minor = 0;
  const char* error = get(cudaDevAttrComputeCapabilityMajor, major);
  if (!error) error = get(cudaDevAttrComputeCapabilityMinor, minor);
  if (!error) error = get(cudaDevAttrMultiProcessorCount, device.multiprocessors);
  if (!error) error = get(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_memory);
  device.capability = 10 * major + minor;
  device.index = index;
  return error;
}
#endif

#define LSTMFUSED_INSTANTIATE(T)                                                             \
  template bool has_tensor_cores<T>(bool, const Device&);                                    \
  template Path forward_path<T>(const Problem&, const Device&);                              \
  template Path backward_path<T>(const Problem&, const Device&);                             \
  template const char* forward_few_rows(const Forward<T>&, const Device&);                   \
  template int64_t bias_pieces<T>(const Problem&, const Device&);                            \
  template const char* gate_gradients(const Backward<T, T>&, Accumulate<T>*, const Device&); \
  template const char* backward_few_rows(const Backward<T, T>&, const Device&)

LSTMFUSED_INSTANTIATE(float);
LSTMFUSED_INSTANTIATE(double);
LSTMFUSED_INSTANTIATE(bfloat16);
LSTMFUSED_INSTANTIATE(float16);
template const char* forward_tensor_cores(const Forward<float>&, const Device&);
template const char* forward_tensor_cores(const Forward<bfloat16>&, const Device&);
template const char* forward_tensor_cores(const Forward<float16>&, const Device&);
template const char* finish(const Forward<float>&, const float*, const Device&);
template const char* finish(const Forward<double>&, const double*, const Device&);

}  // namespace cuda
}  // namespace lstmfused
