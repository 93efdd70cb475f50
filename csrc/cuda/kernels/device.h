// Every intrinsic, every line of PTX, and the launch. LSTMFUSED_SIMT may name a header to take the same
// names from: tests/kernels/simt_device.h has them on the host, so that the kernels' own source runs
// without a GPU.
#pragma once
#include <stdint.h>

#ifdef LSTMFUSED_SIMT
#include LSTMFUSED_SIMT
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "../../lstm.h"

#define LSTMFUSED_DEVICE static __device__ __forceinline__
#define LSTMFUSED_BOTH static __host__ __device__ __forceinline__  // called by the launching code, too

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

// Within two ulp up to 2^126; beyond, 0 instead of a subnormal number.
LSTMFUSED_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
LSTMFUSED_DEVICE double reciprocal(double x) { return 1 / x; }

// ---------------------------------------------------------------------------------------------------
// Memory

// 16 bytes that are read once: not allocated in L1. Nobody may write them while the kernel runs.
LSTMFUSED_DEVICE uint4 load_once(const void* from) {
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from));
  return x;
}

// In one access; the compiler may split a store of CUDA's vector types by fields.
LSTMFUSED_DEVICE void store_global(void* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
LSTMFUSED_DEVICE void store_global(void* to, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}
LSTMFUSED_DEVICE void store_global(void* to, uint32_t x) { *static_cast<uint32_t*>(to) = x; }
LSTMFUSED_DEVICE void store_global(void* to, uint16_t x) { *static_cast<uint16_t*>(to) = x; }

// The block's shared memory, as much as the launch asked for.
LSTMFUSED_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char lstmfused_shared[];  // alignment of the 128-byte swizzle
  return lstmfused_shared;
}

// Asynchronous copy of 16 bytes to shared memory, or of zeros: complete after a wait for the group that the
// next commit closes.
LSTMFUSED_DEVICE void copy_async(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(wanted ? 16 : 0)
               : "memory");
}
LSTMFUSED_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of the last groups are in flight. For this thread only: the others need a barrier.
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

// ---------------------------------------------------------------------------------------------------
// Matrices, of a warpgroup: four warps, on Hopper alone

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Makes this thread's copies to shared memory visible to wgmma (the async proxy); before a barrier.
LSTMFUSED_DEVICE void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma is asynchronous: it reads shared memory and adds to registers until it is waited for.
LSTMFUSED_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LSTMFUSED_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the last groups are in flight.
template <int N>
LSTMFUSED_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Until none is; only then may the sums be read. Each is an operand here so that the compiler does not read
// one earlier: ptxas would then make every product wait for the one before.
template <int kParts, int N>
LSTMFUSED_DEVICE void finish_products(float (&sums)[kParts][N]) {
  wait_products<0>();
#pragma unroll
  for (int part = 0; part < kParts; part++)
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[part][i])::"memory");
}

// Rows of 128 bytes in the 128-byte swizzle, eight of them 1024 bytes from the next eight, K along the
// rows.
LSTMFUSED_DEVICE uint64_t descriptor(const void* shared) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return kSwizzle128 | kEightRows | uint64_t(1) << 16 | (address & 0x3ffff) >> 4;
}

// sums (64, 2 N) += a (64, 32 bytes) @ b (2 N, 32 bytes)^T. With q = 16 (warp % 4) + lane / 4 and t = lane
// % 4, sums[4 j ..] are rows q (twice) and q + 8 (twice), columns 8 j + 2 t and 8 j + 2 t + 1.
#define LSTMFUSED_FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define LSTMFUSED_SIXTEEN(i) \
  LSTMFUSED_FOUR(i), LSTMFUSED_FOUR(i + 4), LSTMFUSED_FOUR(i + 8), LSTMFUSED_FOUR(i + 12)
#define LSTMFUSED_32_NAMES                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LSTMFUSED_64_NAMES                                                                                 \
  LSTMFUSED_32_NAMES                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LSTMFUSED_WGMMA(T, type)                                                                      \
  LSTMFUSED_DEVICE void multiply_group(float (&sums)[32], const void* a, const void* b, T) {          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" LSTMFUSED_32_NAMES  \
                 "}, %32, %33, 1, 1, 1, 0, 0;"                                                        \
                 : LSTMFUSED_SIXTEEN(0), LSTMFUSED_SIXTEEN(16)                                        \
                 : "l"(descriptor(a)), "l"(descriptor(b)));                                           \
  }                                                                                                   \
  LSTMFUSED_DEVICE void multiply_group(float (&sums)[64], const void* a, const void* b, T) {          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" LSTMFUSED_64_NAMES \
                 "}, %64, %65, 1, 1, 1, 0, 0;"                                                        \
                 : LSTMFUSED_SIXTEEN(0), LSTMFUSED_SIXTEEN(16), LSTMFUSED_SIXTEEN(32),                \
                   LSTMFUSED_SIXTEEN(48)                                                              \
                 : "l"(descriptor(a)), "l"(descriptor(b)));                                           \
  }
LSTMFUSED_WGMMA(bfloat16, "bf16")
LSTMFUSED_WGMMA(float16, "f16")
#undef LSTMFUSED_FOUR
#undef LSTMFUSED_SIXTEEN
#undef LSTMFUSED_32_NAMES
#undef LSTMFUSED_64_NAMES
#undef LSTMFUSED_WGMMA
#endif

// ---------------------------------------------------------------------------------------------------

// Rounds a float to the nearest tf32; the matrix instruction would truncate it.
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

// Opts in to more than 48 KiB of dynamic shared memory, once per kernel and device.
template <auto kernel>
static const char* allow_shared_memory(size_t bytes, int device) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device; beyond 64, at every call
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
