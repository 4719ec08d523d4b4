#include "int8/linear.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "common/parallel.hpp"
#include "common/partition.hpp"
#include "common/prefetch_rows.hpp"
#include "common/rounding.hpp"
#include "common/workspace.hpp"

namespace sparsecomp::int8 {
namespace {

// Batch columns of a task, at most, and what their activations take in the L2 cache.
constexpr int64_t kTaskColumns = 128;
constexpr int64_t kTaskBytes = 384 << 10;
// So many columns of the weight are multiplied at once: where the L1 cache is small, two tiles of them stay in it while
// the batch passes over them. Elsewhere what a cut costs, some 35 ns for each call of a micro-kernel, is more. A batch
// that passes once is not cut.
constexpr int64_t kSmallL1 = 32 << 10;
constexpr int64_t kChunkColumns = 4096, kSmallL1ChunkColumns = 1024;
// Rounding so many numbers keeps a second thread busy for longer than it takes to wake.
constexpr int64_t kManyNumbers = 1 << 16;
constexpr int64_t kLineBytes = 64;

// The integer nearest to a number from 0 to 2^22, ties to even: the last bit of the sum is worth 1.
int nearest(float number) { return static_cast<int>((number + 0x1p23f) - 0x1p23f); }

struct Panel {
  uint8_t* integers;  // [batch][ld]
  int64_t ld;
  RoundedRow* rows;  // [batch], zero points of integers as they are stored
};

// The integers of one row of x; columns past the last are of any content, and meet weights of 0.
bool round_row(const Isa& isa, const Kernels& kernels, const MicroSet& set, const Geometry& g, const LinearCall& call,
               int64_t column, const Panel& panel) {
  const auto* start = static_cast<const uint8_t*>(call.x) + column * call.ldx * element_bytes(call.dtype);
  const auto* x = reinterpret_cast<const float*>(start);
  if (call.dtype != SPARSECOMP_F32) {
    static thread_local Workspace space;
    auto* wide = static_cast<float*>(space.reserve(std::max<int64_t>(1, g.in) * 4));
    if (!wide) return false;
    isa.widen(start, call.dtype, wide, g.in);
    x = wide;
  }
  float smallest, largest;
  const bool finite = kernels.range(x, g.in, &smallest, &largest);
  RoundedRow row = rounding_of(finite, smallest, largest);
  uint8_t* to = panel.integers + column * panel.ld;
  if (finite)
    kernels.round(x, g.in, inverse_of(row), row.zero_point, set, to);
  else
    std::fill(to, to + panel.ld, uint8_t{0});
  if (!set.signed_x) row.zero_point += 128;
  panel.rows[column] = row;
  return true;
}

// Columns of the next call, in even parts: 9 columns are 5 and 4, not 8 and 1.
int next_columns(int64_t left) {
  if (left <= kMostColumns) return static_cast<int>(left);
  const auto columns = static_cast<unsigned>(left);
  const unsigned parts = (columns + kMostColumns - 1) / kMostColumns;
  return std::min<int>(kMostColumns, static_cast<int>((columns + parts - 1) / parts));
}

class TaskRunner {
 public:
  TaskRunner(const Isa& isa, const MicroSet& kernels, const Geometry& g, const LinearCall& call, const Panel& panel,
             const Processor& processor)
      : isa_(isa), kernels_(kernels), g_(g), call_(call), panel_(panel) {
    plain_ = call.dtype == SPARSECOMP_F32 && call.epilogue.activation == SPARSECOMP_NO_ACTIVATION;
    // one column waits for memory: several tiles would be several streams of it
    pairs_ = call.batch > 1 && kernels.micro[kMostTiles][1];
    const int64_t most = processor.l1_bytes > kSmallL1 ? kChunkColumns : kSmallL1ChunkColumns;
    const int64_t chunks = call.batch > kMostColumns ? std::max<int64_t>(1, divide_up(g.columns, most)) : 1;
    chunk_rounds_ = divide_up(g.rounds, chunks);
  }

  // False if there is no memory for the sums.
  bool run(const Task& task) const {
    static thread_local Workspace space;
    int32_t* partial = nullptr;
    if (chunk_rounds_ < g_.rounds) {
      partial = static_cast<int32_t*>(space.reserve((task.column_end - task.column) * kMostTiles * kTile * 4));
      if (!partial) return false;
    }
    alignas(64) float sums[kMostColumns * kMostTiles * kTile];
    MicroArgs args;
    args.sums = sums;
    args.value_stride = g_.rounds * g_.value_bytes;
    args.metadata_stride = g_.rounds * g_.metadata_bytes;
    args.ldx = panel_.ld;
    args.ldy = call_.ldy;
    for (int64_t tile = task.tile; tile < task.tile_end;) {
      const int tiles = pairs_ && tile + 1 < task.tile_end ? kMostTiles : 1;
      args.row_sums = row_sums(g_, call_.values, tile);
      args.narrow = true;
      for (int t = 0; t < tiles; ++t) args.narrow = args.narrow && narrow_pairs(g_, call_.values, tile + t);
      const int64_t next = tile + tiles < task.tile_end ? tile + tiles : task.tile;
      for (int64_t round = 0; round < g_.rounds; round += chunk_rounds_) {
        args.rounds = std::min(chunk_rounds_, g_.rounds - round);
        args.add = round > 0;
        args.done = round + args.rounds == g_.rounds;
        point_at(tile, round, &args.values, &args.metadata);
        point_at(args.done ? next : tile, args.done ? 0 : round + args.rounds, &args.next_values, &args.next_metadata);
        run_columns(task, tile, tiles, round, partial, &args);
      }
      tile += tiles;
    }
    return true;
  }

