// Tasks on torch's threads.
#include <ATen/Parallel.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "kernels/tuning.h"
#include "runtime.h"

namespace lstmfused {
namespace {

// OpenMP's threads do not survive a fork: a child that asked for them would hang.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t usable_threads() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Static shares keep weights warm in each core's L2 from call to call; then work stealing. Results do not
// depend on which thread ran a task.
struct alignas(64) Share {  // a cache line: no false sharing
  std::atomic<int64_t> next;
  int64_t end;
};

void run(int64_t tasks, int64_t work, void (*task)(const void*, int64_t), const void* context) {
  const int64_t threads = std::min({usable_threads(), tasks, work / kWorkPerThread});
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(context, i);
    return;
  }
  constexpr int64_t kMostShares = 64;
  const int64_t n = std::min(threads, kMostShares);
  Share shares[kMostShares];  // on the stack, warm in this core's cache
  for (int64_t s = 0; s < n; s++) {
    shares[s].next.store(tasks * s / n, std::memory_order_relaxed);
    shares[s].end = tasks * (s + 1) / n;
  }
  // Captured by value, side by side: each cache line that a thread fetches from this core costs time.
  at::parallel_for(0, threads, 1, [task, context, n, first = &shares[0]](int64_t thread, int64_t) {
    for (int64_t s = 0; s < n; s++) {
      Share& share = first[(thread + s) % n];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;  // cheaper than a write
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        task(context, i);
    }
  });
}

// Bytes of a core's L2, where the system tells.
int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 1 << 20;
}

}  // namespace

Pool pool() { return {run, usable_threads(), l2_bytes()}; }

}  // namespace lstmfused
