// The product of a block-sparse weight: x is packed into panels of as many batch columns as a micro-kernel takes, then
// groups of block rows whose weights stay in the L2 cache pass over the panels.
#include "block/linear.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/parallel.hpp"
#include "common/partition.hpp"
#include "common/prefetch_rows.hpp"
#include "common/workspace.hpp"

namespace sparsecomp {
namespace {

// Batch columns that are packed at a time, and the weights that pass over them.
constexpr int64_t kChunkColumns = 192;
constexpr int64_t kGroupBytes = 1024 * 1024;
// Rows whose sums are collected before they are finished: y is then written in whole cache lines.
constexpr int64_t kSumRows = 64;
// Columns of x that are packed at a time: the part of the panel they go to stays in the L1 cache.
constexpr int64_t kPackColumns = 64;
// Below this many floats packing is done before another thread has woken.
constexpr int64_t kWorthAThread = 1 << 16;

struct Panel {
  int64_t column;  // first batch column
  int columns;     // in use
  int width;       // of the panel
  int width_index;
  const float* x;
};

// A column group of a panel: [width][lane_cols] floats, `from` being lane_cols consecutive activations of one column.
template <int LC>
void scatter(const float* from, int64_t count, int64_t stride, float* to) {
  for (int64_t k = 0; k < count; k += LC, to += stride)
    for (int i = 0; i < LC; ++i) to[i] = from[k + i];
}

void scatter_column(const BlockGeometry& g, const float* from, int64_t count, int64_t stride, float* to) {
  const int64_t whole = count / g.lane_cols * g.lane_cols;
  switch (g.lane_cols) {
    case 1:
      scatter<1>(from, whole, stride, to);
      break;
    case 2:
      scatter<2>(from, whole, stride, to);
      break;
    case 4:
      scatter<4>(from, whole, stride, to);
      break;
    case 8:
      scatter<8>(from, whole, stride, to);
      break;
    default:
      scatter<16>(from, whole, stride, to);
  }
  for (int64_t k = whole; k < count; ++k) to[whole / g.lane_cols * stride + k - whole] = from[k];
}

// A task: block rows [row, row_end) by panels [panel, panel_end).
struct Task {
  int64_t row, row_end;
  int64_t panel, panel_end;
};

class BlockRunner {
 public:
  BlockRunner(const Isa& isa, const BlockKernels& kernels, const BlockGeometry& g, const LinearCall& call)
      : isa_(isa), kernels_(kernels), g_(g), call_(call) {}

  int run() {
    static thread_local Workspace space;
    const int64_t chunk = std::min(call_.batch, kChunkColumns);
    const int64_t most_columns = (chunk + widest() - 1) / widest() * widest();
    const int64_t panel_columns = g_.across * g_.padded_cols();
    auto* const workspace = static_cast<float*>(space.reserve(std::max<int64_t>(64, most_columns * panel_columns * 4)));
    if (!workspace) return SPARSECOMP_NO_MEMORY;
    for (int64_t column = 0; column < call_.batch && status_.load() == SPARSECOMP_OK; column += kChunkColumns) {
      make_panels(column, std::min(call_.batch, column + kChunkColumns), workspace);
      const int64_t columns = std::min(call_.batch - column, kChunkColumns);
      const int64_t block_row_weights = g_.down ? g_.kept * g_.block_bytes() / g_.vector_bytes() / g_.down : 0;
      const Partition parts =
          make_partition(g_.down, columns, std::max<int64_t>(1, block_row_weights), 1, call_.threads, kChunkColumns);
      const auto panels = static_cast<int64_t>(panels_.size());
      const int64_t panel_tasks = std::min(panels, parts.batch_tasks);
      parallel_for(call_.threads, parts.row_tasks * panel_tasks, [&](int64_t index) {
        Task task;
        task.row = index % parts.row_tasks * parts.tile_block;
        task.row_end = std::min(g_.down, task.row + parts.tile_block);
        task.panel = index / parts.row_tasks * panels / panel_tasks;
        task.panel_end = (index / parts.row_tasks + 1) * panels / panel_tasks;
        run_task(task);
      });
    }
    return status_.load();
  }

 private:
  int widest() const { return kernels_.widths[kernels_.width_count - 1]; }

