// What a kernel variant offers: one table of functions per instruction set, no torch.
#pragma once
#include "../lstm.h"

namespace lstmfused {

// Runs task(context, i) for every i in [0, tasks), on any thread and in any order. `work` is the cost of
// them all in multiply-adds: a pool may run little work on the calling thread alone. `cache` is the size of
// a core's second-level cache in bytes; it decides how work is cut, never a result.
struct Pool {
  void (*run)(int64_t tasks, int64_t work, void (*task)(const void* context, int64_t i),
              const void* context);
  int64_t threads;
  int64_t cache;
};

template <class T>
struct CellKernels {
  using dtype = T;
  void (*forward)(const Forward<T>&, const Pool&);
  void (*backward)(const Backward<T>&, const Pool&);
};

template <class T>
using TangentsKernel = void (*)(const Tangents<T>&, const Pool&);

template <class W>
using FrozenKernel = void (*)(const Frozen<W>&, const Pool&);

struct Kernels {
  const char* name;
  CellKernels<float> f32;
  CellKernels<double> f64;
  CellKernels<bfloat16> bf16;
  CellKernels<float16> f16;
  TangentsKernel<float> tangents_f32;
  TangentsKernel<double> tangents_f64;
  FrozenKernel<float> frozen_f32;
  FrozenKernel<bfloat16> frozen_bf16;
  FrozenKernel<int8_t> frozen_i8;
};

// The same source, kernels.cpp, compiled for several instruction sets.
extern const Kernels kernels_default;
#ifdef __x86_64__
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace lstmfused
