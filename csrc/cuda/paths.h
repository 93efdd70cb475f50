// For benchmarks and tests: which path a problem takes, and how to send all of them along one.
#pragma once
#include <c10/core/ScalarType.h>

#include <string>
#include <utility>

namespace lstmfused {
namespace cuda {

// small_batch, tensor_cores, warpgroups or products, where these can serve; an empty name lets each problem
// choose.
void set_path(const std::string& name);
// What is chosen on the current device, forward.
std::string path(at::ScalarType dtype, int64_t B, int64_t I, int64_t H, bool tf32);
// What would be chosen on a device, forward and backward. It need not be there.
std::pair<std::string, std::string> paths_on(int capability, int multiprocessors, int shared_memory,
                                             at::ScalarType dtype, int64_t B, int64_t I, int64_t H,
                                             bool tf32);

}  // namespace cuda
}  // namespace lstmfused
