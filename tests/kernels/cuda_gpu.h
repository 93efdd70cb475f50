// The GPU of simt.h itself: what it must refuse, and its numbers.
#pragma once
#include "cuda_forward.h"

static void expect(const char* what, bool holds) {
  if (holds) return;
  failures++;
  printf("simt.h: %s\n", what);
}

template <class T>
static void test_halves() {
  constexpr uint32_t kInfinity = std::is_same<T, float16>::value ? 0x7c00 : 0x7f80;
  const auto narrowed = [](float x) {
    T to;
    narrow(x, to);
    return uint32_t(to.bits);
  };
  bool same = true, rounds = true;
  for (uint32_t bits = 0; bits <= 0xffff; bits++) {
    const float x = widen(T{uint16_t(bits)});
    const uint32_t magnitude = bits & 0x7fff;
    if (magnitude > kInfinity) {
      same &= x != x && (narrowed(x) & 0x7fff) > kInfinity;
      continue;
    }
    same &= narrowed(x) == bits;
    if (magnitude + 1 >= kInfinity) continue;
    const float next = widen(T{uint16_t(bits + 1)}), middle = x / 2 + next / 2;
    rounds &= narrowed(middle) == bits + (bits & 1);
    rounds &= narrowed(nextafterf(middle, x)) == bits && narrowed(nextafterf(middle, next)) == bits + 1;
  }
  expect("a half does not come back", same);
  expect("a half is not the nearest", rounds);
  const float one = widen(T{uint16_t(std::is_same<T, float16>::value ? 0x3c00 : 0x3f80)});
  const float least = widen(T{1});
  expect("a half is another number",
         one == 1 && least == (std::is_same<T, float16>::value ? 0x1p-24f : 0x1p-133f));
}

static __global__ void barrier_of_some() {
  if (threadIdx.x < 32) __syncthreads();
}
static __global__ void barriers_of_two_kinds() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
static __global__ void shuffle_of_some() {
  if (threadIdx.x % 32) shuffle_xor(1.0f, 1);
}
static __global__ void instructions_of_two_kinds() {
  if (threadIdx.x % 32)
    shuffle_xor(1.0f, 1);
  else
    shuffle_xor(1.0, 1);
}
static __global__ void copy_of_odd(const unsigned char* from) {
  copy_async(shared_memory(), from + 4, true);
}
static __global__ void copy_to_odd(const unsigned char* from) {
  copy_async(shared_memory() + 4, from, true);
}
static __global__ void copy_beyond(const unsigned char* from) {
  copy_async(shared_memory() + 64, from, true);
}
static __global__ void load_beyond() {
  uint32_t x[4];
  load_matrices(x, shared_memory() + 64);
}
static __global__ void nothing() {}
static __global__ void another() {}
// One group of copies is awaited, one is not.
static __global__ void copies(const unsigned char* from, unsigned char* before, unsigned char* after) {
  for (int i = 0; i < 2; i++) {
    copy_async(shared_memory() + i * 16, from, i == 0);
    commit_copies();
  }
  memcpy(before, shared_memory(), 32);
  wait_copies<1>();
  memcpy(after, shared_memory(), 32);
}

static void test_gpu() {
  test_halves<bfloat16>();
  test_halves<float16>();
  for (int i = 0; i < 1000; i++) {
    Matrix x(1, 1);
    x[0][0] = float(uniform());
    expect("to_tf32()", float_of(to_tf32(bits_of(float(x[0][0])))) == float(to_nearest_tf32(x)[0][0]));
  }

  alignas(16) unsigned char memory[96] = {1};
  const unsigned char* const from = memory;
  unsigned char *const before = memory + 32, *const after = memory + 64;
  const auto fails = [](const char* error, const char* with) {
    return error && strstr(error, with) == error;
  };
  for (simt::Order order : {simt::Order::kForward, simt::Order::kBackward, simt::Order::kRandom}) {
    simt::order = order;
    const auto on_64 = [&](auto kernel, auto... arguments) {
      return launch(kernel, dim3(2), dim3(64), 64, nullptr, arguments...);
    };
    expect("a barrier of some threads", fails(on_64(barrier_of_some), "a barrier that"));
    expect("two barriers", fails(on_64(barriers_of_two_kinds), "another barrier"));
    expect("a shuffle of some lanes", fails(on_64(shuffle_of_some), "a warp instruction that"));
    expect("two instructions", fails(on_64(instructions_of_two_kinds), "another warp instruction"));
    expect("a copy from an odd address", fails(on_64(copy_of_odd, from), "copy_async() from"));
    expect("a copy to an odd address", fails(on_64(copy_to_odd, from), "copy_async() to an"));
    expect("a copy to beyond", fails(on_64(copy_beyond, from), "copy_async() to beside"));
    expect("a load from beyond", fails(on_64(load_beyond), "load_matrices() from beside"));
    expect("a block without threads", launch(nothing, dim3(1), dim3(0), 0, nullptr));
    expect("a block too large", launch(nothing, dim3(1), dim3(32, 33), 0, nullptr));
    expect("a grid too large", launch(nothing, dim3(1, 65536), dim3(1), 0, nullptr));
    expect("too much shared memory", allow_shared_memory<nothing>(simt::shared_limit + 1, 0));
    expect("more than is allowed", launch(nothing, dim3(1), dim3(1), (48 << 10) + 1, nullptr));
    expect("what is allowed", !allow_shared_memory<another>(64 << 10, 0) &&
                                  !launch(another, dim3(1), dim3(1), 64 << 10, nullptr));
    expect("a kernel that does nothing", !launch(nothing, dim3(2, 3, 4), dim3(8, 8, 16), 0, nullptr));
  }
  simt::order = simt::Order::kForward;
  expect("copies", !launch(copies, dim3(1), dim3(1), 32, nullptr, from, before, after));
  expect("copies land late", before[0] == 0xff && after[0] == 1 && after[1] == 0 && after[16] == 0xff);
  simt::order = simt::Order::kBackward;
  expect("copies", !launch(copies, dim3(1), dim3(1), 32, nullptr, from, before, after));
  expect("copies land at once", before[0] == 1 && after[0] == 1 && after[16] == 0);
}
