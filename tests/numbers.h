// What the tests of the kernels draw, and the rounding that they allow: kernels.cpp, cuda_kernels.cpp.
#pragma once
#include <cstdint>

#include "../csrc/lstm.h"

using lstmfused::bfloat16;
using lstmfused::float16;

template <class T>
constexpr double kRounding = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;  // of sums
template <>
constexpr double kRounding<bfloat16> = 0x1p-8;
template <>
constexpr double kRounding<float16> = 0x1p-11;

static uint64_t state = 1;
static double uniform() {  // in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state >> 11)) * 0x1p-52 - 1;
}