  void fail(int status) { status_.store(status, std::memory_order_relaxed); }

  // A single column whose blocks need no padding is its own panel.
  bool direct(int width) const {
    return width == 1 && g_.dtype == SPARSECOMP_F32 && g_.padded_cols() == g_.cols && g_.in == g_.across * g_.cols;
  }

  void make_panels(int64_t column, int64_t end, float* workspace) {
    panels_.clear();
    const int64_t panel_columns = g_.across * g_.padded_cols();
    const int64_t size = element_bytes(g_.dtype);
    for (float* to = workspace; column < end;) {
      Panel panel;
      panel.column = column;
      panel.width_index = 0;
      while (panel.width_index + 1 < kernels_.width_count && kernels_.widths[panel.width_index] < end - column)
        ++panel.width_index;
      panel.width = kernels_.widths[panel.width_index];
      panel.columns = static_cast<int>(std::min<int64_t>(panel.width, end - column));
      panel.x = direct(panel.width)
                    ? reinterpret_cast<const float*>(static_cast<const uint8_t*>(call_.x) + column * call_.ldx * size)
                    : to;
      to += panel.width * panel_columns;
      column += panel.columns;
      panels_.push_back(panel);
    }
    if (panels_.size() == 1 && direct(panels_[0].width)) return;
    const auto panels = static_cast<int64_t>(panels_.size());
    // whole block columns, so that tasks write apart
    const int64_t blocks = std::max<int64_t>(1, kPackColumns / g_.cols);
    const int64_t parts = (g_.across + blocks - 1) / blocks;
    const int64_t tasks_per_panel =
        std::clamp<int64_t>(g_.in * widest() / kWorthAThread, 1, std::max<int64_t>(1, parts));
    const bool many = g_.in * (end - panels_[0].column) >= 2 * kWorthAThread;
    parallel_for(many ? call_.threads : 1, panels * tasks_per_panel, [&](int64_t index) {
      const Panel& panel = panels_[static_cast<size_t>(index / tasks_per_panel)];
      if (direct(panel.width)) return;
      const int64_t part = index % tasks_per_panel;
      for (int64_t i = parts * part / tasks_per_panel; i < parts * (part + 1) / tasks_per_panel; ++i)
        fill_panel(panel, i * blocks, std::min(g_.across, (i + 1) * blocks));
    });
  }

  // Block columns [first, last) of a panel.
  void fill_panel(const Panel& panel, int64_t first, int64_t last) const {
    auto* const to = const_cast<float*>(panel.x);  // NOLINT(cppcoreguidelines-pro-type-const-cast): in the workspace
    const int64_t stride = int64_t{panel.width} * g_.lane_cols;
    const int64_t block = g_.groups * stride;
    const bool padded = g_.padded_cols() != g_.cols;
    if (padded || panel.columns < panel.width || last * g_.cols > g_.in)
      std::fill(to + first * block, to + last * block, 0.0f);
    const int64_t size = element_bytes(g_.dtype);
    for (int b = 0; b < panel.columns; ++b) {
      const uint8_t* x = static_cast<const uint8_t*>(call_.x) + (panel.column + b) * call_.ldx * size;
      // blocks without padding follow one another; a block wider than the buffer goes through it in parts
      for (int64_t across = first; across < last; across += padded ? 1 : last - first) {
        const int64_t end = std::min(g_.in, (padded ? across + 1 : last) * g_.cols);
        for (int64_t k = across * g_.cols; k < end; k += kPackColumns) {
          const int64_t count = std::min(kPackColumns, end - k);
          float* const part = to + across * block + (k - across * g_.cols) / g_.lane_cols * stride + b * g_.lane_cols;
          if (g_.dtype == SPARSECOMP_F32) {
            scatter_column(g_, reinterpret_cast<const float*>(x) + k, count, stride, part);
          } else {
            float widened[kPackColumns];
            isa_.widen(x + k * size, g_.dtype, widened, count);
            scatter_column(g_, widened, count, stride, part);
          }
        }
      }
    }
  }

