#include "parallel.hpp"

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

// A child made by fork() has none of the workers that libgomp still counts on, and would wait for them for ever: it
// starts threads of its own. Registered at load, as torch may have used libgomp before we do.
std::atomic<bool> forked{false};
const int handler_missing = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Looked up anew until found: whoever brings libgomp may be loaded after us.
GompParallel gomp_parallel() {
  if (handler_missing != 0 || forked.load(std::memory_order_relaxed)) return nullptr;
  static std::atomic<GompParallel> found{nullptr};
  GompParallel function = found.load(std::memory_order_relaxed);
  if (!function) {
    function = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(function, std::memory_order_relaxed);
  }
  return function;
}

struct Work {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*function)(const void*, int64_t);
  const void* context;
};

// However many threads the runtime really gives, every task is claimed exactly once.
void claim_tasks(void* data) {
  auto& work = *static_cast<Work*>(data);
  for (int64_t task; (task = work.next.fetch_add(1, std::memory_order_relaxed)) < work.tasks;)
    work.function(work.context, task);
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
  Work work;
  work.tasks = tasks;
  work.function = function;
  work.context = context;
  if (GompParallel parallel = gomp_parallel()) {
    // also for fewer tasks: a smaller team makes libgomp end its other workers, and start them anew for torch
    parallel(claim_tasks, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) helpers.emplace_back(claim_tasks, &work);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    // there are no more threads, or there is no memory for them; those that run, and this one, claim the rest
  }
  claim_tasks(&work);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace sparsecomp
