#include "common/parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace sparsecomp {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();

struct Gomp {
  GompParallel parallel;
  ThreadNumber thread_number;
};

// A child made by fork() has none of the workers that libgomp still counts on, and would wait for them for ever: it
// starts threads of its own. Registered at load, as torch may have used libgomp before we do.
std::atomic<bool> forked{false};
const int handler_missing = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Looked up anew until found: whoever brings libgomp may be loaded after us.
Gomp find_gomp() {
  if (handler_missing != 0 || forked.load(std::memory_order_relaxed)) return {};
  static std::atomic<GompParallel> parallel{nullptr};
  static std::atomic<ThreadNumber> thread_number{nullptr};
  Gomp found{parallel.load(std::memory_order_acquire), thread_number.load(std::memory_order_relaxed)};
  if (!found.parallel) {
    found.parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.thread_number = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    if (!found.parallel || !found.thread_number) return {};
    thread_number.store(found.thread_number, std::memory_order_relaxed);
    parallel.store(found.parallel, std::memory_order_release);
  }
  return found;
}

// Each thread has a share of the tasks, the same at every call, so that it finds what they read in its own caches; when
// its share is done it claims what is left of the others'.
class Work {
 public:
  // `thread_number`: of the calling thread in its team, for claim_in_team.
  Work(int threads, int64_t tasks, void (*function)(const void*, int64_t), const void* context,
       ThreadNumber thread_number)
      : thread_number(thread_number),
        shares_(static_cast<int>(std::min<int64_t>({threads, tasks, kMostShares}))),
        tasks_(tasks),
        function_(function),
        context_(context) {
    for (int i = 0; i < shares_; ++i) next_[i].task.store(first(i), std::memory_order_relaxed);
  }

  // However many threads there really are, every task is claimed exactly once.
  void claim(int thread) {
    for (int i = 0; i < shares_; ++i) {
      const int share = (thread + i) % shares_;
      std::atomic<int64_t>& next = next_[share].task;
      const int64_t end = first(share + 1);
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < end;) function_(context_, task);
    }
  }

  const ThreadNumber thread_number;

 private:
  static constexpr int64_t kMostShares = 64;
  struct alignas(64) Counter {  // a line of its own
    std::atomic<int64_t> task;
  };

  int64_t first(int share) const { return tasks_ * share / shares_; }

  const int shares_;
  const int64_t tasks_;
  void (*const function_)(const void*, int64_t);
  const void* const context_;
  Counter next_[kMostShares];
};

void claim_in_team(void* data) {
  auto& work = *static_cast<Work*>(data);
  work.claim(work.thread_number());
}

}  // namespace

int resolve_threads(int threads) {
  constexpr int kAlwaysAllowed = 16;
  static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return threads > 0 ? std::min(threads, std::max(kAlwaysAllowed, 2 * cores)) : cores;
}

void run_tasks(int threads, int64_t tasks, void (*function)(const void*, int64_t), const void* context) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) function(context, task);
    return;
  }
  const Gomp gomp = find_gomp();
  Work work(threads, tasks, function, context, gomp.thread_number);
  if (gomp.parallel) {
    // also for fewer tasks: a smaller team makes libgomp end its other workers, and start them anew for torch
    gomp.parallel(claim_in_team, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&work, i] { work.claim(i); });
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    // there are no more threads, or there is no memory for them; those that run, and this one, claim the rest
  }
  work.claim(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace sparsecomp
