// What the kernels with tensor cores share: the pipeline of K-blocks through shared memory, and the
// epilogue.
//
// A block computes kRows rows by kUnits units, of which the weights have 4 * kUnits rows: the four gates of
// a unit lie H rows apart. K-blocks of both factors ("stages") are copied to shared memory asynchronously
// while earlier ones are multiplied. At the end the sums go through shared memory to the threads of the
// epilogue, in a mapping whose loads and stores are coalesced.
#pragma once
#include "kernels.h"
#include "step.h"

namespace lstmfused {
namespace cuda {

template <int kRows_, int kUnits_, int kThreads_, int kParts_, int kStages_>
struct Block {
  static constexpr int kRows = kRows_, kUnits = kUnits_, kThreads = kThreads_;
  static constexpr int kParts = kParts_;                // of a stage, split K over warps
  static constexpr int kBytes = 128 * kParts;           // of a row, in a stage
  static constexpr int kVectors = kBytes / 16;          // of a row, in a stage
  static constexpr int kRowStep = kThreads / kVectors;  // rows that the threads copy at once
  static constexpr int kStages = kStages_;
  static constexpr int kStage = (kRows + 4 * kUnits) * kBytes;
  static constexpr int kShared = kStages * kStage;
  // In the epilogue a thread has kWidth neighbouring units of kTimes rows, kRowsAtOnce apart.
  static constexpr int kStates = kRows * kUnits / kThreads, kWidth = kStates < 4 ? kStates : 4;
  static constexpr int kTimes = kStates / kWidth, kRowsAtOnce = kRows / kTimes;
  // Elements between rows of the sums (parts, rows, 4 * units) in shared memory: padded, so that the eight
  // rows that a warp stores at once have no bank conflicts.
  static constexpr int kSumStride = 4 * kUnits + 8;
  static_assert(kParts * kRows * kSumStride * int(sizeof(float)) <= kShared);
};

// XOR swizzle v ^ (row % 8) of the eight vectors in 128 bytes of a row: conflict-free ldmatrix, and the
// 128-byte swizzle of wgmma.
LSTMFUSED_DEVICE int swizzled(int row, int v) { return v ^ row % 8; }

// The factors of one product as a thread copies them: vector `threadIdx.x % kVectors` of a stage, of every
// kRowStep-th row from `threadIdx.x / kVectors` on.
template <class T>
struct Factors {
  const T* left;    // its first row and vector
  const T* weight;  // its first unit and vector, of the first gate
  int64_t left_step, unit_step, gate_step;
  int64_t K;  // elements of a row that are left from its vector on
  bool left_vectors, weight_vectors;
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
          K - k,
          in_vectors(left, stride, K),
          in_vectors(weight, K, K)};
}

// Field by field, so that both stay in registers.
template <class T>
LSTMFUSED_DEVICE Factors<T> select(bool first, const Factors<T>& a, const Factors<T>& b) {
  return {first ? a.left : b.left,
          first ? a.weight : b.weight,
          first ? a.left_step : b.left_step,
          first ? a.unit_step : b.unit_step,
          first ? a.gate_step : b.gate_step,
          first ? a.K : b.K,
          first ? a.left_vectors : b.left_vectors,
          first ? a.weight_vectors : b.weight_vectors};
}

// Copies the 16 bytes at `from`, of which `left` elements are in the matrix; zeros where the row is out of
// range.
template <class T>
LSTMFUSED_DEVICE void copy_vector(unsigned char* to, const T* from, bool vectors, int64_t left,
                                  bool in_range) {
  if (vectors) return copy_async(to, from, in_range && left > 0);
  Vector<T, kVector<T>> vector;
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) vector.at[i] = in_range && i < left ? from[i] : T{};
  store_vector(reinterpret_cast<T*>(to), vector);
}

// The stages of a block: K-blocks of the input, then of the state.
template <class T>
struct Stages {
  Factors<T> of_input, of_state;
  int rows, units;  // in range, from the thread's first ones on
  int inputs, count;
};
template <class Tile, class T>
LSTMFUSED_DEVICE Stages<T> stages_of(const Forward<T>& p, int64_t row, int64_t unit) {
  constexpr int kDepth = Tile::kBytes / int(sizeof(T));
  const int first = threadIdx.x / Tile::kVectors;
  const int inputs = int((p.I + kDepth - 1) / kDepth);
  return {factors<Tile>(p.input, p.input_stride, p.weight_ih, p.I, p.H, row, unit),
          factors<Tile>(p.hx, p.hx_stride, p.weight_hh, p.H, p.H, row, unit),
          int(p.B - row < Tile::kRows ? p.B - row : Tile::kRows) - first,
          int(p.H - unit < Tile::kUnits ? p.H - unit : Tile::kUnits) - first,
          inputs,
          inputs + int((p.H + kDepth - 1) / kDepth)};
}

