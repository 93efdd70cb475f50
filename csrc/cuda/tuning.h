// Which way a step is computed, by its sizes.
//
// The thresholds were read off the "crossovers" in benchmarks/results/nvidia-h200-*.json, where every path
// ran at every size of a grid, in CUDA graphs with the weights in L2; tests/test_cuda_host.py holds them to
// that file. Other devices than Hopper are not measured. Behind the thresholds stand three costs:
//
// - few rows: multiply-adds, B * 4H * (I + H), on 32-bit floats, at about a quarter of their peak;
// - tensor cores: what the busiest multiprocessor copies from L2, and 3 to 4 us to begin and to end;
// - products: three launches, and the sums (B, 4H) in float32 to memory and back twice.
#pragma once
#include "kernels.h"

namespace lstmfused {
namespace cuda {

// B and B * H up to which few rows are the fastest: where products of another library come next; where
// tensor cores do; and of half types, whose vectors are eight elements, so that each lane has more to do.
constexpr int64_t kFewRows = 512, kFewStates = 32768;
constexpr int64_t kFewRowsOfTf32 = 256, kFewStatesOfTf32 = 8192, kFewStatesOfTinyTf32 = 16384,
                  kTinyUnits = 64;
constexpr int64_t kFewRowsOfHalf = 64, kFewStatesOfHalf = 4096, kFewStatesOfSmallHalf = 8192,
                  kSmallUnits = 128;
// Of tf32, products win from so many rows and multiply-adds, B * H * (I + H), on.
constexpr int64_t kProductRowsOfTf32 = 64, kProductWorkOfTf32 = int64_t(200) << 20;
// Of half types, from so many units and rows on; up to so many rows, or any.
constexpr int64_t kWideUnits = 768, kWideRows = 192, kMostWideRows = 511;
constexpr int64_t kHugeUnits = 1536, kHugeRows = 96;
// B * H from which on wgmma beats mma.sync.
constexpr int64_t kStatesOfWarpgroups = 262144;

// Backward: B and B * H up to which one launch for all products is faster than four of another library, and
// B * H where these have tensor cores and the weights are many.
constexpr int64_t kFewGradientRows = 32, kFewGradientRowsOfHalf = 16, kFewGradientStates = 8192,
                  kFewGradientStatesOfHuge = 4095;

// What the device and this build can do for the dtype.
struct Abilities {
  bool tensor_cores, warpgroups;
};

template <class T>
Path choose_forward(const Problem& problem, Abilities able) {
  constexpr bool kHalf = sizeof(T) == 2;
  const int64_t B = problem.B, H = problem.H, states = B * H;
  if (!able.tensor_cores)  // products of half types would need tensor cores, too
    return kHalf || (B <= kFewRows && states <= kFewStates) ? Path::kFewRows : Path::kProducts;
  if (kHalf) {
    if (B <= kFewRowsOfHalf && states <= (H <= kSmallUnits ? kFewStatesOfSmallHalf : kFewStatesOfHalf))
      return Path::kFewRows;
    const bool huge = H > kHugeUnits && B >= kHugeRows;
    if (huge || (H > kWideUnits && B >= kWideRows && B <= kMostWideRows)) return Path::kProducts;
    return able.warpgroups && states >= kStatesOfWarpgroups ? Path::kWarpgroups : Path::kTensorCores;
  }
  if (B <= kFewRowsOfTf32 && states <= (H <= kTinyUnits ? kFewStatesOfTinyTf32 : kFewStatesOfTf32))
    return Path::kFewRows;
  const bool products = B >= kProductRowsOfTf32 && states * (problem.I + H) >= kProductWorkOfTf32;
  return products ? Path::kProducts : Path::kTensorCores;
}

template <class T>
Path choose_backward(const Problem& problem, Abilities able) {
  const int64_t rows = sizeof(T) == 2 ? kFewGradientRowsOfHalf : kFewGradientRows;
  const bool huge = able.tensor_cores && problem.H > kHugeUnits;
  const int64_t states = huge ? kFewGradientStatesOfHuge : kFewGradientStates;
  return problem.B <= rows && problem.B * problem.H <= states ? Path::kFewRows : Path::kProducts;
}

}  // namespace cuda
}  // namespace lstmfused
