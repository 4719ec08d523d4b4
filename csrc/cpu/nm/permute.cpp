#include "nm/permute.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.hpp"
#include "common/partition.hpp"
#include "common/prefetch_rows.hpp"
#include "common/processor.hpp"
#include "common/rounding.hpp"
#include "common/workspace.hpp"

namespace sparsecomp {
namespace {

// Batch columns of a task, at most: their activations stay in the L2 cache, unless rows are long.
constexpr int64_t kTaskColumns = 128;
// Two tiles of this many column steps stay in the L2 cache (0.3 MB of fp32 2:4) while the batch passes over them. A cut
// writes and reads the sums once more, so weights that are not much longer are not cut, nor is a batch that passes
// once.
constexpr int64_t kChunkSteps = 256;
constexpr int64_t kUncutSteps = 384;
constexpr int64_t kUncutColumns = 16;
// Intel: where the activations of a task are more, they do not stay near beside the weights, and every two tiles read
// them from afar: weights are cut so that those of a piece do.
constexpr int64_t kNearBytes = 384 << 10;
// Weights this large come from memory at every call, also where a last-level cache has 32 MB. One column over them
// waits for memory and nothing else: where a step is so many bytes (fp32 8:16), two streams are faster than one.
constexpr int64_t kMemoryBytes = 24 << 20;
constexpr int64_t kLongStepBytes = 576;
// Widened values of a slice of a tile: they stay in the L1 cache while the batch passes over them.
constexpr int64_t kSliceBytes = 12 << 10;
constexpr int64_t kWidenAhead = 2048;  // bytes of narrow values that are asked for before they are widened

struct Blocking {
  bool direct;  // micro-kernels read x where it is
  int64_t chunk_steps;
  int tiles;  // of a micro-kernel call
};

// `columns`: of the batch, in a task.
Blocking make_blocking(const PermuteSet& kernels, const Geometry& g, const LinearCall& call, int64_t columns,
                       const Processor& processor) {
  Blocking blocking;
  blocking.tiles = kMostTiles;
  while (blocking.tiles > 1 && (!kernels.micro[blocking.tiles][1] || blocking.tiles > g.tiles)) --blocking.tiles;
  const int64_t step_bytes = g.value_bytes + g.metadata_bytes;
  const bool two_streams = step_bytes >= kLongStepBytes && g.tiles * g.steps * step_bytes >= kMemoryBytes;
  if (call.batch == 1 && !two_streams) blocking.tiles = std::min(blocking.tiles, kernels.column_tiles);
  int64_t chunks = 1;
  if (call.batch > kUncutColumns && g.steps > kUncutSteps) chunks = divide_up(g.steps, kChunkSteps);
  if (processor.intel && columns > kUncutColumns) {
    const int64_t x_bytes = columns * g.steps * kStep * element_bytes(kernels.x_dtype);
    chunks = std::max(chunks, divide_up(x_bytes, kNearBytes));
  }
  blocking.chunk_steps = chunks == 1 ? g.steps : round_up(divide_up(g.steps, chunks), kMostSpan);
  // a read of two steps that straddles lines takes twice as long
  const int64_t size = element_bytes(call.dtype);
  const bool lines = reinterpret_cast<uintptr_t>(call.x) % 64 == 0 && call.ldx * size % 64 == 0;
  blocking.direct = kernels.x_dtype == call.dtype && g.in % (kernels.span * kStep) == 0 && (kernels.span == 1 || lines);
  return blocking;
}

// Columns [first, first + count) of x, from `step` on, as a dense zero-padded panel of `width` columns and the kernels'
// type.
void fill_panel(const Isa& isa, const PermuteSet& kernels, const Geometry& g, const LinearCall& call, int64_t first,
                int64_t count, int64_t step, int64_t width, void* panel) {
  const int64_t used = std::min(width, g.in - step * kStep);
  const int64_t size = element_bytes(call.dtype);
  for (int64_t i = 0; i < count; ++i) {
    const auto* from = static_cast<const uint8_t*>(call.x) + ((first + i) * call.ldx + step * kStep) * size;
    if (kernels.x_dtype == call.dtype) {
      uint8_t* to = static_cast<uint8_t*>(panel) + i * width * size;
      std::memcpy(to, from, static_cast<size_t>(used * size));
      std::memset(to + used * size, 0, static_cast<size_t>((width - used) * size));
    } else {
      float* to = static_cast<float*>(panel) + i * width;
      isa.widen(from, call.dtype, to, used);
      std::fill(to + used, to + width, 0.0f);
    }
  }
}

// The columns that a micro-kernel takes at most.
int most_columns(const PermuteMicro* micro) {
  int columns = kMostColumns;
  while (!micro[columns]) --columns;
  return columns;
}

// The micro-kernel that cuts the columns left into even parts: 9 columns are 5 and 4, not 8 and 1. Divides 32 bits, and
// only where it must: this comes before every micro-kernel, and dividing 64 takes Intel's processors 40 cycles and
// more.
int next_columns(const PermuteMicro* micro, int64_t left) {
  auto columns = static_cast<unsigned>(left);
  const auto most = static_cast<unsigned>(most_columns(micro));
  if (columns > most) {
    const unsigned parts = (columns + most - 1) / most;
    columns = (columns + parts - 1) / parts;
  }
  while (!micro[columns]) --columns;
  return static_cast<int>(columns);
}

class TaskRunner {
 public:
  // `columns`: of the batch, in a task.
  TaskRunner(const Isa& isa, const PermuteSet& kernels, const Geometry& g, const LinearCall& call, int64_t columns,
             const Processor& processor)
      : isa_(isa),
        kernels_(kernels),
        g_(g),
        call_(call),
        blocking_(make_blocking(kernels, g, call, columns, processor)) {
    plain_ = call.dtype == kernels.y_dtype && call.epilogue.activation == SPARSECOMP_NO_ACTIVATION && !call.scales;
    float_bytes_ = int64_t{g.slots} * kTile * 4;
    slice_steps_ = std::max<int64_t>(1, kSliceBytes / float_bytes_);
  }

