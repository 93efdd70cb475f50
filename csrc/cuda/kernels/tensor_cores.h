// Many rows: a step as one matrix product over [input | hx] by mma.sync, with the pointwise part in its
// epilogue. bfloat16, float16, and float32 rounded to tf32; sums are float32. In small tiles the warps
// split the K of a stage, and their sums are reduced in a fixed order.
#pragma once
#include "block.h"

namespace lstmfused {
namespace cuda {

template <int kRowWarps_, int kRowTiles_, int kUnitWarps_, int kParts_, int kBlocks_>
struct Tile : Block<16 * kRowTiles_ * kRowWarps_, 16 * kUnitWarps_,
                    kWarp * kRowWarps_ * kUnitWarps_ * kParts_, kParts_, 3> {
  static constexpr int kRowWarps = kRowWarps_;    // warps along the rows,
  static constexpr int kUnitWarps = kUnitWarps_;  // along the units
  static constexpr int kRowTiles = kRowTiles_;    // of 16 rows, of a warp
  static constexpr int kBlocks = kBlocks_;        // on a multiprocessor, at least
};
using HugeTile = Tile<4, 4, 2, 1, 1>;    // 256 rows, 32 units
using LargeTile = Tile<4, 2, 2, 1, 2>;   // 128 rows, 32 units
using MediumTile = Tile<4, 1, 1, 2, 2>;  // 64 rows, 16 units
using SmallTile = Tile<2, 1, 1, 4, 1>;   // 32 rows, 16 units

// The accumulators of a warp: at[m][gate][n] is 16 rows by 8 units.
template <class Tile>
struct WarpSums {
  float at[Tile::kRowTiles][4][2][4];
};

LSTMFUSED_DEVICE void round_factor(uint32_t& bits, float) { bits = to_tf32(bits); }
LSTMFUSED_DEVICE void round_factor(uint32_t&, bfloat16) {}
LSTMFUSED_DEVICE void round_factor(uint32_t&, float16) {}

// sums += the product of the warp's rows, units and part of the stage. Offsets are in bytes: 32 of a row
// are the K of one matrix instruction for every type.
template <class Tile, class T>
LSTMFUSED_DEVICE void multiply_stage(WarpSums<Tile>& sums, const unsigned char* stage, int row_warp,
                                     int unit_warp, int part) {
  const int lane = threadIdx.x % kWarp;
  const unsigned char* left =
      stage + (row_warp * Tile::kRowTiles * 16 + lane % 16) * Tile::kBytes + part * 128;
  const unsigned char* right =
      stage + (Tile::kRows + unit_warp * 16 + lane / 16 * 8 + lane % 8) * Tile::kBytes + part * 128;
  const int left_vector = swizzled(lane, lane / 16) * 16, right_vector = swizzled(lane, lane / 8 % 2) * 16;
#pragma unroll
  for (int byte = 0; byte < 128; byte += 32) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; m++) {
      load_matrices(a[m], left + m * 16 * Tile::kBytes + (left_vector ^ byte));
#pragma unroll
      for (int i = 0; i < 4; i++) round_factor(a[m][i], T{});
    }
#pragma unroll
    for (int gate = 0; gate < 4; gate++) {
      uint32_t b[4];  // of 16 units
      load_matrices(b, right + gate * Tile::kUnits * Tile::kBytes + (right_vector ^ byte));
#pragma unroll
      for (int i = 0; i < 4; i++) round_factor(b[i], T{});
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const uint32_t of_units[2] = {b[2 * n], b[2 * n + 1]};
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; m++) multiply(sums.at[m][gate][n], a[m], of_units, T{});
      }
    }
  }
}

// Stores the sums of a warp to shared memory, for the epilogue.
template <class Tile>
LSTMFUSED_DEVICE void store_sums(const WarpSums<Tile>& sums, int row_warp, int unit_warp, int part) {
  const int lane = threadIdx.x % kWarp;
  const int row = part * Tile::kRows + row_warp * Tile::kRowTiles * 16 + lane / 4;
  float* const all =
      reinterpret_cast<float*>(shared_memory()) + row * Tile::kSumStride + unit_warp * 16 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; m++)
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float* const pair = &sums.at[m][gate][n][half * 2];
          store_vector<2>(all + (m * 16 + half * 8) * Tile::kSumStride + gate * Tile::kUnits + n * 8,
                          Vector<float, 2>{pair[0], pair[1]});
        }
}

// Grid (blocks of rows, blocks of units).
template <class T, class Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, kVectors ? Tile::kBlocks : 1)
    tensor_cores(const Forward<T> p, bool states_in_vectors) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // has_tensor_cores() is false there
#else
  constexpr int kWarpsOfPart = Tile::kThreads / kWarp / Tile::kParts;
  const int warp = threadIdx.x / kWarp;
  const int part = warp / kWarpsOfPart, row_warp = warp % Tile::kRowWarps,
            unit_warp = warp % kWarpsOfPart / Tile::kRowWarps;
  const int64_t row = int64_t(blockIdx.x) * Tile::kRows, unit = int64_t(blockIdx.y) * Tile::kUnits;

  const Stages<T> stages = stages_of<Tile>(p, row, unit);
  WarpSums<Tile> sums{};
  Epilogue<Tile, T> own;
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; i++) load_stage<Tile, kVectors>(stages, i);
  if constexpr (Tile::kTimes == 1) load_epilogue(own, p, row, unit, states_in_vectors);
  for (int i = 0; i < stages.count; i++) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // stage i is complete, and all warps have read stage i - 1
    load_stage<Tile, kVectors>(stages, i + Tile::kStages - 1);
    multiply_stage<Tile, T>(sums, stage_at<Tile>(i), row_warp, unit_warp, part);
  }
  __syncthreads();  // all warps have read the last stage
  store_sums(sums, row_warp, unit_warp, part);
  if constexpr (Tile::kTimes > 1) load_epilogue(own, p, row, unit, states_in_vectors);
  __syncthreads();
  finish_epilogue(own, p, states_in_vectors);
#endif
}

template <class T>
const char* forward_tensor_cores(const Forward<T>& p, const Device& device) {
  static_assert(sizeof(T) <= sizeof(float));
  const auto run = [&](auto tile, auto vectors) -> const char* {
    using Tile = decltype(tile);
    constexpr auto kernel = tensor_cores<T, Tile, decltype(vectors)::value>;
    if (const char* error = allow_shared_memory<kernel>(Tile::kShared, device.index)) return error;
    const dim3 grid(unsigned(ceil_div(p.B, Tile::kRows)), unsigned(ceil_div(p.H, Tile::kUnits)));
    return launch(kernel, grid, dim3(Tile::kThreads), Tile::kShared, device.stream, p,
                  states_in_vectors<Tile::kWidth>(p));
  };
  if (!factors_in_vectors(p)) return run(MediumTile{}, Number<false>{});
  constexpr int64_t kNone = int64_t(1) << 62;
  const auto load = [&](auto tile) {
    using Tile = decltype(tile);
    return Tile::kShared <= device.shared_memory ? copied_rows<Tile>(p, device) : kNone;
  };
  const int64_t huge = load(HugeTile{}), large = load(LargeTile{}), medium = load(MediumTile{}),
                small = load(SmallTile{});
  if (huge <= large && huge <= medium && huge <= small) return run(HugeTile{}, Number<true>{});
  if (large <= medium && large <= small) return run(LargeTile{}, Number<true>{});
  return medium <= small ? run(MediumTile{}, Number<true>{}) : run(SmallTile{}, Number<true>{});
}

}  // namespace cuda
}  // namespace lstmfused
