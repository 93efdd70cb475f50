// Many rows of half types on Hopper: the product by wgmma, which reads both factors from shared memory,
// asynchronously, while the next stages are copied.
#pragma once
#include "block.h"

namespace lstmfused {
namespace cuda {

template <int kGroups_, int kUnits_, int kStages_>
struct GroupTile : Block<64 * kGroups_, kUnits_, 128 * kGroups_, 1, kStages_> {
  static constexpr int kGroups = kGroups_;                                // warpgroups, each of 64 rows
  static constexpr int kColumns = 4 * kUnits_ < 128 ? 4 * kUnits_ : 128;  // of one instruction
  static constexpr int kInstructions = 4 * kUnits_ / kColumns;            // side by side
};
using WideGroups = GroupTile<2, 64, 4>;    // 128 rows, 64 units
using LargeGroups = GroupTile<2, 32, 5>;   // 128 rows, 32 units
using MediumGroups = GroupTile<1, 32, 5>;  // 64 rows, 32 units
using SmallGroups = GroupTile<1, 16, 6>;   // 64 rows, 16 units

// Grid (blocks of rows, blocks of units).
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    warpgroups(const Forward<T> p, bool states_in_vectors) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // has_warpgroups() is false there
#else
  const int group = threadIdx.x / 128, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * Tile::kRows, unit = int64_t(blockIdx.y) * Tile::kUnits;
  const Stages<T> stages = stages_of<Tile>(p, row, unit);
  float sums[Tile::kInstructions][Tile::kColumns / 2] = {};
#pragma unroll
  for (int i = 0; i < Tile::kStages - 2; i++) load_stage<Tile, true>(stages, i);
  for (int i = 0; i < stages.count; i++) {
    wait_copies<Tile::kStages - 3>();
    publish_copies();
    __syncthreads();  // stage i is complete, and stage i - 2 has been read
    const unsigned char* const left = stage_at<Tile>(i) + group * 64 * Tile::kBytes;
    const unsigned char* const weight = stage_at<Tile>(i) + Tile::kRows * Tile::kBytes;
    begin_products();
#pragma unroll
    for (int byte = 0; byte < Tile::kBytes; byte += 32)
#pragma unroll
      for (int part = 0; part < Tile::kInstructions; part++)
        multiply_group(sums[part], left + byte, weight + part * Tile::kColumns * Tile::kBytes + byte, T{});
    commit_products();
    load_stage<Tile, true>(stages, i + Tile::kStages - 2);  // over stage i - 2
    wait_products<1>();
  }
  finish_products(sums);
  __syncthreads();  // all warpgroups have read the last stage

  // Sums to shared memory, for the epilogue.
  float* const all =
      reinterpret_cast<float*>(shared_memory()) + (warp * 16 + lane / 4) * Tile::kSumStride + lane % 4 * 2;
#pragma unroll
  for (int part = 0; part < Tile::kInstructions; part++)
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 2; i += 2)
      store_vector<2>(all + i % 4 / 2 * 8 * Tile::kSumStride + part * Tile::kColumns + i / 4 * 8,
                      Vector<float, 2>{sums[part][i], sums[part][i + 1]});
  Epilogue<Tile, T> own;
  load_epilogue(own, p, row, unit, states_in_vectors);
  __syncthreads();
  finish_epilogue(own, p, states_in_vectors);
#endif
}

template <class T>
const char* forward_warpgroups(const Forward<T>& p, const Device& device) {
  static_assert(sizeof(T) == 2);
  if (!factors_in_vectors(p)) return forward_tensor_cores(p, device);
  const auto run = [&](auto tile) -> const char* {
    using Tile = decltype(tile);
    constexpr auto kernel = warpgroups<T, Tile>;
    if (const char* error = allow_shared_memory<kernel>(Tile::kShared, device.index)) return error;
    const dim3 grid(unsigned(ceil_div(p.B, Tile::kRows)), unsigned(ceil_div(p.H, Tile::kUnits)));
    return launch(kernel, grid, dim3(Tile::kThreads), Tile::kShared, device.stream, p,
                  states_in_vectors<Tile::kWidth>(p));
  };
  const int64_t wide = copied_rows<WideGroups>(p, device), large = copied_rows<LargeGroups>(p, device),
                medium = copied_rows<MediumGroups>(p, device), small = copied_rows<SmallGroups>(p, device);
  if (wide <= large && wide <= medium && wide <= small) return run(WideGroups{});
  if (large <= medium && large <= small) return run(LargeGroups{});
  return medium <= small ? run(MediumGroups{}) : run(SmallGroups{});
}

}  // namespace cuda
}  // namespace lstmfused