  // False if there is no memory for the workspace.
  bool run(const Task& task) const {
    static thread_local Workspace panel_space, sums_space, floats_space;
    const int64_t columns = task.column_end - task.column;
    float* floats = nullptr;  // a slice of widened values
    if (kernels_.of_floats && columns > most_columns(kernels_.micro[1])) {
      floats = static_cast<float*>(floats_space.reserve(slice_steps_ * float_bytes_));
      if (!floats) return false;
    }
    const int64_t x_size = kernels_.x_dtype == SPARSECOMP_F32 ? 4 : 2;
    const int64_t unit = kernels_.span * kStep;
    void* panel = nullptr;
    if (!blocking_.direct) {
      const int64_t width = round_up(blocking_.chunk_steps * kStep, unit);
      panel = panel_space.reserve(std::max<int64_t>(64, columns * width * x_size));
      if (!panel) return false;
    }
    float* sums = nullptr;  // of all batch columns of the task, where the columns of the weight are cut
    if (blocking_.chunk_steps < g_.steps) {
      sums = static_cast<float*>(sums_space.reserve((task.tile_end - task.tile) * kTile * columns * 4));
      if (!sums) return false;
    }
    int64_t step = 0;
    do {  // once even if there are no columns: y is the bias then
      const int64_t step_end = std::min(g_.steps, step + blocking_.chunk_steps);
      const uint8_t* x = static_cast<const uint8_t*>(call_.x) + (task.column * call_.ldx + step * kStep) * x_size;
      int64_t ldx = call_.ldx;
      if (panel) {
        ldx = round_up((step_end - step) * kStep, unit);
        fill_panel(isa_, kernels_, g_, call_, task.column, columns, step, ldx, panel);
        x = static_cast<const uint8_t*>(panel);
      }
      if (floats)
        run_floats(task, step, step_end, x, ldx, floats, sums);
      else
        run_chunk(task, step, step_end, x, ldx, sums);
      step = step_end;
    } while (step < g_.steps);
    return true;
  }

 private:
  // Steps [chunk, chunk_end) of all tiles: a tile's weights stay in the cache while the batch passes over them.
  void run_chunk(const Task& task, int64_t chunk, int64_t chunk_end, const uint8_t* x, int64_t ldx, float* sums) const {
    PermuteArgs args;
    args.geometry = &g_;
    args.value_stride = g_.steps * g_.value_bytes;
    args.metadata_stride = g_.steps * g_.metadata_bytes;
    args.ldx = ldx;
    args.steps = chunk_end - chunk;
    args.add = chunk > 0;
    for (int64_t tile = task.tile; tile < task.tile_end;) {
      int tiles = std::max(1, static_cast<int>(std::min<int64_t>(blocking_.tiles, task.tile_end - tile)));
      while (tiles > 1 && !kernels_.micro[tiles][1]) --tiles;
      args.values = call_.values + tile * args.value_stride + chunk * g_.value_bytes;
      args.metadata = call_.metadata + tile * args.metadata_stride + chunk * g_.metadata_bytes;
      const bool last = tile + tiles == task.tile_end;
      const int64_t next_tile = last ? task.tile : tile + tiles;
      const int64_t next_step = last ? std::max<int64_t>(0, std::min(chunk_end, g_.steps - 1)) : chunk;
      args.next_values = call_.values + next_tile * args.value_stride + next_step * g_.value_bytes;
      args.next_metadata = call_.metadata + next_tile * args.metadata_stride + next_step * g_.metadata_bytes;
      run_columns(task, tile, tiles, chunk_end == g_.steps, kernels_.micro[tiles], x,
                  sums ? sums + (tile - task.tile) * kTile * (task.column_end - task.column) : nullptr, &args);
      tile += tiles;
    }
  }

