// A GPU on the host, as far as csrc/cuda/kernels/device.h asks for one: what that header has of intrinsics
// and of PTX is here in C++, with -DLSTMFUSED_SIMT='"simt.h"', so that the kernels' own source runs without
// CUDA.
//
// A thread is a fiber with a stack of its own. The blocks run one after another; of a block, each fiber
// runs until it waits for others. What is undefined on a GPU is made to show: shared memory begins as NaN,
// copies land as late or as early as they may, the order of the fibers is a setting, and what a GPU forbids
// ends the launch with an error. AddressSanitizer and UndefinedBehaviorSanitizer see the rest.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <vector>

#include "../csrc/lstm.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ADDRESS_SANITIZER
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SIMT_ADDRESS_SANITIZER
#endif
#ifdef SIMT_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_UNSANITIZED __attribute__((no_sanitize_address))
#else
#define SIMT_UNSANITIZED
#endif

// ---------------------------------------------------------------------------------------------------
// CUDA's words

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define threadIdx (simt::current->index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define __syncthreads() simt::barrier(__LINE__)

// ---------------------------------------------------------------------------------------------------
// Fibers

namespace simt {

enum class Order {
  kForward,   // warps in turns, a warp instruction each, and copies land late
  kBackward,  // from the last to the first, blocks and lanes too, and copies land at once
  kRandom,    // in turns of any length, each round in another order, and copies land at any time
  kGreedy     // each warp goes as far as it can before another gets a turn: far ahead, or far behind
};
inline Order order = Order::kForward;
inline uint64_t seed = 1;
inline size_t shared_limit = 227 << 10;  // of a block, in bytes
inline std::map<void (*)(), size_t> shared_allowed;

constexpr unsigned kLanes = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10, kGuard = 4 << 10;
constexpr size_t kApart = 128;  // tops of stacks, lest the lanes of a warp share few sets of the cache

struct Copy {
  void* to;
  uint4 bits;
  int64_t group;
};

// A product of a warpgroup, as far as one thread is concerned, that has not been waited for.
struct Product {
  std::function<void()> execute;
  int64_t group;
};

struct Fiber {
  dim3 index;
  unsigned warp, lane;
  std::vector<Copy> copies;                       // under way
  int64_t group;                                  // the open one
  std::vector<const unsigned char*> unpublished;  // copies that have come, but that wgmma may not see
  std::vector<Product> products;                  // under way
  int64_t product_group;                          // the open one
  unsigned char* stack;
  void* here[5];  // of __builtin_setjmp

  Fiber() {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    stack = static_cast<unsigned char*>(memory) + kGuard;
    if (mprotect(stack, kStack, PROT_READ | PROT_WRITE)) abort();
  }
  ~Fiber() {
#ifdef SIMT_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(stack, kStack);
#endif
    munmap(stack - kGuard, kGuard + kStack);
  }
  Fiber(const Fiber&) = delete;
  void operator=(const Fiber&) = delete;
};

// A bit for each lane: it can run, it waits in a warp instruction, it has left the kernel; or else it waits
// at a barrier.
struct Warp {
  uint32_t ready, arrived, ended;
  void (*instruction)(void* const*);
  void* operands[kLanes];
};

inline std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
inline std::vector<Warp> warps;
inline Fiber* current = nullptr;
inline void* scheduler[5];
inline const std::function<void()>* body = nullptr;
inline dim3 block_index, block_size, grid_size;
inline unsigned threads = 0, at_barrier = 0, ended = 0;
inline int barrier_line = 0;
inline bool backward = false;  // order of lanes
inline uint64_t steps = 0;     // of lanes, before the turn of this warp ends
inline unsigned char* shared = nullptr;
inline size_t shared_size = 0;
inline bool land_at_once = false, land_at_random = false;
inline char error[200] = "";

inline uint64_t random_state = 1;
inline unsigned random(unsigned below) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return unsigned((random_state >> 32) * below >> 32);
}

// swapcontext() would ask the operating system for the signal mask each time.
[[noreturn]] SIMT_UNSANITIZED inline __attribute__((noinline)) void jump(void** to) {
  __builtin_longjmp(to, 1);
}
SIMT_UNSANITIZED inline __attribute__((noinline)) void save_and_jump(void** from, void** to) {
  if (!__builtin_setjmp(from)) jump(to);
}
SIMT_UNSANITIZED inline __attribute__((noinline)) void save_and_enter(void** from, const ucontext_t* to) {
  if (!__builtin_setjmp(from)) setcontext(to);
}

#ifdef SIMT_ADDRESS_SANITIZER  // it wants to know on which stack it is
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size;
inline void leave(void** fake, const Fiber* to) {
  if (to)
    __sanitizer_start_switch_fiber(fake, to->stack, kStack);
  else
    __sanitizer_start_switch_fiber(fake, scheduler_stack, scheduler_stack_size);
}
inline void arrive(void* fake) {
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(fake, &stack, &size);
  if (scheduler_stack) return;
  scheduler_stack = stack;
  scheduler_stack_size = size;
}
#else
inline void leave(void**, const Fiber*) {}
inline void arrive(void*) {}
#endif

// Null is the scheduler.
inline void change(Fiber* from, Fiber* to) {
  void* fake = nullptr;
  leave(&fake, to);
  current = to;
  save_and_jump(from ? from->here : scheduler, to ? to->here : scheduler);
  arrive(fake);
}

// The lane of the warp that is to run after this one. Null where there is none.
inline Fiber* lane_after(unsigned warp, unsigned lane) {
  const uint32_t ready = warps[warp].ready;
  if (!ready) return nullptr;
  unsigned next;
  if (backward) {
    const uint32_t below = ready & ((1u << lane) - 1);
    next = 31 - __builtin_clz(below ? below : ready);
  } else {
    const uint32_t above = ready & (~1u << lane);
    next = __builtin_ctz(above ? above : ready);
  }
  return fibers[warp * kLanes + next].get();
}

// Lets others run, until this thread is ready again.
inline void wait() {
  Fiber* next = nullptr;
  if (steps > 0 && !error[0]) {
    steps--;
    next = lane_after(current->warp, current->lane);
  }
  if (next != current) change(current, next);
}

inline void enter() {
  arrive(nullptr);
  change(current, nullptr);
  for (;;) {
    (*body)();
    const uint32_t bit = 1u << current->lane;
    warps[current->warp].ready &= ~bit;
    warps[current->warp].ended |= bit;
    ended++;
    wait();
  }
}

inline void add_fiber() {
  fibers.push_back(std::make_unique<Fiber>());
  ucontext_t entrance;
  getcontext(&entrance);
  entrance.uc_stack.ss_sp = fibers.back()->stack;
  entrance.uc_stack.ss_size = kStack - fibers.size() % kLanes * kApart;
  makecontext(&entrance, enter, 0);
  void* fake = nullptr;
  current = fibers.back().get();
  leave(&fake, current);
  save_and_enter(scheduler, &entrance);
  arrive(fake);
}

inline void describe(const char* what, const Fiber& thread) {
  snprintf(error, sizeof error, "%s: thread (%u, %u, %u) of block (%u, %u, %u)", what, thread.index.x,
           thread.index.y, thread.index.z, block_index.x, block_index.y, block_index.z);
}

// Ends the launch.
[[noreturn]] inline void fail(const char* what) {
  describe(what, *current);
  wait();
  abort();
}

inline void barrier(int line) {
  if (at_barrier == 0) barrier_line = line;
  if (line != barrier_line) fail("another barrier than other threads");
  if (++at_barrier < threads) {
    warps[current->warp].ready &= ~(1u << current->lane);
    wait();
    return;
  }
  at_barrier = 0;
  for (unsigned i = 0; i < threads; i++) warps[fibers[i]->warp].ready |= 1u << fibers[i]->lane;
}

// An instruction of a whole warp: the last lane that comes executes it, on the operands of all.
template <class Operands, void (*execute)(Operands* const*)>
void together(Operands& operands) {
  const auto instruction = [](void* const* all) {
    Operands* typed[kLanes];
    for (unsigned i = 0; i < kLanes; i++) typed[i] = static_cast<Operands*>(all[i]);
    execute(typed);
  };
  const uint32_t bit = 1u << current->lane;
  Warp& warp = warps[current->warp];
  if (!warp.arrived) warp.instruction = instruction;
  if (warp.instruction != instruction) fail("another warp instruction than other lanes");
  warp.operands[current->lane] = &operands;
  warp.arrived |= bit;
  if (~warp.arrived) {
    warp.ready &= ~bit;
    wait();
    return;
  }
  warp.arrived = 0;
  warp.ready = ~0u;
  warp.instruction(warp.operands);
}

inline bool in_shared(const void* pointer) {
  const auto first = reinterpret_cast<uintptr_t>(shared), address = reinterpret_cast<uintptr_t>(pointer);
  return address >= first && address - first + 16 <= shared_size;
}
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// No thread can run: why?
inline void describe_deadlock() {
  for (unsigned i = 0; i < threads; i++)
    if (warps[i / kLanes].arrived >> i % kLanes & 1)
      return describe("a warp instruction that other lanes do not reach", *fibers[i]);
  for (unsigned i = 0; i < threads; i++)
    if (!(warps[i / kLanes].ended >> i % kLanes & 1))
      return describe("a barrier that other threads do not reach", *fibers[i]);
}

inline void run_block() {
  memset(shared, 0xff, shared_size);
  const unsigned count = (threads + kLanes - 1) / kLanes;
  warps.assign(count, Warp{});
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = *fibers[i];
    fiber.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    fiber.warp = i / kLanes;
    fiber.lane = i % kLanes;
    fiber.copies.clear();
    fiber.unpublished.clear();
    fiber.products.clear();
    fiber.group = fiber.product_group = 0;
    warps[fiber.warp].ready |= 1u << fiber.lane;
  }
  at_barrier = ended = 0;

  std::vector<unsigned> turns(count);
  for (unsigned w = 0; w < count; w++) turns[w] = order == Order::kBackward ? count - 1 - w : w;
  const auto shuffle = [&] {
    for (unsigned w = count; w > 1; w--) std::swap(turns[w - 1], turns[random(w)]);
  };
  backward = order == Order::kBackward;
  if (order == Order::kGreedy) {
    shuffle();
    backward = random(2);
    land_at_once = random(2);
  }
  while (ended < threads) {
    if (order == Order::kRandom) shuffle();
    bool progress = false;
    for (unsigned warp : turns) {
      if (order == Order::kRandom) backward = random(2);
      const unsigned before_first = order == Order::kRandom ? random(kLanes) : backward ? 0 : kLanes - 1;
      Fiber* const first = lane_after(warp, before_first);
      if (!first) continue;
      progress = true;
      steps = order == Order::kGreedy ? ~uint64_t(0) : order == Order::kRandom ? random(200) : kLanes - 1;
      change(nullptr, first);
      if (error[0]) return;
    }
    if (!progress) return describe_deadlock();
  }
}

