#include "nm/panel.hpp"

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

// The sums of a task stay in the L2 cache.
constexpr int64_t kSumsBytes = 192 << 10;
// Panels are packed for as many batch columns at a time as are still near when the last rows of the weight pass over
// them: of the L3 cache, which others use too, a small part.
constexpr int64_t kGroupBytes = 2 << 20;
// What another thread has packed must be fetched from that one's cache, and taken back at the next call: some percent
// of a product, and more than a third of it when a virtual machine's cores seemed to share no cache. So each thread
// packs for itself where a panel, and the weight if it meets several, stay in its L2 cache; and if all threads must
// pack the only panel, where each has rows enough to use it for.
constexpr int64_t kOwnBytes = 512 << 10;
constexpr int64_t kOwnRows = 192;
// Bytes of a row of x that are asked for ahead of their packing.
constexpr int64_t kPackAhead = 256;
constexpr int kMostLanes = 16;
// Tiles between the one whose y is written and the one whose lines of y are asked for.
constexpr int64_t kTilesAhead = 2;

struct Panel {
  int64_t first, width;  // batch columns
  int64_t split;         // columns that are transposed; the others, after them, are not
  PanelMicro micro;
};

// The batch, cut into panels of nearly equal width.
struct Panels {
  const PanelSet& kernels;
  int64_t units, count;

  Panels(const PanelSet& set, int64_t batch)
      : kernels(set), units(divide_up(batch, set.unit)), count(divide_up(units, set.most_units)) {}

  // Divides: not for inner loops.
  Panel at(int64_t index) const {
    const int64_t first_unit = units * index / count, width_units = units * (index + 1) / count - first_unit;
    const int64_t width = width_units * kernels.unit;
    return {first_unit * kernels.unit, width, width - kernels.permuted[width_units], kernels.micro[width_units]};
  }
  int64_t widest() const { return divide_up(units, count) * kernels.unit; }
};

class Runner {
 public:
  Runner(const Isa& isa, const PanelSet& kernels, const Geometry& g, const LinearCall& call, const Processor& processor)
      : isa_(isa), kernels_(kernels), g_(g), call_(call), panels_(kernels, call.batch), asks_early_(!processor.intel) {
    widest_ = panels_.widest();
    block_steps_ = std::max<int64_t>(1, processor.l1_bytes * 2 / 3 / (widest_ * kStep * 4));
    const int64_t work = g.tiles * kTile * g.steps * g.slots * call.batch;
    threads_ = worth_threads(work) ? call.threads : 1;
    const int64_t panel_bytes = std::max<int64_t>(1, widest_ * g.steps * kStep * 4);
    const int64_t weight_bytes = g.tiles * g.steps * (g.value_bytes + g.metadata_bytes);
    own_ = threads_ > 1 && panel_bytes <= kOwnBytes &&
           (panels_.count < threads_ ? panels_.count == 1 && g.out >= threads_ * kOwnRows : weight_bytes <= kOwnBytes);
    const int64_t near = kGroupBytes / panel_bytes;
    // few rows: several panels at a time, or threads have nothing to do
    group_ = std::clamp<int64_t>(std::max(near, divide_up(2 * call.threads, std::max<int64_t>(1, g.tiles))), 1,
                                 panels_.count);
    tile_block_ =
        panel_tile_block(g.tiles, kSumsBytes / (kTile * widest_ * 4), own_ ? panels_.count : group_, threads_);
    row_tasks_ = divide_up(g.tiles, tile_block_);
  }

  int run() { return own_ ? run_own() : run_shared(); }

 private:
  // Panels packed by all threads, a group at a time: the weights of a task stay in the cache while they pass over them.
  int run_shared() {
    static thread_local Workspace packed_space;
    const int64_t panel_elements = widest_ * g_.steps * kStep;
    auto* packed = static_cast<float*>(packed_space.reserve(std::max<int64_t>(1, group_ * panel_elements) * 4));
    if (!packed) return SPARSECOMP_NO_MEMORY;
    const int64_t pack_steps = std::max<int64_t>(1, block_steps_ * 4);
    const int64_t pack_tasks = divide_up(g_.steps, pack_steps);
    std::atomic<bool> complete{true};
    for (int64_t first = 0; first < panels_.count; first += group_) {
      const int64_t count = std::min(group_, panels_.count - first);
      parallel_for(threads_, pack_tasks * count, [&](int64_t index) {
        const int64_t panel = index / pack_tasks, step = index % pack_tasks * pack_steps;
        pack(panels_.at(first + panel), step, std::min(g_.steps, step + pack_steps), packed + panel * panel_elements);
      });
      parallel_for(threads_, row_tasks_ * count, [&](int64_t index) {
        const int64_t panel = index % count;
        if (!multiply(panels_.at(first + panel), index / count, packed + panel * panel_elements))
          complete.store(false, std::memory_order_relaxed);
      });
    }
    return complete.load() ? SPARSECOMP_OK : SPARSECOMP_NO_MEMORY;
  }

