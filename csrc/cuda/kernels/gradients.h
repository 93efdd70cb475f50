// A step backward: gradients of the gates, of cx and of the biases; at small batch the products, too.
#pragma once
#include "kernels.h"
#include "small_batch.h"
#include "step.h"

namespace lstmfused {
namespace cuda {

// ---------------------------------------------------------------------------------------------------
// Gates

constexpr int kGradientUnits = 32;  // of a block
constexpr int kGradientRows = 32;   // of a block at a time, and of a chunk of the batch at least

// Block (threads of N units, kGradientRows), grid (blocks of units, chunks of the batch). Each block sums
// its chunk of the bias gradients in the order of the rows: no atomics, so the same bits at every call.
template <class T, int N>
__global__ void __launch_bounds__(kGradientUnits / N * kGradientRows)
    gate_gradients_kernel(const Backward<T, T> p, int64_t rows_of_chunk, Accumulate<T>* partial, T* bias_ih,
                          T* bias_hh, bool vectors) {
  using A = Accumulate<T>;
  using Math = ScalarMath<A>;
  const int64_t unit = int64_t(blockIdx.x) * kGradientUnits + threadIdx.x * N, count = p.H - unit;
  const int64_t begin = int64_t(blockIdx.y) * rows_of_chunk;
  const int64_t end = begin + rows_of_chunk < p.B ? begin + rows_of_chunk : p.B;
  A sums[4][N] = {};
  for (int64_t row = begin + threadIdx.y; count > 0 && row < end; row += kGradientRows) {
    A gates[4][N], cx[N], grad_h[N] = {}, grad_c[N] = {};
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
      load_elements<N>(gates[gate], p.gates + (row * 4 + gate) * p.H + unit, vectors, count);
    load_cell(cx, p.cx, row * p.cx_stride + unit, p.wide_cell, vectors, count);
    if (p.grad_h) load_elements<N>(grad_h, p.grad_h + row * p.grad_h_stride + unit, vectors, count);
    if (p.grad_c) load_cell(grad_c, p.grad_c, row * p.grad_c_stride + unit, p.wide_cell, vectors, count);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Gates<A> grad = step_backward<Math>(
          Gates<A>{gates[0][i], gates[1][i], gates[2][i], gates[3][i]}, cx[i], grad_h[i], grad_c[i]);
      sums[0][i] += gates[0][i] = grad.i;
      sums[1][i] += gates[1][i] = grad.f;
      sums[2][i] += gates[2][i] = grad.g;
      sums[3][i] += gates[3][i] = grad.o;
    }
    if (p.grad_cx) store_cell(p.grad_cx, row * p.H + unit, grad_c, p.wide_cell, vectors, count);
#pragma unroll
    for (int gate = 0; gate < 4; gate++)
      store_elements(p.grad_gates + row * p.grad_gates_stride + gate * p.H + unit, gates[gate], vectors,
                     count);
  }
  if (!partial && !bias_ih && !bias_hh) return;

  A* const shared = reinterpret_cast<A*>(shared_memory());  // (kGradientRows, 4, kGradientUnits)
#pragma unroll
  for (int gate = 0; gate < 4; gate++)
#pragma unroll
    for (int i = 0; i < N; i++)
      shared[(threadIdx.y * 4 + gate) * kGradientUnits + threadIdx.x * N + i] = sums[gate][i];
  __syncthreads();
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t own_unit = int64_t(blockIdx.x) * kGradientUnits + thread % kGradientUnits;
  if (thread >= 4 * kGradientUnits || own_unit >= p.H) return;
  A total = 0;
#pragma unroll
  for (int r = 0; r < kGradientRows; r++) total += shared[r * 4 * kGradientUnits + thread];
  const int64_t at = thread / kGradientUnits * p.H + own_unit;
  if (partial) partial[blockIdx.y * 4 * p.H + at] = total;
  if (bias_ih) narrow(total, bias_ih[at]);
  if (bias_hh) narrow(total, bias_hh[at]);
}

// The bias gradients from those of the chunks (chunks, 4H).
template <class T>
__global__ void sum_chunks(const Accumulate<T>* partial, int64_t chunks, int64_t size, T* bias_ih,
                           T* bias_hh) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size) return;
  Accumulate<T> total = 0;
  for (int64_t i = 0; i < chunks; i++) total += partial[i * size + at];
  if (bias_ih) narrow(total, bias_ih[at]);
  if (bias_hh) narrow(total, bias_hh[at]);
}

template <class T>
int64_t bias_chunks(const Problem& problem, const Device& device) {
  const int64_t most = ceil_div(problem.B, kGradientRows);
  const int64_t wanted = ceil_div(4 * device.multiprocessors, ceil_div(problem.H, kGradientUnits));
  return most < wanted ? most : wanted;
}