 private:
  void point_at(int64_t tile, int64_t round, const uint8_t** values, const uint8_t** metadata) const {
    *values = call_.values + (tile * g_.rounds + round) * g_.value_bytes;
    *metadata = call_.metadata + (tile * g_.rounds + round) * g_.metadata_bytes;
  }

  // All batch columns over the same weights.
  void run_columns(const Task& task, int64_t tile, int tiles, int64_t round, int32_t* partial, MicroArgs* args) const {
    const Micro* micro = kernels_.micro[tiles];
    const int64_t row = tile * kTile, size = element_bytes(call_.dtype);
    const int64_t rows = std::min<int64_t>(tiles * kTile, g_.out - row);
    args->scales = scales_at(call_, row);
    args->bias = static_cast<const float*>(epilogue_at(call_.epilogue, row, call_.dtype).bias);
    for (int64_t column = task.column; column < task.column_end;) {
      const int columns = next_columns(task.column_end - column);
      uint8_t* y = static_cast<uint8_t*>(call_.y) + (column * call_.ldy + row) * size;
      if (args->done) prefetch_rows(y, call_.ldy * size, columns, rows * size);
      args->x = panel_.integers + column * panel_.ld + round * g_.round_steps * kStep * kernels_.copies;
      args->partial = partial;
      args->rows = panel_.rows + column;
      args->stream = column == task.column;
      args->y = plain_ && rows == tiles * kTile ? reinterpret_cast<float*>(y) : nullptr;
      micro[columns](*args);
      if (args->done && !args->y) finish(args->sums, row, static_cast<int>(rows), tiles, columns, y);
      if (partial) partial += columns * tiles * kTile;
      column += columns;
    }
  }

  void finish(const float* sums, int64_t row, int rows, int tiles, int columns, uint8_t* y) const {
    FinishArgs args;
    args.sums = sums;
    args.ld = tiles * kTile;
    args.rows = rows;
    args.columns = columns;
    args.scales = scales_at(call_, row);
    args.epilogue = epilogue_at(call_.epilogue, row, call_.dtype);
    args.y = y;
    args.ldy = call_.ldy;
    args.dtype = call_.dtype;
    isa_.finish(args);
  }

  const Isa& isa_;
  const MicroSet& kernels_;
  const Geometry& g_;
  const LinearCall& call_;
  const Panel& panel_;
  bool plain_;  // y is nothing but sum, scales and bias, and the kernels write it
  bool pairs_;  // of tiles, in a micro-kernel call
  int64_t chunk_rounds_;
};

}  // namespace

RoundedRow rounding_of(bool finite, float smallest, float largest) {
  if (!finite) return {std::numeric_limits<float>::quiet_NaN(), 0};
  // apart, because the difference may be more than fp32 holds; a smaller scale would have no inverse
  const float scale = std::max(largest / kLevels - smallest / kLevels, std::numeric_limits<float>::min());
  const int below = nearest(-smallest / scale);
  return {scale, std::min(below - kLargest, kLargest)};
}

float inverse_of(const RoundedRow& row) { return std::isnan(row.scale) ? 0.0f : 1.0f / row.scale; }

int linear(const Isa& isa, const Kernels& kernels, const Geometry& g, const LinearCall& call,
           const Processor& processor) {
  static thread_local Workspace space;
  const MicroSet& set = *kernels.select(g, call.batch);
  Panel panel;
  // rows a multiple of 4096 bytes apart would all lie in the same few lines of the L1 cache
  panel.ld = round_up(g.columns, kPanelUnit) * set.copies + kLineBytes;
  const int64_t integers_bytes = call.batch * panel.ld;
  panel.integers =
      static_cast<uint8_t*>(space.reserve(integers_bytes + call.batch * static_cast<int64_t>(sizeof(RoundedRow))));
  if (!panel.integers) return SPARSECOMP_NO_MEMORY;
  panel.rows = reinterpret_cast<RoundedRow*>(panel.integers + integers_bytes);
  std::atomic<bool> complete{true};
  const bool many = call.batch * g.in >= kManyNumbers;
  parallel_for(many ? call.threads : 1, call.batch, [&](int64_t column) {
    if (!round_row(isa, kernels, set, g, call, column, panel)) complete.store(false, std::memory_order_relaxed);
  });
  if (!complete.load()) return SPARSECOMP_NO_MEMORY;

  const int words = static_cast<int>(g.round_steps * g.words);
  const int64_t columns =
      std::clamp<int64_t>(round_up(kTaskBytes / panel.ld, kMostColumns), kMostColumns, kTaskColumns);
  const Partition parts = make_partition(g.tiles, call.batch, g.rounds, words, call.threads, columns);
  const TaskRunner runner(isa, set, g, call, panel, processor);
  parallel_for(call.threads, parts.tasks(), [&](int64_t index) {
    if (!runner.run(parts.task(index, g.tiles, call.batch))) complete.store(false, std::memory_order_relaxed);
  });
  return complete.load() ? SPARSECOMP_OK : SPARSECOMP_NO_MEMORY;
}

}  // namespace sparsecomp::int8