  // Panels packed by the threads that multiply them: the tasks of one follow each other.
  int run_own() {
    static std::atomic<uint64_t> last_call{0};
    const uint64_t call = last_call.fetch_add(1, std::memory_order_relaxed) + 1;
    std::atomic<bool> complete{true};
    parallel_for(threads_, panels_.count * row_tasks_, [&](int64_t index) {
      static thread_local Workspace space;
      static thread_local uint64_t packed_call = 0;
      static thread_local int64_t packed_panel = 0;
      const int64_t panel = index / row_tasks_;
      const Panel at = panels_.at(panel);
      auto* packed = static_cast<float*>(space.reserve(widest_ * g_.steps * kStep * 4));
      if (packed && !(packed_call == call && packed_panel == panel)) {
        pack(at, 0, g_.steps, packed);
        packed_call = call;
        packed_panel = panel;
      }
      if (!packed || !multiply(at, index % row_tasks_, packed)) complete.store(false, std::memory_order_relaxed);
    });
    return complete.load() ? SPARSECOMP_OK : SPARSECOMP_NO_MEMORY;
  }

  // Steps [first_step, step_end) of a panel: x in the kernels' form, padded with zeros. A few rows of x at a time: rows
  // are far apart, often at the same place of the cache.
  void pack(const Panel& panel, int64_t first_step, int64_t step_end, float* packed) const {
    const int64_t width = panel.width, split = panel.split, size = element_bytes(kernels_.x_dtype);
    for (int64_t column = 0, count; column < width; column += count) {
      const int64_t first = panel.first + column;
      count = std::min<int64_t>(kernels_.lanes, width - column);
      for (int64_t step = first_step; step < step_end; ++step) {
        alignas(64) float local[kMostLanes * kStep];
        const void* from = local;
        int64_t ld = kStep;
        if (call_.dtype == kernels_.x_dtype && first + count <= call_.batch && (step + 1) * kStep <= g_.in) {
          const auto* x = static_cast<const uint8_t*>(call_.x) + (first * call_.ldx + step * kStep) * size;
          from = x;
          ld = call_.ldx;
          // the hardware sees too many short streams
          for (int64_t i = 0; i < count; ++i) __builtin_prefetch(x + i * ld * size + kPackAhead);
        } else {
          fill(first, count, step, local);
        }
        float* to = packed + step * kStep * width;
        if (column < split)
          kernels_.pack(from, ld, to + column, split);
        else
          for (int64_t i = 0; i < count; ++i)
            std::memcpy(to + (column + i) * kStep, static_cast<const float*>(from) + i * ld, kStep * sizeof(float));
      }
    }
  }

  // [count][16] of x from batch column `first` and column step `step`, in the kernels' type, padded with zeros.
  void fill(int64_t first, int64_t count, int64_t step, void* local) const {
    const int64_t columns = std::min(count, call_.batch - first);
    const int64_t used = std::min<int64_t>(kStep, g_.in - step * kStep);
    const int64_t size = element_bytes(call_.dtype), row_bytes = kStep * element_bytes(kernels_.x_dtype);
    std::memset(local, 0, static_cast<size_t>(count * row_bytes));
    for (int64_t i = 0; i < columns; ++i) {
      const auto* from = static_cast<const uint8_t*>(call_.x) + ((first + i) * call_.ldx + step * kStep) * size;
      auto* to = static_cast<uint8_t*>(local) + i * row_bytes;
      if (call_.dtype == kernels_.x_dtype)
        std::memcpy(to, from, static_cast<size_t>(used * size));
      else
        isa_.widen(from, call_.dtype, reinterpret_cast<float*>(to), used);
    }
  }

