// Many rows: a step as one matrix product over [input | hx], in tensor cores, with the end of the step in
// its epilogue. bfloat16, float16, and float32 rounded to tf32; sums are float32.
//
// A block makes kRows rows of kUnits units, that is of 4 * kUnits rows of the weights: those of a unit lie
// H apart, which is only a matter of addresses. Each thread then has all four gates of its states.
// Stretches of K travel to shared memory while earlier ones are multiplied. Where blocks are small, the
// warps of a block share a stretch: each multiplies a part of it, and what they have is added up in order.
#pragma once
#include "kernels.h"
#include "step.h"

namespace lstmfused {
namespace cuda {

template <int kRowWarps_, int kRowTiles_, int kUnitWarps_, int kParts_, int kBlocks_>
struct Tile {
  static constexpr int kRowWarps = kRowWarps_;    // warps along the rows,
  static constexpr int kUnitWarps = kUnitWarps_;  // along the units
  static constexpr int kParts = kParts_;          // and along K
  static constexpr int kRowTiles = kRowTiles_;    // of 16 rows, of a warp
  static constexpr int kBlocks = kBlocks_;        // on a multiprocessor, at least
  static constexpr int kRows = 16 * kRowTiles * kRowWarps, kUnits = 16 * kUnitWarps;
  static constexpr int kWarps = kRowWarps * kUnitWarps * kParts, kThreads = kWarp * kWarps;
  static constexpr int kBytes = 128 * kParts;           // of a row, in a stretch of K
  static constexpr int kVectors = kBytes / 16;          // of a row in a stretch; how many rows
  static constexpr int kRowStep = kThreads / kVectors;  // the threads of a block copy at once
  static constexpr int kStages = 3;
  static constexpr int kStage = (kRows + 4 * kUnits) * kBytes;
  static constexpr int kShared = kStages * kStage;
};
using HugeTile = Tile<4, 4, 2, 1, 1>;    // 256 rows, 32 units
using LargeTile = Tile<4, 2, 2, 1, 2>;   // 128 rows, 32 units
using MediumTile = Tile<4, 1, 1, 2, 2>;  // 64 rows, 16 units
using SmallTile = Tile<2, 1, 1, 4, 1>;   // 32 rows, 16 units

// In shared memory the eight vectors of 128 bytes of a row change places, by another rule in each of eight
// rows: so eight rows have the same vector in all banks, not in the same ones. Where vector `v` is then:
LSTMFUSED_DEVICE int swizzled(int row, int v) { return v ^ row % 8; }

// The factors of one product as a thread copies them: vector `threadIdx.x % kVectors` of a stretch of K, of
// every kRowStep-th row from `threadIdx.x / kVectors` on.
template <class T>
struct Factors {
  const T* left;    // its first row and vector
  const T* weight;  // its first unit and vector, of the first gate
  int64_t left_step, unit_step, gate_step;
  int64_t K;  // elements of a row that are left from its vector on
};
template <class Tile, class T>
LSTMFUSED_DEVICE Factors<T> factors(const T* left, int64_t stride, const T* weight, int64_t K, int64_t H,
                                    int64_t row, int64_t unit) {
  const int first = threadIdx.x / Tile::kVectors, k = threadIdx.x % Tile::kVectors * kVector<T>;
  return {left + (row + first) * stride + k,
          weight + (unit + first) * K + k,
          Tile::kRowStep * stride,
          Tile::kRowStep * K,
          H * K,
          K - k};
}

// Field by field: registers have no address to choose.
template <class T>
LSTMFUSED_DEVICE Factors<T> either(bool first, const Factors<T>& a, const Factors<T>& b) {
  return {first ? a.left : b.left,           first ? a.weight : b.weight,
          first ? a.left_step : b.left_step, first ? a.unit_step : b.unit_step,
          first ? a.gate_step : b.gate_step, first ? a.K : b.K};
}

// Copies the 16 bytes at `from`, of which `left` elements lie in their row; of a row that is not, zeros.
template <bool kVectors, class T>
LSTMFUSED_DEVICE void copy_vector(unsigned char* to, const T* from, int64_t left, bool is) {
  if constexpr (kVectors) {
    copy_async(to, from, is && left > 0);
  } else {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kVector<T>; i++) vector.at[i] = is && i < left ? from[i] : T{};
    *reinterpret_cast<Vector<T>*>(to) = vector;
  }
}

// The stretch of K from k on, of the `rows` and `units` that there are from the thread's first ones on.
template <class Tile, bool kVectors, class T>
LSTMFUSED_DEVICE void load_stage(unsigned char* stage, const Factors<T>& from, int64_t k, int rows,
                                 int units) {
  constexpr int kStep = Tile::kRowStep;
  static_assert(Tile::kRows % kStep == 0 && Tile::kUnits % kStep == 0);
  static_assert(kStep % 8 == 0);  // and the rule is one for all rows of a thread
  const int first = threadIdx.x / Tile::kVectors;
  unsigned char* to = stage + first * Tile::kBytes + swizzled(first, threadIdx.x % Tile::kVectors) * 16;
#pragma unroll
  for (int r = 0; r < Tile::kRows; r += kStep, to += kStep * Tile::kBytes)
    copy_vector<kVectors>(to, from.left + r / kStep * from.left_step + k, from.K - k, r < rows);
#pragma unroll
  for (int gate = 0; gate < 4; gate++)
#pragma unroll
    for (int u = 0; u < Tile::kUnits; u += kStep, to += kStep * Tile::kBytes)
      copy_vector<kVectors>(to, from.weight + gate * from.gate_step + u / kStep * from.unit_step + k,
                            from.K - k, u < units);
}

// What a warp has: sums[m][gate][n] is 16 rows by 8 units.
template <class Tile>
struct WarpSums {
  float at[Tile::kRowTiles][4][2][4];
};

LSTMFUSED_DEVICE void round_factor(uint32_t& bits, float) { bits = to_tf32(bits); }
LSTMFUSED_DEVICE void round_factor(uint32_t&, bfloat16) {}
LSTMFUSED_DEVICE void round_factor(uint32_t&, float16) {}

// sums += the product of the warp's rows, units and part of the stage. Matrices are spoken of in bytes: 32
// of a row are one matrix instruction's worth of every type.
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

// Adds the sums of the parts to those of the first, in order, through shared memory.
template <class Tile>
LSTMFUSED_DEVICE void add_parts(WarpSums<Tile>& sums, int part) {
  constexpr int kCount = sizeof(WarpSums<Tile>) / sizeof(float);
  constexpr int kThreads = Tile::kThreads / Tile::kParts;  // of a part
  static_assert((Tile::kParts - 1) * kThreads * sizeof(WarpSums<Tile>) <= Tile::kShared);
  float* const all = reinterpret_cast<float*>(shared_memory());  // (parts - 1, count, threads)
  const int thread = threadIdx.x % kThreads;
  float* const own = &sums.at[0][0][0][0];
  __syncthreads();  // the last stage has been read
  if (part > 0)
#pragma unroll
    for (int i = 0; i < kCount; i++) all[((part - 1) * kCount + i) * kThreads + thread] = own[i];
  __syncthreads();
  if (part > 0) return;
  for (int other = 0; other < Tile::kParts - 1; other++)
#pragma unroll
    for (int i = 0; i < kCount; i++) own[i] += all[(other * kCount + i) * kThreads + thread];
}

// Grid (blocks of rows, blocks of units).
template <class T, class Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, kVectors ? Tile::kBlocks : 1)
    tensor_cores(const Forward<T> p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // has_tensor_cores() is false there
#else
  constexpr int kDepth = Tile::kBytes / int(sizeof(T));
  constexpr int kWarpsOfPart = Tile::kWarps / Tile::kParts;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int part = warp / kWarpsOfPart, row_warp = warp % Tile::kRowWarps,
            unit_warp = warp % kWarpsOfPart / Tile::kRowWarps;
  const int64_t row = int64_t(blockIdx.x) * Tile::kRows, unit = int64_t(blockIdx.y) * Tile::kUnits;

  // Stretches of the input, then of the state.
  const Factors<T> of_input = factors<Tile>(p.input, p.input_stride, p.weight_ih, p.I, p.H, row, unit);
  const Factors<T> of_state = factors<Tile>(p.hx, p.hx_stride, p.weight_hh, p.H, p.H, row, unit);
  const int first = threadIdx.x / Tile::kVectors;
  const int rows = int(p.B - row < Tile::kRows ? p.B - row : Tile::kRows) - first;
  const int units = int(p.H - unit < Tile::kUnits ? p.H - unit : Tile::kUnits) - first;
  const int inputs = int((p.I + kDepth - 1) / kDepth), count = inputs + int((p.H + kDepth - 1) / kDepth);
  const auto stage = [&](int i) { return shared_memory() + i % Tile::kStages * Tile::kStage; };
  const auto load = [&](int i) {
    if (i < count) {
      const bool in = i < inputs;
      const int64_t k = int64_t(in ? i : i - inputs) * kDepth;
      load_stage<Tile, kVectors>(stage(i), either(in, of_input, of_state), k, rows, units);
    }
    commit_copies();  // of nothing, too: waits count groups
  };

  WarpSums<Tile> sums{};
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; i++) load(i);
  for (int i = 0; i < count; i++) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // stage i has come, and stage i - 1 has been read by all
    load(i + Tile::kStages - 1);
    multiply_stage<Tile, T>(sums, stage(i), row_warp, unit_warp, part);
  }
  if constexpr (Tile::kParts > 1) {
    add_parts(sums, part);
    if (part > 0) return;
  }

  // Units first: their biases serve all rows.
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int64_t u = unit + unit_warp * 16 + n * 8 + lane % 4 * 2 + side;
      if (u >= p.H) break;
      const Gates<float> bias = sum_bias(p, u);
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int64_t r = row + (row_warp * Tile::kRowTiles + m) * 16 + half * 8 + lane / 4;
          const int i = half * 2 + side;
          const auto& s = sums.at[m];
          const Gates<float> total{s[0][n][i], s[1][n][i], s[2][n][i], s[3][n][i]};
          if (r < p.B) finish_state(p, r, u, total, bias);
        }
    }
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
    return launch(kernel, grid, dim3(Tile::kThreads), Tile::kShared, device.stream, p);
  };
  if (!(in_vectors(p.input, p.input_stride, p.I) && in_vectors(p.hx, p.hx_stride, p.H) &&
        in_vectors(p.weight_ih, p.I, p.I) && in_vectors(p.weight_hh, p.H, p.H)))
    return run(MediumTile{}, Number<false>{});
  // Blocks fetch their factors from the second-level cache: those of the least load on any multiprocessor,
  // and of equal ones the largest.
  constexpr int64_t kNone = int64_t(1) << 62;
  const auto load = [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t blocks = ceil_div(p.B, Tile::kRows) * ceil_div(p.H, Tile::kUnits);
    const bool fits = Tile::kShared <= device.shared_memory;
    return fits ? ceil_div(blocks, device.multiprocessors) * (Tile::kRows + 4 * Tile::kUnits) : kNone;
  };
  const int64_t huge = load(HugeTile{}), large = load(LargeTile{}), medium = load(MediumTile{}),
                small = load(SmallTile{});
  if (huge <= large && huge <= medium && huge <= small) return run(HugeTile{}, Number<true>{});
  if (large <= medium && large <= small) return run(LargeTile{}, Number<true>{});
  return medium <= small ? run(MediumTile{}, Number<true>{}) : run(SmallTile{}, Number<true>{});
}

}  // namespace cuda
}  // namespace lstmfused