template <class T>
const char* gate_gradients(const Backward<T, T>& p, Accumulate<T>* partial, const Device& device) {
  int64_t chunks = bias_chunks<T>({p.B, p.I, p.H, false}, device);
  const int64_t rows = ceil_div(p.B, chunks);
  chunks = ceil_div(p.B, rows);
  const bool bias = p.grad_bias_ih || p.grad_bias_hh, split = bias && chunks > 1;
  constexpr int N = 16 / sizeof(Accumulate<T>);
  const bool vectors =
      p.H % N == 0 && aligned<N>(p.gates) && aligned<N>(p.grad_gates, p.grad_gates_stride) &&
      aligned<N>(p.grad_h, p.grad_h_stride) && aligned_cell<N>(p.cx, p.cx_stride, p.wide_cell) &&
      aligned_cell<N>(p.grad_c, p.grad_c_stride, p.wide_cell) && aligned_cell<N>(p.grad_cx, 0, p.wide_cell);
  const dim3 grid(unsigned(ceil_div(p.H, kGradientUnits)), unsigned(chunks));
  const dim3 block(kGradientUnits / N, kGradientRows);
  const size_t shared = sizeof(Accumulate<T>) * kGradientRows * 4 * kGradientUnits;
  T* const none = nullptr;
  const char* error = launch(gate_gradients_kernel<T, N>, grid, block, shared, device.stream, p, rows,
                             split ? partial : nullptr, split ? none : p.grad_bias_ih,
                             split ? none : p.grad_bias_hh, vectors);
  if (error || !split) return error;
  constexpr int kThreads = 128;
  return launch(sum_chunks<T>, dim3(unsigned(ceil_div(4 * p.H, kThreads))), dim3(kThreads), 0,
                device.stream, partial, chunks, 4 * p.H, p.grad_bias_ih, p.grad_bias_hh);
}

// ---------------------------------------------------------------------------------------------------
// Products at small batch
//
// Gate gradients G (B, 4H) times weights W (4H, K), and G^T times the left factors X (B, K) of the step.
// One launch for all four, which depend on G alone: blocks of grad_input, grad_hx, grad_weight_ih and
// grad_weight_hh.

constexpr int kProductThreads = 512;
constexpr int kProductLanes = 4;  // threads side by side along K, with a vector each
template <int N>
constexpr int kProductRows = N > 4 ? 4 : 8;  // of the batch, at a time
constexpr int kProductGroups = kProductThreads / kProductLanes;
constexpr int kWeightRows = 8;  // of a warp, in a weight gradient

template <class T>
struct SmallBatchProduct {
  const T* weight;  // (4H, K)
  const T* left;    // (B, K)
  int64_t left_stride, K;
  T* grad_left;    // (B, K) or null
  T* grad_weight;  // (4H, K) or null
  int64_t row_blocks, weight_blocks;
};

// grad_left: kProductRows rows by kProductLanes * N columns. Split K: groups of lanes have different gates;
// their sums are reduced over the groups of a warp, then over the warps, in a fixed order.
template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void row_gradients(const Backward<T, T>& p, const SmallBatchProduct<T>& of,
                                    int64_t block) {
  constexpr int R = kProductRows<N>, kColumns = kProductLanes * N;
  const int64_t column_blocks = (of.K + kColumns - 1) / kColumns;
  const int64_t row = block / column_blocks * R;
  const int lane = threadIdx.x % kProductLanes, group = threadIdx.x / kProductLanes;
  const int64_t column = block % column_blocks * kColumns + lane * N;
  const int last = p.B - row < R ? int(p.B - row) - 1 : R - 1;
  const bool inside = column < of.K;

  A sums[R][N] = {};
  if (inside)
#pragma unroll 2
    for (int64_t g = group; g < 4 * p.H; g += kProductGroups) {
      const Fragment<N, T> w = load_fragment<N, true>(of.weight + g * of.K + column);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const A grad = widen(p.grad_gates[(row + (r < last ? r : last)) * p.grad_gates_stride + g]);
#pragma unroll
        for (int i = 0; i < N; i++) sums[r][i] += grad * w.at[i];
      }
    }
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int mask = kProductLanes; mask < kWarp; mask *= 2) sums[r][i] += shuffle_xor(sums[r][i], mask);

  constexpr int kWarps = kProductThreads / kWarp;
  A* const shared = reinterpret_cast<A*>(shared_memory());  // (warps, R, columns)
  if (threadIdx.x % kWarp < kProductLanes)
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int i = 0; i < N; i++)
        shared[(threadIdx.x / kWarp * R + r) * kColumns + lane * N + i] = sums[r][i];
  __syncthreads();
  const int r = threadIdx.x / kColumns, c = threadIdx.x % kColumns;
  const int64_t k = block % column_blocks * kColumns + c;
  if (r > last || k >= of.K) return;
  A total = 0;
  for (int w = 0; w < kWarps; w++) total += shared[(w * R + r) * kColumns + c];
  narrow(total, of.grad_left[(row + r) * of.K + k]);
}

