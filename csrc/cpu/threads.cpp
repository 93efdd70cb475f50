// Tasks on torch's threads.
#include <ATen/Parallel.h>
#include <c10/util/ScopeExit.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "kernels/tuning.h"
#include "runtime.h"

namespace lstmfused {
namespace {

// OpenMP's threads do not survive a fork: a child that asked for them would hang.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t usable_threads() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

// A part of the tasks. Static shares keep weights warm in each core's L2 from call to call; then work
// stealing. Results do not depend on which thread ran a task.
struct alignas(64) Share {  // a cache line: no false sharing
  std::atomic<int64_t> left;
  int64_t end;

  void assign(int64_t begin, int64_t until) {
    end = until;
    left.store(until - begin, std::memory_order_release);
  }
  // Runs tasks until none is left; returns how many. `run` is read only after a task was taken: while one
  // is left, the run that it belongs to cannot end.
  template <class Run>
  int64_t work(const Run& run) {
    int64_t done = 0;
    for (int64_t n = left.load(std::memory_order_relaxed); n > 0;)
      if (left.compare_exchange_weak(n, n - 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        run.task(run.context, end - n);
        done++;
        n = left.load(std::memory_order_relaxed);
      }
    return done;
  }
};

struct Run {
  Task task;
  const void* context;
};

constexpr int64_t kMostShares = 64;

void run(int64_t tasks, int64_t work, Task task, const void* context, void*) {
  const int64_t threads = std::min({usable_threads(), tasks, work / kWorkPerThread});
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(context, i);
    return;
  }
  const int64_t n = std::min(threads, kMostShares);
  Share shares[kMostShares];  // on the stack, warm in this core's cache
  for (int64_t s = 0; s < n; s++) shares[s].assign(tasks * s / n, tasks * (s + 1) / n);
  // Captured by value, side by side: each cache line that a thread fetches from this core costs time.
  at::parallel_for(0, threads, 1,
                   [this_run = Run{task, context}, n, first = &shares[0]](int64_t thread, int64_t) {
                     for (int64_t s = 0; s < n; s++) first[(thread + s) % n].work(this_run);
                   });
}

// Threads that stay together for many runs: to wake them for each would take longer than a small step. One
// leads; the others wait, spinning, for tasks. The leader waits for tasks, not for threads, so that one
// that comes late, or never, holds nobody up.
class Team {
 public:
  explicit Team(int64_t threads) : size_(std::min(threads, kMostShares)) {
    for (Share& share : shares_) share.assign(0, 0);
  }

  void lead(int64_t tasks, int64_t work, Task task, const void* context) {
    const int64_t n = std::min({size_, tasks, work / kWorkPerTeammate});
    if (n <= 1) {
      for (int64_t i = 0; i < tasks; i++) task(context, i);
      return;
    }
    run_ = {task, context};
    done_.store(0, std::memory_order_relaxed);
    for (int64_t s = n; s-- > 0;) shares_[s].assign(tasks * s / n, tasks * (s + 1) / n);
    help(0);
    wait([&] { return done_.load(std::memory_order_acquire) == tasks; });
  }

  void follow(int64_t thread) {
    const std::atomic<int64_t>& left = shares_[thread % size_].left;
    const auto ends = [&] { return over_.load(std::memory_order_acquire); };
    for (;;) {
      wait([&] { return left.load(std::memory_order_relaxed) > 0 || ends(); });
      if (ends()) return;
      help(thread);
    }
  }

  void end() { over_.store(true, std::memory_order_release); }

 private:
  void help(int64_t thread) {
    int64_t done = 0;
    for (int64_t s = 0; s < size_; s++) done += shares_[(thread + s) % size_].work(run_);
    if (done) done_.fetch_add(done, std::memory_order_release);
  }

  template <class Condition>
  static void wait(const Condition& condition) {
    for (int64_t spins = 0; !condition(); spins++) {
      if (spins >= kSpins)
        std::this_thread::yield();
      else
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
  }

  const int64_t size_;
  Share shares_[kMostShares];
  alignas(64) Run run_{};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> over_{false};
};

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

void with_team(int64_t work, const std::function<void(const Pool&)>& body) {
  const int64_t threads = std::min(usable_threads(), work / kWorkPerThread);
  if (threads <= 1) return body({run, 1, l2_bytes()});
  Team team(threads);
  const auto lead = [](int64_t tasks, int64_t of_tasks, Task task, const void* context, void* of) {
    static_cast<Team*>(of)->lead(tasks, of_tasks, task, context);
  };
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    if (thread) return team.follow(thread);
    const auto end = c10::make_scope_exit([&] { team.end(); });
    body({lead, threads, l2_bytes(), &team});
  });
}

}  // namespace lstmfused
