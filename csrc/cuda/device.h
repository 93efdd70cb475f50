// What the kernels ask of the processor beyond C++: every intrinsic and every line of PTX, and the launch.
// With LSTMFUSED_SIMT, the name of a header, the same names come from there: tests/simt.h has them for the
// host, so that the kernels' own source runs without a GPU.
#pragma once
#include <stdint.h>

#ifdef LSTMFUSED_SIMT
#include LSTMFUSED_SIMT
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "../lstm.h"

#define LSTMFUSED_DEVICE static __device__ __forceinline__

namespace lstmfused {
namespace cuda {

// ---------------------------------------------------------------------------------------------------
// Numbers

LSTMFUSED_DEVICE float widen(float x) { return x; }
LSTMFUSED_DEVICE double widen(double x) { return x; }
LSTMFUSED_DEVICE float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
LSTMFUSED_DEVICE float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

LSTMFUSED_DEVICE void narrow(float x, float& to) { to = x; }
LSTMFUSED_DEVICE void narrow(double x, double& to) { to = x; }
LSTMFUSED_DEVICE void narrow(float x, bfloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
LSTMFUSED_DEVICE void narrow(float x, float16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

// Within two units in the last place; nothing is lost where x is too large for that.
LSTMFUSED_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
LSTMFUSED_DEVICE double reciprocal(double x) { return 1 / x; }

// ---------------------------------------------------------------------------------------------------
// Memory

// 16 bytes that nobody writes while the kernel runs, read once: they leave the first-level cache to others.
LSTMFUSED_DEVICE uint4 load_once(const void* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// The block's shared memory, as much as the launch asked for.
LSTMFUSED_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char lstmfused_shared[];
  return lstmfused_shared;
}

// Copies 16 bytes to shared memory, or zeros where they are not wanted, some time before a wait for the
// group that the next commit closes.
LSTMFUSED_DEVICE void copy_async(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(wanted ? 16 : 0)
               : "memory");
}
LSTMFUSED_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of the last groups are under way. It tells this thread only: a barrier tells the others.
template <int N>
LSTMFUSED_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---------------------------------------------------------------------------------------------------
// Matrices, of a warp

// Four matrices of 8 rows of 16 bytes: lane 8 i + r gives the address of row r of matrix i, and gets of
// each matrix the 4 bytes at row lane / 4, bytes 4 (lane % 4).
LSTMFUSED_DEVICE void load_matrices(uint32_t (&x)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared)))
               : "memory");
}

// sums (16, 8) += a (16, 32 bytes) @ b (8, 32 bytes)^T. With q = lane / 4 and 4 bytes at t = lane % 4, a
// holds rows q and q + 8 of the first 16 bytes, then of the others; b row q of the first, then of the
// others; sums rows q (twice) and q + 8 (twice), columns 2 t and 2 t + 1.
#define LSTMFUSED_MMA(instruction)                                                            \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
LSTMFUSED_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  LSTMFUSED_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
LSTMFUSED_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  LSTMFUSED_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
LSTMFUSED_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  LSTMFUSED_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef LSTMFUSED_MMA

// Rounds a float to the nearest tf32; the matrix instruction would cut it off.
LSTMFUSED_DEVICE uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

template <class A>
LSTMFUSED_DEVICE A shuffle_xor(A x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// ---------------------------------------------------------------------------------------------------
// Launch

// Both return null, or what went wrong.

// More shared memory than every processor has needs a word beforehand: once for each kernel and device.
template <auto kernel>
static const char* allow_shared_memory(size_t bytes, int device) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device; beyond the last, each time anew
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (allowed & bit) return nullptr;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (status != cudaSuccess) return cudaGetErrorString(status);
  allowed |= bit;
  return nullptr;
}

template <class... Parameters, class... Arguments>
static const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace cuda
}  // namespace lstmfused
#endif
