// Which way a step is computed, by its sizes.
//
// The thresholds were read off the "crossovers" of benchmarks/results/nvidia-h200-*.json: every path at
// every size of the grid, in CUDA graphs with the weights in the second-level cache. Behind them stand
// three costs:
//   few rows       the multiply-adds of B * 4H * (I + H) on 32-bit floats, at about a quarter of their
//   peak; tensor cores   what the busiest multiprocessor copies from the second-level cache, and about 4 us
//   to begin
//                  and to end;
//   products       three launches, and the sums in float32 to memory and back.
#pragma once
#include "kernels.h"

namespace lstmfused {
namespace cuda {

// B * H up to which few rows are the fastest: where products of another library come next, where tensor
// cores do, and of half types (whose vectors are eight elements, so that each lane has more to do).
constexpr int64_t kFewStates = 32768, kFewStatesBesideTensorCores = 8192, kFewStatesOfHalf = 8192;
constexpr int64_t kMostFewRows = 512, kMostFewRowsOfHalf = 64;
// Of tf32, products win from so many rows and multiply-adds (B * H * (I + H)) on.
constexpr int64_t kRowsOfProducts = 64, kWorkOfProducts = int64_t(200) << 20;
// From so many rows on, whole warpgroups multiply.
constexpr int64_t kRowsOfWarpgroups = 64;
// Backward, B and B * H up to which one launch for all products is faster than four of another library.
constexpr int64_t kFewGradientStates = 8192, kMostFewGradientRows = 32, kMostFewGradientRowsOfHalf = 16;

// What the device and this build can do.
struct Abilities {
  bool tensor_cores, warpgroups;
};

template <class T>
Path choose_forward(const Problem& problem, Abilities able) {
  const int64_t B = problem.B, states = B * problem.H;
  if (able.warpgroups && B >= kRowsOfWarpgroups && states > kFewStatesOfHalf) return Path::kWarpgroups;
  const bool half = sizeof(T) == 2;
  if (!able.tensor_cores)
    return half || (B <= kMostFewRows && states <= kFewStates) ? Path::kFewRows : Path::kProducts;
  if (B <= (half ? kMostFewRowsOfHalf : kMostFewRows) &&
      states <= (half ? kFewStatesOfHalf : kFewStatesBesideTensorCores))
    return Path::kFewRows;
  const bool products = B >= kRowsOfProducts && states * (problem.I + problem.H) >= kWorkOfProducts;
  return products ? Path::kProducts : Path::kTensorCores;
}

template <class T>
Path choose_backward(const Problem& problem) {
  const int64_t rows = sizeof(T) == 2 ? kMostFewGradientRowsOfHalf : kMostFewGradientRows;
  return problem.B <= rows && problem.B * problem.H <= kFewGradientStates ? Path::kFewRows
                                                                          : Path::kProducts;
}

}  // namespace cuda
}  // namespace lstmfused