template <class Tile>
LSTMFUSED_DEVICE unsigned char* stage_at(int i) {
  return shared_memory() + i % Tile::kStages * Tile::kStage;
}

// Starts the copies of stage i and commits them as a group; beyond the last stage, an empty group, since
// waits count groups. kVectors: all factors may be copied in vectors.
template <class Tile, bool kVectors, class T>
LSTMFUSED_DEVICE void load_stage(const Stages<T>& stages, int i) {
  constexpr int kStep = Tile::kRowStep, kDepth = Tile::kBytes / int(sizeof(T));
  static_assert(Tile::kRows % kStep == 0 && Tile::kUnits % kStep == 0);
  static_assert(kStep % 8 == 0);  // all rows of a thread have the same swizzle
  if (i < stages.count) {
    const bool of_input = i < stages.inputs;
    const Factors<T> from = select(of_input, stages.of_input, stages.of_state);
    const int64_t k = int64_t(of_input ? i : i - stages.inputs) * kDepth;
    const int first = threadIdx.x / Tile::kVectors;
    unsigned char* to =
        stage_at<Tile>(i) + first * Tile::kBytes + swizzled(first, threadIdx.x % Tile::kVectors) * 16;
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += kStep, to += kStep * Tile::kBytes)
      copy_vector(to, from.left + r / kStep * from.left_step + k, kVectors || from.left_vectors, from.K - k,
                  r < stages.rows);
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
#pragma unroll
      for (int u = 0; u < Tile::kUnits; u += kStep, to += kStep * Tile::kBytes)
        copy_vector(to, from.weight + gate * from.gate_step + u / kStep * from.unit_step + k,
                    kVectors || from.weight_vectors, from.K - k, u < stages.units);
  }
  commit_copies();
}

// A thread's share of the epilogue: kWidth units, of every kRowsAtOnce-th row from its first one on.
template <class Tile, class T>
struct Epilogue {
  static constexpr int kWidth = Tile::kWidth;
  int row_in_block, unit_in_block;
  int64_t row, unit;
  float bias[4][kWidth], cx[Tile::kTimes][kWidth];
};
template <class Tile, class T>
LSTMFUSED_DEVICE void load_epilogue(Epilogue<Tile, T>& own, const Forward<T>& p, int64_t row, int64_t unit,
                                    bool vectors) {
  constexpr int kOfRow = Tile::kUnits / Tile::kWidth;  // threads
  own.row_in_block = threadIdx.x / kOfRow;
  own.unit_in_block = threadIdx.x % kOfRow * Tile::kWidth;
  own.row = row + own.row_in_block;
  own.unit = unit + own.unit_in_block;
  if (own.unit >= p.H) return;
  load_bias(own.bias, p, own.unit, vectors);
#pragma unroll
  for (int i = 0; i < Tile::kTimes; i++) {
    const int64_t r = own.row + i * Tile::kRowsAtOnce;
    if (r < p.B) load_cx(own.cx[i], p, r, own.unit, vectors);
  }
}
template <class Tile, class T>
LSTMFUSED_DEVICE void finish_epilogue(const Epilogue<Tile, T>& own, const Forward<T>& p, bool vectors) {
  if (own.unit >= p.H) return;
  const float* const sums = reinterpret_cast<const float*>(shared_memory()) +
                            own.row_in_block * Tile::kSumStride + own.unit_in_block;
#pragma unroll
  for (int i = 0; i < Tile::kTimes; i++) {
    const int64_t r = own.row + i * Tile::kRowsAtOnce;
    if (r >= p.B) return;
    float total[4][Tile::kWidth] = {};
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
#pragma unroll
      for (int part = 0; part < Tile::kParts; part++) {
        const int at =
            (part * Tile::kRows + i * Tile::kRowsAtOnce) * Tile::kSumStride + gate * Tile::kUnits;
        const auto sum = load_vector<Tile::kWidth>(sums + at);
#pragma unroll
        for (int j = 0; j < Tile::kWidth; j++) total[gate][j] += sum.at[j];
      }
    finish_states(p, r, own.unit, total, own.bias, own.cx[i], vectors);
  }
}

// Whether all four factors may be copied in vectors.
template <class T>
static bool factors_in_vectors(const Forward<T>& p) {
  return in_vectors(p.input, p.input_stride, p.I) && in_vectors(p.hx, p.hx_stride, p.H) &&
         in_vectors(p.weight_ih, p.I, p.I) && in_vectors(p.weight_hh, p.H, p.H);
}

// What the busiest multiprocessor copies from L2, in rows of a stage: the model by which tiles are chosen.
template <class Tile, class T>
static int64_t copied_rows(const Forward<T>& p, const Device& device) {
  const int64_t blocks = ceil_div(p.B, Tile::kRows) * ceil_div(p.H, Tile::kUnits);
  return ceil_div(blocks, device.multiprocessors) * (Tile::kRows + 4 * Tile::kUnits);
}

}  // namespace cuda
}  // namespace lstmfused
