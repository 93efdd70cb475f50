// Which kernel serves which problem, and the instances of all of them.
#include "gradients.h"
#include "pointwise.h"
#include "small_batch.h"
#include "tensor_cores.h"
#include "tuning.h"
#include "warpgroups.h"

namespace lstmfused {
namespace cuda {

template <class T>
bool has_tensor_cores(bool tf32, const Device& device) {
  const bool has = device.capability >= 80 && device.shared_memory >= MediumTile::kShared;
  return has && (sizeof(T) == 2 || (sizeof(T) == 4 && tf32));
}

template <class T>
bool has_warpgroups(const Device& device) {
#if defined(LSTMFUSED_SM90A) || defined(LSTMFUSED_SIMT)
  return sizeof(T) == 2 && device.capability == 90;
#else
  return false;  // this build has no code for them
#endif
}

template <class T>
static Abilities abilities(const Problem& problem, const Device& device) {
  return {has_tensor_cores<T>(problem.tf32, device), has_warpgroups<T>(device)};
}

template <class T>
Path forward_path(const Problem& problem, const Device& device) {
  return choose_forward<T>(problem, abilities<T>(problem, device));
}

template <class T>
Path backward_path(const Problem& problem, const Device& device) {
  return choose_backward<T>(problem, abilities<T>(problem, device));
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
  template bool has_warpgroups<T>(const Device&);                                            \
  template Path forward_path<T>(const Problem&, const Device&);                              \
  template Path backward_path<T>(const Problem&, const Device&);                             \
  template const char* forward_small_batch(const Forward<T>&, const Device&);                \
  template const char* finish(const Forward<T>&, const Accumulate<T>*, const Device&);       \
  template int64_t bias_chunks<T>(const Problem&, const Device&);                            \
  template const char* gate_gradients(const Backward<T, T>&, Accumulate<T>*, const Device&); \
  template const char* backward_small_batch(const Backward<T, T>&, const Device&)

LSTMFUSED_INSTANTIATE(float);
LSTMFUSED_INSTANTIATE(double);
LSTMFUSED_INSTANTIATE(bfloat16);
LSTMFUSED_INSTANTIATE(float16);
template const char* forward_tensor_cores(const Forward<float>&, const Device&);
template const char* forward_tensor_cores(const Forward<bfloat16>&, const Device&);
template const char* forward_tensor_cores(const Forward<float16>&, const Device&);
template const char* forward_warpgroups(const Forward<bfloat16>&, const Device&);
template const char* forward_warpgroups(const Forward<float16>&, const Device&);

}  // namespace cuda
}  // namespace lstmfused