inline const char* run_grid(dim3 grid, dim3 block, size_t bytes, const std::function<void()>& kernel) {
  constexpr unsigned kMostInX = 0x7fffffff, kMostInY = 65535, kMostInDepth = 64;
  if (!grid.x || !grid.y || !grid.z || grid.x > kMostInX || grid.y > kMostInY || grid.z > kMostInY)
    return "invalid grid";
  if (!block.x || !block.y || !block.z || block.x > kMostThreads || block.y > kMostThreads ||
      block.z > kMostInDepth || block.x * block.y * block.z > kMostThreads)
    return "invalid block";
  if (bytes > shared_limit) return "too much shared memory";

  error[0] = 0;
  body = &kernel;
  grid_size = grid;
  block_size = block;
  threads = block.x * block.y * block.z;
  while (fibers.size() < threads) add_fiber();
  shared_size = bytes;
  shared = static_cast<unsigned char*>(operator new(bytes, std::align_val_t(1024)));
  random_state = seed;
  land_at_random = order == Order::kRandom;
  land_at_once = order == Order::kBackward;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && !error[0]; i++) {
    const uint64_t at = order == Order::kBackward ? blocks - 1 - i : i;
    block_index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    run_block();
  }
  operator delete(shared, std::align_val_t(1024));
  if (!error[0]) return nullptr;
  fibers.clear();  // some are in the middle of the kernel
  return error;
}

}  // namespace simt