// grad_weight: kWeightRows rows of each warp by 32 * N columns.
template <int N, class T, class A = Accumulate<T>>
LSTMFUSED_DEVICE void weight_gradients(const Backward<T, T>& p, const SmallBatchProduct<T>& of,
                                       int64_t block) {
  constexpr int kColumns = kWarp * N, kWarps = kProductThreads / kWarp;
  const int64_t column_blocks = (of.K + kColumns - 1) / kColumns;
  const int64_t first = (block / column_blocks * kWarps + threadIdx.x / kWarp) * kWeightRows;
  const int64_t column = block % column_blocks * kColumns + threadIdx.x % kWarp * N;
  if (column >= of.K || first >= 4 * p.H) return;
  A sums[kWeightRows][N] = {};
  for (int64_t b = 0; b < p.B; b++) {
    const Fragment<N, T> x = load_fragment<N, false>(of.left + b * of.left_stride + column);
#pragma unroll
    for (int r = 0; r < kWeightRows; r++) {
      const int64_t g = first + r < 4 * p.H ? first + r : 4 * p.H - 1;
      const A grad = widen(p.grad_gates[b * p.grad_gates_stride + g]);
#pragma unroll
      for (int i = 0; i < N; i++) sums[r][i] += grad * x.at[i];
    }
  }
#pragma unroll
  for (int r = 0; r < kWeightRows; r++) {
    if (first + r >= 4 * p.H) return;
    store_elements(of.grad_weight + (first + r) * of.K + column, sums[r], true, N);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kProductThreads)
    small_batch_products(const Backward<T, T> p, const SmallBatchProduct<T> of_input,
                         const SmallBatchProduct<T> of_state) {
  int64_t block = blockIdx.x;
  if (block < of_input.row_blocks) return row_gradients<N>(p, of_input, block);
  block -= of_input.row_blocks;
  if (block < of_state.row_blocks) return row_gradients<N>(p, of_state, block);
  block -= of_state.row_blocks;
  if (block < of_input.weight_blocks) return weight_gradients<N>(p, of_input, block);
  weight_gradients<N>(p, of_state, block - of_input.weight_blocks);
}

template <class T>
const char* backward_small_batch(const Backward<T, T>& p, const Device& device) {
  const auto run = [&](auto width) -> const char* {
    constexpr int N = decltype(width)::value;
    const auto product = [&](const T* weight, const T* left, int64_t stride, int64_t K, T* grad_left,
                             T* grad_weight) {
      constexpr int kRowsOfBlock = kProductThreads / kWarp * kWeightRows;
      const int64_t row_blocks = ceil_div(K, kProductLanes * N) * ceil_div(p.B, kProductRows<N>);
      const int64_t weight_blocks = ceil_div(K, kWarp * N) * ceil_div(4 * p.H, kRowsOfBlock);
      return SmallBatchProduct<T>{weight,
                                  left,
                                  stride,
                                  K,
                                  grad_left,
                                  grad_weight,
                                  grad_left ? row_blocks : 0,
                                  grad_weight ? weight_blocks : 0};
    };
    const auto of_input =
        product(p.weight_ih, p.input, p.input_stride, p.I, p.grad_input, p.grad_weight_ih);
    const auto of_state = product(p.weight_hh, p.hx, p.hx_stride, p.H, p.grad_hx, p.grad_weight_hh);
    const int64_t blocks =
        of_input.row_blocks + of_state.row_blocks + of_input.weight_blocks + of_state.weight_blocks;
    if (!blocks) return nullptr;
    const size_t shared =
        sizeof(Accumulate<T>) * kProductThreads / kWarp * kProductRows<N> * kProductLanes * N;
    return launch(small_batch_products<T, N>, dim3(unsigned(blocks)), dim3(kProductThreads), shared,
                  device.stream, p, of_input, of_state);
  };
  const bool vectors = in_vectors(p.input, p.input_stride, p.I) && in_vectors(p.hx, p.hx_stride, p.H) &&
                       in_vectors(p.weight_ih, p.I, p.I) && in_vectors(p.weight_hh, p.H, p.H) &&
                       in_vectors(p.grad_weight_ih, p.I, p.I) && in_vectors(p.grad_weight_hh, p.H, p.H);
  return vectors ? run(Number<kVector<T>>{}) : run(Number<1>{});
}

}  // namespace cuda
}  // namespace lstmfused