  void run_task(const Task& task) {
    static thread_local Workspace columns_space;
    int64_t row = task.row;
    do {
      // at least one block row, then as many as fit the cache
      int64_t row_end = row;
      const int64_t start = block_row_start(call_.metadata, row);
      int64_t end = start;
      while (row_end < task.row_end) {
        const int64_t next = block_row_start(call_.metadata, row_end + 1);
        if (start < 0 || next < end || next > g_.kept) return fail(SPARSECOMP_INVALID);
        if (row_end > row && (next - start) * g_.block_bytes() > kGroupBytes) break;
        end = next;
        ++row_end;
      }
      auto* const columns = static_cast<int32_t*>(columns_space.reserve(std::max<int64_t>(64, (end - start) * 4)));
      if (!columns) return fail(SPARSECOMP_NO_MEMORY);
      int32_t* to = columns;
      for (int64_t r = row; r < row_end; ++r) {
        const int64_t count = layout_columns(g_, call_.metadata, r, to);
        if (count < 0) return fail(SPARSECOMP_INVALID);
        to += count;
      }
      for (int64_t panel = task.panel; panel < task.panel_end; ++panel)
        run_rows(panels_[static_cast<size_t>(panel)], row, row_end, columns);
      row = row_end;
    } while (row < task.row_end);
  }

  void run_rows(const Panel& panel, int64_t row, int64_t row_end, const int32_t* columns) const {
    // finish reads whole tiles, of which a tail may hold no rows
    alignas(64) float sums[kSumRows * kMostPanel] = {};
    const BlockMicro micro = kernels_.micro[g_.dtype][g_.shape][panel.width_index];
    int64_t first = row * g_.rows;  // rows [first, next) wait in `sums`
    int64_t next = first;
    prefetch_output(panel, first);
    BlockMicroArgs args;
    args.columns = columns;
    args.groups = g_.groups;
    args.x = panel.x;
    args.ld = kSumRows;
    for (; row < row_end; ++row) {
      const int64_t start = block_row_start(call_.metadata, row);
      args.blocks = block_row_start(call_.metadata, row + 1) - start;
      args.values = call_.values + start * g_.block_bytes();
      const int64_t strip_bytes = args.blocks * g_.groups * g_.vector_bytes();
      for (int64_t strip = 0; strip < g_.strips; ++strip, args.values += strip_bytes) {
        const int64_t strip_row = row * g_.rows + strip * g_.lane_rows;
        if (strip_row >= g_.out) break;
        if (strip_row != next || next - first + g_.lane_rows > kSumRows) {
          finish(panel, sums, first, next);
          first = next = strip_row;
          prefetch_output(panel, first);
        }
        args.sums = sums + (next - first);
        micro(args);
        next += std::min<int64_t>(g_.lane_rows, g_.rows - strip * g_.lane_rows);
      }
      args.columns += args.blocks;
    }
    finish(panel, sums, first, next);
  }

  SPARSECOMP_INLINE void prefetch_output(const Panel& panel, int64_t row) const {
    const int64_t size = element_bytes(g_.dtype);
    prefetch_rows(static_cast<const uint8_t*>(call_.y) + (panel.column * call_.ldy + row) * size, call_.ldy * size,
                  panel.columns, std::min(kSumRows, g_.out - row) * size);
  }

  void finish(const Panel& panel, const float* sums, int64_t first, int64_t next) const {
    const int64_t size = element_bytes(g_.dtype);
    FinishArgs args{};
    args.sums = sums;
    args.ld = kSumRows;
    args.rows = static_cast<int>(std::min(next, g_.out) - first);
    args.columns = panel.columns;
    args.scales = scales_at(call_, first);
    args.epilogue = epilogue_at(call_.epilogue, first, g_.dtype);
    args.y = static_cast<uint8_t*>(call_.y) + (panel.column * call_.ldy + first) * size;
    args.ldy = call_.ldy;
    args.dtype = g_.dtype;
    isa_.finish(args);
  }

  static constexpr int kMostPanel = 24;

  const Isa& isa_;
  const BlockKernels& kernels_;
  const BlockGeometry& g_;
  const LinearCall& call_;
  std::vector<Panel> panels_;
  std::atomic<int> status_{SPARSECOMP_OK};
};

}  // namespace

int block_linear(const Isa& isa, const BlockKernels& kernels, const BlockGeometry& g, const LinearCall& call) {
  return BlockRunner(isa, kernels, g, call).run();
}

}  // namespace sparsecomp
