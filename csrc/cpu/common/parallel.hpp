// Runs tasks on several threads. Takes a count and a function of the task number; knows nothing of what tasks do.
//
// Inside a process that has libgomp loaded (torch brings its own) the tasks run on that runtime's worker team: a team
// of our own would compete with workers that spin after every torch operator. Elsewhere threads are started for the
// call.
#pragma once

#include <cstdint>

namespace sparsecomp {

// <= 0 means all cores. Many more threads than cores are cut down: they gain nothing, and starting them can fail.
int resolve_threads(int threads);

void run_tasks(int threads, int64_t tasks, void (*function)(const void* context, int64_t task), const void* context);

template <class Function>
void parallel_for(int threads, int64_t tasks, const Function& function) {
  run_tasks(
      threads, tasks, [](const void* context, int64_t task) { (*static_cast<const Function*>(context))(task); },
      &function);
}

}  // namespace sparsecomp
