// Many rows of half types on Hopper: the product by wgmma, which reads both factors from shared memory, and stages
// that the tensor memory accelerator (TMA) copies there. One warp asks for the copies, up to kStages ahead of the
// warpgroups that multiply; barriers in shared memory tell either side how far the other one has come.
#pragma once
#include "block.h"

namespace lstmfused {
namespace cuda {

template <int kGroups_, int kUnits_, int kStages_>
struct GroupTile : Block<64 * kGroups_, kUnits_, 128 * kGroups_, 1, kStages_> {
  static constexpr int kGroups = kGroups_;                                // warpgroups, each of 64 rows
  static constexpr int kColumns = 4 * kUnits_ < 128 ? 4 * kUnits_ : 128;  // of one instruction
  static constexpr int kInstructions = 4 * kUnits_ / kColumns;            // side by side
  static constexpr int kSharedAndBarriers = kStages_ * (GroupTile::kStage + 2 * int(sizeof(uint64_t)));
};
using WideGroups = GroupTile<2, 64, 4>;    // 128 rows, 64 units
using LargeGroups = GroupTile<2, 32, 6>;   // 128 rows, 32 units
using MediumGroups = GroupTile<1, 32, 8>;  // 64 rows, 32 units
using SmallGroups = GroupTile<1, 16, 12>;  // 64 rows, 16 units

// Where stages are copied from: input and hx as (1, rows, K), weights as (gates, units, K).
struct FactorMaps {
  TensorMap input, hx, weight_ih, weight_hh;
};

// Grid (blocks of rows, blocks of units).
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads + kWarp, 1)
    warpgroups(const LSTMFUSED_GRID_CONSTANT FactorMaps maps, const Forward<T> p, bool states_in_vectors) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // has_warpgroups() is false there
#else
  constexpr int kDepth = Tile::kBytes / int(sizeof(T));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool multiplies = threadIdx.x < Tile::kThreads;
  const int64_t row = int64_t(blockIdx.x) * Tile::kRows, unit = int64_t(blockIdx.y) * Tile::kUnits;
  const int inputs = int((p.I + kDepth - 1) / kDepth), count = inputs + int((p.H + kDepth - 1) / kDepth);
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory() + Tile::kShared);  // of each stage
  uint64_t* const empty = full + Tile::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; i++) {
      init_barrier(full + i, 1);
      init_barrier(empty + i, Tile::kThreads / kWarp);
    }
    publish_barriers();
  }
  __syncthreads();

  float sums[Tile::kInstructions][Tile::kColumns / 2] = {};
  if (threadIdx.x == Tile::kThreads) {
    for (int i = 0; i < count; i++) {
      const int at = i % Tile::kStages, round = i / Tile::kStages;
      if (round > 0) wait_barrier(empty + at, (round - 1) % 2);
      expect_bytes(full + at, Tile::kStage);
      const bool of_input = i < inputs;
      const int k = (of_input ? i : i - inputs) * kDepth;
      unsigned char* const stage = stage_at<Tile>(i);
      copy_box(stage, of_input ? maps.input : maps.hx, k, int(row), 0, full + at);
      copy_box(stage + Tile::kRows * Tile::kBytes, of_input ? maps.weight_ih : maps.weight_hh, k, int(unit), 0,
               full + at);
    }
  } else if (multiplies) {
    for (int i = 0; i < count; i++) {
      wait_barrier(full + i % Tile::kStages, i / Tile::kStages % 2);
      const unsigned char* const left = stage_at<Tile>(i) + warp / 4 * 64 * Tile::kBytes;
      const unsigned char* const weight = stage_at<Tile>(i) + Tile::kRows * Tile::kBytes;
      begin_products();
#pragma unroll
      for (int byte = 0; byte < Tile::kBytes; byte += 32)
#pragma unroll
        for (int part = 0; part < Tile::kInstructions; part++)
          multiply_group(sums[part], left + byte, weight + part * Tile::kColumns * Tile::kBytes + byte, T{});
      commit_products();
      wait_products<1>();  // stage i - 1 has been read
      if (i > 0 && lane == 0) arrive(empty + (i - 1) % Tile::kStages);
    }
    wait_products<0>();
  }
  __syncthreads();  // all stages have been read

  // To where every thread finds what it finishes.
  End<Tile, T> end;
  if (multiplies) {
    float* const all = reinterpret_cast<float*>(shared_memory()) +
                       (warp * 16 + lane / 4) * Tile::kSumStride + lane % 4 * 2;
#pragma unroll
    for (int part = 0; part < Tile::kInstructions; part++)
#pragma unroll
      for (int i = 0; i < Tile::kColumns / 2; i += 2)
        store_vector<2>(all + i % 4 / 2 * 8 * Tile::kSumStride + part * Tile::kColumns + i / 4 * 8,
                        Vector<float, 2>{sums[part][i], sums[part][i + 1]});
    load_end(end, p, row, unit, states_in_vectors);
  }
  __syncthreads();
  if (multiplies) finish_end(end, p, states_in_vectors);
#endif
}

template <class T>
const char* forward_warpgroups(const Forward<T>& p, const Device& device) {
  static_assert(sizeof(T) == 2);
  // Rows that repeat, or none, are nothing that a map can tell.
  if (!factors_in_vectors(p) || p.I == 0 || p.input_stride < p.I || p.hx_stride < p.H)
    return forward_tensor_cores(p, device);
  const auto run = [&](auto tile) -> const char* {
    using Tile = decltype(tile);
    constexpr auto kernel = warpgroups<T, Tile>;
    constexpr size_t kShared = Tile::kSharedAndBarriers;
    const auto left = [&](TensorMap& map, const T* from, int64_t stride, int64_t K) {
      return make_map(map, from, {K, p.B, 1}, {stride, stride * p.B}, {64, Tile::kRows, 1});
    };
    const auto weight = [&](TensorMap& map, const T* from, int64_t K) {
      return make_map(map, from, {K, p.H, 4}, {K, p.H * K}, {64, Tile::kUnits, 4});
    };
    FactorMaps maps;
    const char* error = left(maps.input, p.input, p.input_stride, p.I);
    if (!error) error = left(maps.hx, p.hx, p.hx_stride, p.H);
    if (!error) error = weight(maps.weight_ih, p.weight_ih, p.I);
    if (!error) error = weight(maps.weight_hh, p.weight_hh, p.H);
    if (!error) error = allow_shared_memory<kernel>(kShared, device.index);
    const dim3 grid(unsigned(ceil_div(p.B, Tile::kRows)), unsigned(ceil_div(p.H, Tile::kUnits)));
    return error ? error
                 : launch(kernel, grid, dim3(Tile::kThreads + kWarp), kShared, device.stream, maps, p,
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
