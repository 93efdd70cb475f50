// For benchmarks and tests: which path a problem takes, and how to send all of them along one.
#pragma once
#include <c10/core/ScalarType.h>

#include <string>

namespace lstmfused {
namespace cuda {

// few_rows, tensor_cores, warpgroups or products, where these can serve; an empty name lets each problem
// choose.
void set_path(const std::string& name);
// What is chosen on the current device.
std::string path(at::ScalarType dtype, int64_t B, int64_t I, int64_t H, bool tf32);

}  // namespace cuda
}  // namespace lstmfused