  // One panel by one of the row tasks. False if there is no memory for the workspace.
  bool multiply(const Panel& panel, int64_t row_task, const float* packed) const {
    static thread_local Workspace sums_space, values_space;
    const int64_t tile = row_task * tile_block_, tile_end = std::min(g_.tiles, tile + tile_block_);
    const int64_t width = panel.width;
    const bool widens = kernels_.x_dtype == SPARSECOMP_F32 && g_.dtype != SPARSECOMP_F32;
    auto* sums = static_cast<float*>(sums_space.reserve((tile_end - tile) * kTile * width * 4));
    float* widened = nullptr;
    if (widens) widened = static_cast<float*>(values_space.reserve(block_steps_ * (g_.slots + 1) * kTile * 4));
    if (!sums || (widens && !widened)) return false;
    int64_t groups[kStep];
    for (int slot = 0; slot < g_.slots; ++slot) groups[slot] = slot / g_.n * g_.m * panel.split;
    int64_t step = 0;
    do {  // once even if there are no columns: y is the bias then
      PanelArgs args{};
      args.geometry = &g_;
      args.groups = groups;
      args.panel = packed + step * kStep * width;
      args.steps = std::min(block_steps_, g_.steps - step);
      args.add = step > 0;
      const bool last = step + args.steps == g_.steps;
      for (int64_t t = tile; t < tile_end; ++t) {
        const int64_t block = t * g_.steps + step;
        args.values = call_.values + block * g_.value_bytes;
        args.metadata = call_.metadata + block * g_.metadata_bytes;
        // the tile below, or the first one's next columns; the hardware does not foresee the jump
        const int64_t next_block = block + (t + 1 < tile_end ? g_.steps : args.steps - (t - tile) * g_.steps);
        args.next_values = call_.values + next_block * g_.value_bytes;
        for (int64_t byte = 0; byte < args.steps * g_.metadata_bytes; byte += 64)
          __builtin_prefetch(call_.metadata + next_block * g_.metadata_bytes + byte);
        if (last && asks_early_) output_lines(panel, t, &args);
        if (widens) {
          for (int64_t i = 0; i < args.steps; ++i)
            kernels_.widen(isa_.widen, args.values + i * g_.value_bytes, g_.dtype, g_.slots,
                           widened + i * g_.slots * kTile);
          args.values = reinterpret_cast<const uint8_t*>(widened);
        }
        // permuted columns are shared out over all rows
        args.rows = panel.split < width ? kTile : static_cast<int>(std::min<int64_t>(kTile, g_.out - t * kTile));
        args.sums = sums + (t - tile) * kTile * width;
        panel.micro(args);
      }
      step += args.steps;
    } while (step < g_.steps);
    finish(panel, tile, tile_end, sums);
    return true;
  }

  // Where finish() will write the sums of a tile: far apart, so that each of them would be waited for. Intel's
  // processors gain 1-4% if finish() asks for them, and for sums, itself.
  void output_lines(const Panel& panel, int64_t tile, PanelArgs* args) const {
    const int64_t size = element_bytes(call_.dtype);
    args->output = static_cast<const char*>(call_.y) + (panel.first * call_.ldy + tile * kTile) * size;
    args->output_stride = call_.ldy * size;
    args->output_rows = std::min(call_.batch - panel.first, panel.width);
  }

  // y of [tile, tile_end) and one panel from the sums of the tiles. A few rows of y at a time, as in pack().
  void finish(const Panel& panel, int64_t tile, int64_t tile_end, const float* sums) const {
    const int64_t width = panel.width, split = panel.split, lanes = kernels_.lanes;
    const int64_t size = element_bytes(call_.dtype), start = panel.first;
    const int64_t end = std::min(call_.batch - start, width);
    alignas(64) float local[kMostLanes * kTile];
    FinishArgs args;
    args.ld = kTile;
    args.ldy = call_.ldy;
    args.dtype = call_.dtype;
    for (int64_t column = 0; column < end; column += lanes) {
      args.columns = static_cast<int>(std::min(lanes, end - column));
      for (int64_t t = tile; t < tile_end; ++t) {
        const float* from = sums + (t - tile) * kTile * width;
        if (column < split) {
          if (!asks_early_ && t + 1 < tile_end)
            prefetch_rows(from + kTile * width + column, split * 4, kTile, lanes * 4);
          for (int64_t r = 0; r < kTile; r += lanes)
            kernels_.transpose(from + r * split + column, split, local + r, kTile);
          args.sums = local;
        } else {
          args.sums = from + column * kTile;
        }
        const int64_t row = t * kTile;
        args.rows = static_cast<int>(std::min<int64_t>(kTile, g_.out - row));
        args.scales = scales_at(call_, row);
        args.epilogue = epilogue_at(call_.epilogue, row, call_.dtype);
        auto* y = static_cast<uint8_t*>(call_.y) + ((start + column) * call_.ldy + row) * size;
        if (!asks_early_ && t + kTilesAhead < tile_end)
          prefetch_rows(y + kTilesAhead * kTile * size, call_.ldy * size, args.columns, kTile * size);
        args.y = y;
        isa_.finish(args);
      }
    }
  }

  const Isa& isa_;
  const PanelSet& kernels_;
  const Geometry& g_;
  const LinearCall& call_;
  const Panels panels_;
  int64_t widest_;       // columns of the widest panel
  int64_t block_steps_;  // column steps of a panel that stay in the L1 cache, beside the weights of a tile
  int64_t group_;        // panels packed at a time
  int64_t tile_block_, row_tasks_;
  int threads_;
  bool own_;               // every thread packs for itself
  const bool asks_early_;  // for the lines of y, while their sums are made
};

}  // namespace

int panel_linear(const Isa& isa, const PanelSet& kernels, const Geometry& g, const LinearCall& call,
                 const Processor& processor) {
  return Runner(isa, kernels, g, call, processor).run();
}

}  // namespace sparsecomp
