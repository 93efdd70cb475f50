// A GPU on the host: CUDA's words, its threads and their order. What csrc/cuda/kernels/device.h has of
// intrinsics and of PTX is in simt_device.h.
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
#endif
#define SIMT_UNSANITIZED __attribute__((no_sanitize("address", "undefined")))

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
