// csrc/cuda/kernels/device.h in C++, on the GPU of simt.h: with -DLSTMFUSED_SIMT='"simt_device.h"' the
// kernels' own source runs without CUDA. The comments of that header hold here.
#pragma once
#include "halves.h"
#include "simt.h"

#define LSTMFUSED_DEVICE static inline __attribute__((unused))
#define LSTMFUSED_BOTH LSTMFUSED_DEVICE

namespace lstmfused {
namespace cuda {

using lstmfused::narrow;
using lstmfused::widen;

LSTMFUSED_DEVICE float reciprocal(float x) { return 1 / x; }
LSTMFUSED_DEVICE double reciprocal(double x) { return 1 / x; }

LSTMFUSED_DEVICE uint4 load_once(const void* from) {
  if (!simt::aligned(from)) simt::fail("load_once() from an address that is not a multiple of 16");
  uint4 x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <class Bits>
LSTMFUSED_DEVICE void store_global(void* to, Bits x) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof x)
    simt::fail("store_global() to an address that is not aligned");
  memcpy(to, &x, sizeof x);
}

LSTMFUSED_DEVICE unsigned char* shared_memory() { return simt::shared; }

LSTMFUSED_DEVICE void copy_async(void* shared, const void* global, bool wanted) {
  if (!simt::aligned(shared)) simt::fail("copy_async() to an address that is not a multiple of 16");
  if (!simt::in_shared(shared)) simt::fail("copy_async() to beside the shared memory");
  if (wanted && !simt::aligned(global))
    simt::fail("copy_async() from an address that is not a multiple of 16");
  uint4 bits{};
  if (wanted) memcpy(&bits, global, sizeof bits);
  if (simt::land_at_random ? simt::random(2) : simt::land_at_once) {
    memcpy(shared, &bits, sizeof bits);
    simt::current->unpublished.push_back(static_cast<const unsigned char*>(shared));
  } else {
    simt::current->copies.push_back({shared, bits, simt::current->group});
  }
}
LSTMFUSED_DEVICE void commit_copies() { simt::current->group++; }
template <int N>
LSTMFUSED_DEVICE void wait_copies() {
  auto& copies = simt::current->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group < simt::current->group - N; ++copy) {
    memcpy(copy->to, &copy->bits, sizeof copy->bits);
    simt::current->unpublished.push_back(static_cast<const unsigned char*>(copy->to));
  }
  copies.erase(copies.begin(), copy);
}

}  // namespace cuda
}  // namespace lstmfused

namespace simt {

struct LoadMatrices {
  uint32_t* x;
  const void* row;
};
inline void load_matrices(LoadMatrices* const* lanes) {
  for (unsigned lane = 0; lane < kLanes; lane++)
    for (unsigned i = 0; i < 4; i++)
      memcpy(&lanes[lane]->x[i], static_cast<const char*>(lanes[8 * i + lane / 4]->row) + lane % 4 * 4, 4);
}

// What a register of a factor holds: two numbers, or a float without the bits that a tf32 does not have.
inline void unpack(uint32_t bits, float* to, float) { to[0] = lstmfused::float_of(bits & ~0x1fffu); }
template <class T>
void unpack(uint32_t bits, float* to, T) {
  to[0] = lstmfused::widen(T{uint16_t(bits)});
  to[1] = lstmfused::widen(T{uint16_t(bits >> 16)});
}

struct Multiply {
  float* sums;
  const uint32_t *a, *b;
};
template <class T>
SIMT_UNSANITIZED void multiply(Multiply* const* lanes) {
  constexpr int K = 32 / sizeof(T), kOfRegister = 4 / sizeof(T);
  float a[16][K], b[8][K];
  for (int q = 0; q < 8; q++)
    for (int t = 0; t < 4; t++) {
      const Multiply& lane = *lanes[q * 4 + t];
      for (int half = 0; half < 2; half++) {
        const int k = (half * 4 + t) * kOfRegister;
        unpack(lane.a[half * 2], &a[q][k], T());
        unpack(lane.a[half * 2 + 1], &a[q + 8][k], T());
        unpack(lane.b[half], &b[q][k], T());
      }
    }
  for (int q = 0; q < 8; q++)
    for (int t = 0; t < 4; t++)
      for (int i = 0; i < 4; i++) {
        const float *row = a[q + i / 2 * 8], *column = b[t * 2 + i % 2];
        float sum = 0;
        for (int k = 0; k < K; k++) sum += row[k] * column[k];
        lanes[q * 4 + t]->sums[i] += sum;
      }
}

// 16 numbers of a row. In the 128-byte swizzle bits 4 to 6 of an address are crossed with bits 7 to 9.
template <class T>
SIMT_UNSANITIZED void load_row(float (&to)[16], const unsigned char* matrix, int row) {
  for (int k = 0; k < 16; k++) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(matrix) + row * 128 + k * sizeof(T);
    to[k] = lstmfused::widen(*reinterpret_cast<const T*>(address ^ (address >> 7 & 7) << 4));
  }
}