// ---------------------------------------------------------------------------------------------------
// csrc/cuda/kernels/device.h, whose comments hold here

#define LSTMFUSED_DEVICE static inline __attribute__((unused))
#define LSTMFUSED_BOTH LSTMFUSED_DEVICE

namespace simt {

LSTMFUSED_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
LSTMFUSED_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace simt

namespace lstmfused {
namespace cuda {

LSTMFUSED_DEVICE float widen(float x) { return x; }
LSTMFUSED_DEVICE double widen(double x) { return x; }
LSTMFUSED_DEVICE float widen(bfloat16 x) { return simt::float_of(uint32_t(x.bits) << 16); }
LSTMFUSED_DEVICE float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x1fu << 23) return simt::float_of(sign | 0xffu << 23 | magnitude);  // infinity, NaN
  return simt::float_of(sign | simt::bits_of(simt::float_of(magnitude) * 0x1p112f));
}

LSTMFUSED_DEVICE void narrow(float x, float& to) { to = x; }
LSTMFUSED_DEVICE void narrow(double x, double& to) { to = x; }
LSTMFUSED_DEVICE void narrow(float x, bfloat16& to) {
  const uint32_t bits = simt::bits_of(x);
  to.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
LSTMFUSED_DEVICE void narrow(float x, float16& to) {
  const uint32_t sign = simt::bits_of(x) >> 16 & 0x8000, magnitude = simt::bits_of(x) & 0x7fffffff;
  uint32_t bits;
  if (magnitude > 0xffu << 23) {
    bits = 0x7fff;
  } else if (magnitude < (127u - 14) << 23) {  // the last bit of the sum is worth 2^-24
    bits = simt::bits_of(simt::float_of(magnitude) + 0.5f) - simt::bits_of(0.5f);
  } else {
    const uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13;
    bits = std::min(rounded - ((127u - 15) << 10), 0x1fu << 10);
  }
  to.bits = uint16_t(sign | bits);
}

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
inline void unpack(uint32_t bits, float* to, float) { to[0] = float_of(bits & ~0x1fffu); }
template <class T>
void unpack(uint32_t bits, float* to, T) {
  to[0] = lstmfused::cuda::widen(T{uint16_t(bits)});
  to[1] = lstmfused::cuda::widen(T{uint16_t(bits >> 16)});
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

// Of m64nNk16, what one thread gets: it reads shared memory for itself, at some time before its wait.
template <class T, int N>
SIMT_UNSANITIZED void multiply_group(float* sums, const unsigned char* a, const unsigned char* b) {
  // In the 128-byte swizzle bits 4 to 6 of an address are crossed with bits 7 to 9.
  const auto at = [](const unsigned char* matrix, int row, int k) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(matrix) + row * 128 + k * sizeof(T);
    return lstmfused::cuda::widen(*reinterpret_cast<const T*>(address ^ (address >> 7 & 7) << 4));
  };
  const int first = current->warp % 4 * 16 + current->lane / 4, column = current->lane % 4 * 2;
  for (int i = 0; i < N / 2; i++) {
    float sum = 0;
    for (int k = 0; k < 16; k++)
      sum += at(a, first + i % 4 / 2 * 8, k) * at(b, i / 4 * 8 + column + i % 2, k);
    sums[i] += sum;
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
