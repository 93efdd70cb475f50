// What a kernel variant offers: one table of functions per instruction set, no torch.
#pragma once
#include "../../lstm.h"
#include "tuning.h"

namespace lstmfused {

// Runs task(context, i) for every i in [0, tasks), on any thread and in any order. `work` is the cost of
// them all in multiply-adds: a pool may run little work on the calling thread alone. `cache` is the size of
// a core's L2 in bytes; it decides how work is cut, never a result.
using Task = void (*)(const void* context, int64_t i);
struct Pool {
  void (*run_on)(int64_t tasks, int64_t work, Task task, const void* context, void* team);
  int64_t threads;
  int64_t cache;
  void* team = nullptr;  // whoever run_on knows

  void run(int64_t tasks, int64_t work, Task task, const void* context) const {
    run_on(tasks, work, task, context, team);
  }
};

template <class T>
struct CellKernels {
  using dtype = T;
  void (*forward)(const Forward<T>&, const Pool&);
  void (*backward)(const Backward<T>&, const Pool&);
};

// Rows of the batch that backward works on at a time: so few that their gate gradients stay in cache, and
// so many that adding to the weight gradients, (4H, I + H), costs little beside them. Where gradients are
// too narrow to hold sums, the whole batch.
template <class T>
static int64_t backward_rows(int64_t B, int64_t I, int64_t H) {
  if (sizeof(T) != sizeof(Accumulate<T>)) return B;
  const int64_t enough = kPartStates / H > 2 * (I + H) ? kPartStates / H : 2 * (I + H);
  const int64_t most = kPartBytes / (4 * H * int64_t(sizeof(T)));
  const int64_t rows = (enough < most ? enough : most) / kPartMultiple * kPartMultiple;
  return B < kPartMultiple || B <= rows ? B : rows < kPartMultiple ? kPartMultiple : rows;
}

// Elements between rows of the gate gradients: whole cache lines, but no multiple of eight of them, or the
// elements of a column would compete for few sets of the caches.
template <class T>
static int64_t backward_stride(int64_t H) {
  constexpr int64_t kLine = 64 / sizeof(Accumulate<T>);
  const int64_t lines = (4 * H + kLine - 1) / kLine;
  return (lines % 8 ? lines : lines + 1) * kLine;
}

template <class T>
using TangentsKernel = void (*)(const Tangents<T>&, const Pool&);

template <class W>
using PackedKernel = void (*)(const Packed<W>&, const Pool&);

struct Kernels {
  const char* name;
  CellKernels<float> f32;
  CellKernels<double> f64;
  CellKernels<bfloat16> bf16;
  CellKernels<float16> f16;
  TangentsKernel<float> tangents_f32;
  TangentsKernel<double> tangents_f64;
  PackedKernel<float> packed_f32;
  PackedKernel<bfloat16> packed_bf16;
  PackedKernel<int8_t> packed_i8;
  void (*pack)(const Pack&, const Pool&);
};

// The same source, kernels.cpp, compiled for several instruction sets.
extern const Kernels kernels_default;
#ifdef __x86_64__
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const CellKernels<bfloat16> kernels_avx512_bf16;  // all else is as for kernels_avx512
#endif

}  // namespace lstmfused
