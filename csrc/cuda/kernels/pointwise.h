// The pointwise part of a step, after products by cuBLAS.
#pragma once
#include "kernels.h"
#include "step.h"

namespace lstmfused {
namespace cuda {

constexpr int kPointwiseThreads = 128;

// N units of a row for each thread. Block (units, rows), grid (blocks of rows, blocks of units).
template <class T, int N>
__global__ void finish_rows(const Forward<T> p, const Accumulate<T>* sums, bool vectors) {
  using A = Accumulate<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t unit = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (row >= p.B || unit >= p.H) return;
  A sum[4][N], bias[4][N], cx[N];
  load_cx(cx, p, row, unit, vectors);
  load_bias(bias, p, unit, vectors);
#pragma unroll
  for (int gate = 0; gate < 4; gate++)
    load_elements<N>(sum[gate], sums + (row * 4 + gate) * p.H + unit, vectors, p.H - unit);
  finish_states(p, row, unit, sum, bias, cx, vectors);
}

template <class T>
const char* finish(const Forward<T>& p, const Accumulate<T>* sums, const Device& device) {
  constexpr int N = 16 / sizeof(Accumulate<T>);
  const bool vectors = states_in_vectors<N>(p) && in_vectors(sums, 0, 4 * p.H);
  const int64_t threads = ceil_div(p.H, N);  // of a row
  const unsigned of_row = unsigned(threads < kPointwiseThreads ? threads : kPointwiseThreads);
  const unsigned rows = kPointwiseThreads / of_row;
  const dim3 grid(unsigned(ceil_div(p.B, rows)), unsigned(ceil_div(threads, of_row)));
  return launch(finish_rows<T, N>, grid, dim3(of_row, rows), 0, device.stream, p, sums, vectors);
}

}  // namespace cuda
}  // namespace lstmfused