  // The same with narrow values, widened to `floats` a slice at a time.
  void run_floats(const Task& task, int64_t chunk, int64_t chunk_end, const uint8_t* x, int64_t ldx, float* floats,
                  float* sums) const {
    alignas(64) float local[kTaskColumns * kTile];
    Geometry widened = g_;
    widened.value_bytes = float_bytes_;
    PermuteArgs args{};
    args.geometry = &widened;
    args.ldx = ldx;
    args.values = reinterpret_cast<const uint8_t*>(floats);
    for (int64_t tile = task.tile; tile < task.tile_end; ++tile) {
      float* tile_sums = sums ? sums + (tile - task.tile) * kTile * (task.column_end - task.column) : local;
      int64_t step = chunk;
      do {
        args.steps = std::min(slice_steps_, chunk_end - step);
        args.add = step > 0;
        args.metadata = call_.metadata + (tile * g_.steps + step) * g_.metadata_bytes;
        const uint8_t* values = call_.values + (tile * g_.steps + step) * g_.value_bytes;
        for (int64_t i = 0; i < args.steps; ++i) {
          const uint8_t* from = values + i * g_.value_bytes;
          for (int64_t byte = 0; byte < g_.value_bytes; byte += 64) __builtin_prefetch(from + kWidenAhead + byte);
          kernels_.widen(from, g_.dtype, g_.slots, floats + i * g_.slots * kTile);
        }
        run_columns(task, tile, 1, step + args.steps == g_.steps, kernels_.of_floats->micro[1],
                    x + (step - chunk) * kStep * 4, tile_sums, &args);
        step += args.steps;
      } while (step < chunk_end);
    }
  }

  // All batch columns over the same weights. `done`: the sums are complete then.
  void run_columns(const Task& task, int64_t tile, int tiles, bool done, const PermuteMicro* micro, const uint8_t* x,
                   float* sums, PermuteArgs* args) const {
    const int64_t x_size = kernels_.x_dtype == SPARSECOMP_F32 ? 4 : 2;
    alignas(64) float local[kMostColumns * kMostTiles * kTile];
    const bool streams = args->next_values != nullptr;
    for (int64_t column = task.column; column < task.column_end;) {
      const int columns = next_columns(micro, task.column_end - column);
      args->x = x + (column - task.column) * args->ldx * x_size;
      args->sums = sums ? sums : local;
      args->stream = streams && column == task.column;
      args->y = nullptr;
      if (done) {
        const int64_t row = tile * kTile, size = element_bytes(call_.dtype);
        uint8_t* y = static_cast<uint8_t*>(call_.y) + (column * call_.ldy + row) * size;
        prefetch_rows(y, call_.ldy * size, columns, std::min<int64_t>(tiles * kTile, g_.out - row) * size);
        if (plain_ && row + tiles * kTile <= g_.out) {
          args->y = y;
          args->ldy = call_.ldy;
          args->bias = epilogue_at(call_.epilogue, row, call_.dtype).bias;
        }
      }
      micro[columns](*args);
      if (done && !args->y) finish(args->sums, tile, tiles, column, columns);
      if (sums) sums += columns * tiles * kTile;
      column += columns;
    }
  }

  void finish(const float* sums, int64_t tile, int tiles, int64_t column, int columns) const {
    const int64_t row = tile * kTile;
    const int64_t size = element_bytes(call_.dtype);
    FinishArgs args;
    args.sums = sums;
    args.ld = tiles * kTile;
    args.rows = static_cast<int>(std::min<int64_t>(tiles * kTile, g_.out - row));
    args.columns = columns;
    args.scales = scales_at(call_, row);
    args.epilogue = epilogue_at(call_.epilogue, row, call_.dtype);
    args.y = static_cast<uint8_t*>(call_.y) + (column * call_.ldy + row) * size;
    args.ldy = call_.ldy;
    args.dtype = call_.dtype;
    isa_.finish(args);
  }

  const Isa& isa_;
  const PermuteSet& kernels_;
  const Geometry& g_;
  const LinearCall& call_;
  Blocking blocking_;
  bool plain_;           // y is nothing but sum and bias, and the kernels write it
  int64_t float_bytes_;  // of a step of a tile, widened
  int64_t slice_steps_;  // of them in a slice
};

}  // namespace

int permute_linear(const Isa& isa, const PermuteSet& kernels, const Geometry& g, const LinearCall& call,
                   const Processor& processor) {
  const Partition parts = make_partition(g.tiles, call.batch, g.steps, g.slots, call.threads, kTaskColumns);
  const TaskRunner runner(isa, kernels, g, call, parts.batch_block, processor);
  std::atomic<bool> complete{true};
  parallel_for(call.threads, parts.tasks(), [&](int64_t index) {
    if (!runner.run(parts.task(index, g.tiles, call.batch))) complete.store(false, std::memory_order_relaxed);
  });
  return complete.load() ? SPARSECOMP_OK : SPARSECOMP_NO_MEMORY;
}

}  // namespace sparsecomp
