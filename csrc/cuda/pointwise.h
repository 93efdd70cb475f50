// The end of a step whose products another library made.
#pragma once
#include "kernels.h"
#include "step.h"

namespace lstmfused {
namespace cuda {

constexpr int kPointwiseThreads = 256;

// A thread for each state.
template <class T>
__global__ void finish_states(const Forward<T> p, const T* sums) {
  const int64_t i = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
  if (i >= p.B * p.H) return;
  const int64_t row = i / p.H, unit = i % p.H;
  const T* sum = sums + row * 4 * p.H + unit;
  finish_state(p, row, unit, Gates<T>{sum[0], sum[p.H], sum[2 * p.H], sum[3 * p.H]}, sum_bias(p, unit));
}

template <class T>
const char* finish(const Forward<T>& p, const T* sums, const Device& device) {
  return launch(finish_states<T>, dim3(unsigned(ceil_div(p.B * p.H, kPointwiseThreads))),
                dim3(kPointwiseThreads), 0, device.stream, p, sums);
}

}  // namespace cuda
}  // namespace lstmfused
