// Cuts the output of a product into tasks. Pure arithmetic on sizes: tested for many cores on a machine with few.
#pragma once

#include <cstdint>

namespace sparsecomp {

// Row tiles by batch columns: what one thread computes at a time.
struct Task {
  int64_t tile, tile_end;
  int64_t column, column_end;
};

struct Partition {
  int64_t tile_block;   // row tiles in a task (the last block of each kind may be smaller)
  int64_t batch_block;  // batch columns in a task
  int64_t row_tasks;
  int64_t batch_tasks;

  int64_t tasks() const { return row_tasks * batch_tasks; }
  // Task `index` of a product of so many tiles and columns; rows first.
  Task task(int64_t index, int64_t tiles, int64_t batch) const;
};

// `tiles` row tiles by `batch` columns, `steps` column steps and `slots` kept weights per row and step, for `threads`
// threads. A task never holds more than `most_batch` columns.
Partition make_partition(int64_t tiles, int64_t batch, int64_t steps, int slots, int threads, int64_t most_batch);

// True if this many multiply-adds keep a second thread busy for longer than it takes to wake.
bool worth_threads(int64_t work);

// Row tiles of a task of a product over `panels` panels: at most `most` (at least one), and few enough that there are
// tasks for all threads.
int64_t panel_tile_block(int64_t tiles, int64_t most, int64_t panels, int threads);

}  // namespace sparsecomp
