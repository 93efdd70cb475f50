// Which way a step is computed, by its sizes.
//
// The thresholds were read off the "crossovers" in benchmarks/results/nvidia-h200-*.json, where every path
// ran at every size of a grid, in CUDA graphs with the weights in L2; tests/test_cuda_host.py holds them to
// that file. Other devices than Hopper are not measured. Behind the thresholds stand three costs:
//
// - small batch: multiply-adds, B * 4H * (I + H), on 32-bit floats, at about a quarter of their peak;
// - tensor cores: what the busiest multiprocessor copies from L2, and 3 to 4 us to begin and to end;
// - products: three launches, and the sums (B, 4H) in float32 to memory and back twice.
#pragma once
#include "kernels.h"

namespace lstmfused {
namespace cuda {

// B and B * H up to which the small-batch kernel is the fastest: for float32 and float64, for tf32, and for
// half types, whose vectors have eight elements, so that fewer lanes find work.
constexpr int64_t kSmallBatchRows = 512, kSmallBatchStates = 32768;
constexpr int64_t kSmallBatchRowsOfTf32 = 256, kSmallBatchStatesOfTf32 = 8192,
                  kSmallBatchStatesOfTinyTf32 = 16384, kTinyUnits = 64;
constexpr int64_t kSmallBatchRowsOfHalf = 64, kSmallBatchStatesOfHalf = 4096,
                  kSmallBatchStatesOfSmallHalf = 8192, kSmallUnits = 128;
// Of tf32, products win from so many rows and multiply-adds, B * H * (I + H), on.
constexpr int64_t kProductRowsOfTf32 = 64, kProductWorkOfTf32 = int64_t(200) << 20;
// Of half types, from so many units and rows on; up to so many rows, or any.
constexpr int64_t kWideUnits = 768, kWideRows = 192, kMostWideRows = 511;
constexpr int64_t kHugeUnits = 1536, kHugeRows = 96;
// B * H from which on wgmma beats mma.sync.
constexpr int64_t kStatesOfWarpgroups = 262144;

// Backward: B and B * H up to which one launch for all products is faster than four of another library, and
// B * H where these have tensor cores and the weights are many.
constexpr int64_t kSmallBatchGradientRows = 32, kSmallBatchGradientRowsOfHalf = 16,
                  kSmallBatchGradientStates = 8192, kSmallBatchGradientStatesOfHuge = 4095;

// What the device and this build can do for the dtype.
struct Abilities {
  bool tensor_cores, warpgroups;
};

template <class T>
Path choose_forward(const Problem& problem, Abilities able) {
  constexpr bool kHalf = sizeof(T) == 2;
  const int64_t B = problem.B, H = problem.H, states = B * H;
  if (!able.tensor_cores)  // products of half types would need tensor cores, too
    return kHalf || (B <= kSmallBatchRows && states <= kSmallBatchStates) ? Path::kSmallBatch
                                                                          : Path::kProducts;
  if (kHalf) {
    if (B <= kSmallBatchRowsOfHalf &&
        states <= (H <= kSmallUnits ? kSmallBatchStatesOfSmallHalf : kSmallBatchStatesOfHalf))
      return Path::kSmallBatch;
    const bool huge = H > kHugeUnits && B >= kHugeRows;
    if (huge || (H > kWideUnits && B >= kWideRows && B <= kMostWideRows)) return Path::kProducts;
    return able.warpgroups && states >= kStatesOfWarpgroups ? Path::kWarpgroups : Path::kTensorCores;
  }
  if (B <= kSmallBatchRowsOfTf32 &&
      states <= (H <= kTinyUnits ? kSmallBatchStatesOfTinyTf32 : kSmallBatchStatesOfTf32))
    return Path::kSmallBatch;
  const bool products = B >= kProductRowsOfTf32 && states * (problem.I + H) >= kProductWorkOfTf32;
  return products ? Path::kProducts : Path::kTensorCores;
}

template <class T>
Path choose_backward(const Problem& problem, Abilities able) {
  const int64_t rows = sizeof(T) == 2 ? kSmallBatchGradientRowsOfHalf : kSmallBatchGradientRows;
  const bool huge = able.tensor_cores && problem.H > kHugeUnits;
  const int64_t states = huge ? kSmallBatchGradientStatesOfHuge : kSmallBatchGradientStates;
  return problem.B <= rows && problem.B * problem.H <= states ? Path::kSmallBatch : Path::kProducts;
}

}  // namespace cuda
}  // namespace lstmfused