// Of m64nNk16, what one thread gets: it reads shared memory for itself, at some time before its wait.
template <class T, int N>
SIMT_UNSANITIZED void multiply_group(float* sums, const unsigned char* a, const unsigned char* b) {
  float rows[2][16], column[16];
  for (int r = 0; r < 2; r++) load_row<T>(rows[r], a, current->warp % 4 * 16 + current->lane / 4 + r * 8);
  for (int i = 0; i < N / 2; i += 4)
    for (int c = 0; c < 2; c++) {
      load_row<T>(column, b, i * 2 + current->lane % 4 * 2 + c);
      for (int r = 0; r < 2; r++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += rows[r][k] * column[k];
        sums[i + r * 2 + c] += sum;
      }
    }
}

template <class A>
struct Shuffle {
  A x, result;
  int mask;
};
template <class A>
void shuffle_xor(Shuffle<A>* const* lanes) {
  for (unsigned lane = 0; lane < kLanes; lane++)
    lanes[lane]->result = lanes[lane ^ unsigned(lanes[lane]->mask)]->x;
}

}  // namespace simt

namespace lstmfused {
namespace cuda {

LSTMFUSED_DEVICE void load_matrices(uint32_t (&x)[4], const void* shared) {
  if (!simt::aligned(shared)) simt::fail("load_matrices() from an address that is not a multiple of 16");
  if (!simt::in_shared(shared)) simt::fail("load_matrices() from beside the shared memory");
  simt::LoadMatrices operands{x, shared};
  simt::together<simt::LoadMatrices, simt::load_matrices>(operands);
}

template <class T>
LSTMFUSED_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  simt::Multiply operands{sums, a, b};
  simt::together<simt::Multiply, simt::multiply<T>>(operands);
}

LSTMFUSED_DEVICE void publish_copies() { simt::current->unpublished.clear(); }
LSTMFUSED_DEVICE void begin_products() {}
LSTMFUSED_DEVICE void commit_products() { simt::current->product_group++; }
template <int N>
LSTMFUSED_DEVICE void wait_products() {
  auto& products = simt::current->products;
  auto product = products.begin();
  for (; product != products.end() && product->group < simt::current->product_group - N; ++product)
    product->execute();
  products.erase(products.begin(), product);
}
template <int kParts, int N>
LSTMFUSED_DEVICE void finish_products(float (&)[kParts][N]) {
  wait_products<0>();
}

template <class T, size_t N>
LSTMFUSED_DEVICE void multiply_group(float (&sums)[N], const void* a, const void* b, T) {
  if (!simt::in_shared(a) || !simt::in_shared(b)) simt::fail("multiply_group() beside the shared memory");
  const auto left = static_cast<const unsigned char*>(a), right = static_cast<const unsigned char*>(b);
  const auto reads = [&](const unsigned char* copy) {
    return (copy >= left && copy < left + 64 * 128) || (copy >= right && copy < right + N * 2 * 128);
  };
  for (unsigned i = 0; i < simt::threads; i++)
    for (const unsigned char* copy : simt::fibers[i]->unpublished)
      if (reads(copy)) simt::fail("multiply_group() of what was copied, but not published");
  float* const to = sums;
  const auto execute = [=] { simt::multiply_group<T, 2 * int(N)>(to, left, right); };
  // At once, where nothing is under way that comes before it: the order of sums is that of the
  // instructions.
  const bool at_once = simt::land_at_random ? simt::random(2) : simt::land_at_once;
  if (at_once && simt::current->products.empty())
    execute();
  else
    simt::current->products.push_back({execute, simt::current->product_group});
}

LSTMFUSED_DEVICE uint32_t to_tf32(uint32_t bits) {
  const bool number = (bits & 0x7f800000) != 0x7f800000;
  return (number ? bits + 0x1000 : bits) & ~0x1fffu;
}

template <class A>
LSTMFUSED_DEVICE A shuffle_xor(A x, int mask) {
  if (mask < 0 || mask >= int(simt::kLanes)) simt::fail("shuffle_xor() with a lane beyond the warp");
  simt::Shuffle<A> operands{x, x, mask};
  simt::together<simt::Shuffle<A>, simt::shuffle_xor<A>>(operands);
  return operands.result;
}

template <auto kernel>
static const char* allow_shared_memory(size_t bytes, int) {
  if (bytes > simt::shared_limit) return "too much shared memory";
  simt::shared_allowed[reinterpret_cast<void (*)()>(kernel)] = bytes;
  return nullptr;
}

template <class... Parameters, class... Arguments>
static const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void*,
                          const Arguments&... arguments) {
  constexpr size_t kAlways = 48 << 10;
  if (shared > std::max(kAlways, simt::shared_allowed[reinterpret_cast<void (*)()>(kernel)]))
    return "more shared memory than is allowed to the kernel";
  return simt::run_grid(grid, block, shared, [&] { kernel(arguments...); });
}

}  // namespace cuda
}  // namespace lstmfused
