#include "common/partition.hpp"

#include <algorithm>

#include "common/rounding.hpp"

namespace sparsecomp {
namespace {

// Waking a second thread costs a few microseconds; below this many multiply-adds one thread is done before.
constexpr int64_t kWorthAThread = 200'000;
// Fetching a weight takes as long as this many multiply-adds with it.
constexpr int64_t kFetchWork = 4;
// Tasks per thread: enough that a thread which lost its core for a while leaves work to the others.
constexpr int64_t kTasksPerThread = 4;
// Every task of a panel brings all of the panel to the L1 cache.
constexpr int64_t kPanelTasksPerThread = 2;
constexpr int64_t kTileUnit = 2;   // tiles a micro-kernel takes at once
constexpr int64_t kBatchUnit = 8;  // columns a micro-kernel takes at once

}  // namespace

bool worth_threads(int64_t work) { return work >= 2 * kWorthAThread; }

int64_t panel_tile_block(int64_t tiles, int64_t most, int64_t panels, int threads) {
  const int64_t wanted = threads <= 1 ? 1 : divide_up(threads * kPanelTasksPerThread, panels);
  return std::clamp<int64_t>(divide_up(tiles, wanted), 1, std::max<int64_t>(1, most));
}

Task Partition::task(int64_t index, int64_t tiles, int64_t batch) const {
  Task task;
  task.tile = index % row_tasks * tile_block;
  task.tile_end = std::min(tiles, task.tile + tile_block);
  task.column = index / row_tasks * batch_block;
  task.column_end = std::min(batch, task.column + batch_block);
  return task;
}

Partition make_partition(int64_t tiles, int64_t batch, int64_t steps, int slots, int threads, int64_t most_batch) {
  const int64_t batch_tasks = std::max<int64_t>(1, divide_up(batch, most_batch));
  const int64_t batch_block = std::max<int64_t>(1, round_up(divide_up(batch, batch_tasks), kBatchUnit));
  Partition whole{std::max<int64_t>(1, tiles), std::min(batch_block, std::max<int64_t>(1, batch)), 1, batch_tasks};
  const int64_t work = tiles * 16 * steps * slots * (batch + kFetchWork);
  if (threads <= 1 || !worth_threads(work)) return whole;

  int64_t wanted = std::min<int64_t>(threads * kTasksPerThread, divide_up(work, kWorthAThread));
  if (wanted > threads) wanted = wanted / threads * threads;  // of three tasks one of two threads would do two
  // Rows first: every task reads its own weights, and all of x, which is smaller.
  const int64_t row_tasks = std::min(divide_up(wanted, batch_tasks), divide_up(tiles, kTileUnit));
  Partition parts = whole;
  parts.tile_block = round_up(divide_up(tiles, row_tasks), kTileUnit);
  parts.row_tasks = divide_up(tiles, parts.tile_block);
  if (parts.tasks() < std::min<int64_t>(wanted, threads)) {  // few rows: split the batch further
    const int64_t columns = divide_up(wanted, parts.row_tasks);
    parts.batch_block = std::min(whole.batch_block, round_up(divide_up(batch, columns), kBatchUnit));
  }
  parts.batch_tasks = divide_up(batch, parts.batch_block);
  return parts;
}

}  // namespace sparsecomp
