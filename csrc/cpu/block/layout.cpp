#include "block/layout.hpp"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "common/parallel.hpp"
#include "common/rounding.hpp"

namespace sparsecomp {
namespace {

// Below this many stored weights a second thread costs more than it saves.
constexpr int64_t kManyWeights = 1 << 18;

// Calls `visit(offset, row, column, count)` for runs of neighbouring weights of a block, padding left out. Offsets are
// in elements from the block's first vector; a strip is `strip_stride` after the one before.
template <class Visit>
void for_runs(const BlockGeometry& g, int64_t strip_stride, const Visit& visit) {
  for (int64_t row = 0; row < g.rows; ++row) {
    int64_t offset = row / g.lane_rows * strip_stride + row % g.lane_rows * g.lane_cols;
    for (int64_t column = 0; column < g.cols; column += g.lane_cols, offset += kLanes)
      visit(offset, row, column, std::min<int64_t>(g.lane_cols, g.cols - column));
  }
}

// Calls `visit(kept block, block row, block column, element offset of its first vector, strip stride)` for the blocks
// of the block rows, which are shared out to threads. False if the metadata is damaged.
template <class Visit>
bool for_blocks(const BlockGeometry& g, const uint8_t* metadata, int threads, const Visit& visit) {
  const bool many = g.kept * g.strips * g.groups * kLanes >= kManyWeights;
  std::atomic<bool> valid{true};
  parallel_for(many ? threads : 1, g.down, [&](int64_t block_row) {
    std::vector<int32_t> columns(static_cast<size_t>(g.across));
    const int64_t start = block_row_start(metadata, block_row);
    const int64_t count = layout_columns(g, metadata, block_row, columns.data());
    if (count < 0) valid.store(false, std::memory_order_relaxed);
    const int64_t block = g.groups * kLanes;
    for (int64_t i = 0; i < count; ++i)
      visit(start + i, block_row, int64_t{columns[static_cast<size_t>(i)]}, start * g.strips * block + i * block,
            count * block);
  });
  return valid.load();
}

template <class T>
void copy_run(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class T>
bool pack_as(const BlockGeometry& g, const T* canonical, T* values, const uint8_t* metadata) {
  return for_blocks(g, metadata, resolve_threads(0),
                    [&](int64_t kept, int64_t, int64_t, int64_t first, int64_t strip_stride) {
                      const T* from = canonical + kept * g.rows * g.cols;
                      for_runs(g, strip_stride, [&](int64_t offset, int64_t row, int64_t column, int64_t count) {
                        copy_run(from + row * g.cols + column, count, values + first + offset);
                      });
                    });
}

template <class T>
bool unpack_as(const BlockGeometry& g, const T* values, const uint8_t* metadata, T* canonical) {
  return for_blocks(g, metadata, resolve_threads(0),
                    [&](int64_t kept, int64_t, int64_t, int64_t first, int64_t strip_stride) {
                      T* to = canonical + kept * g.rows * g.cols;
                      for_runs(g, strip_stride, [&](int64_t offset, int64_t row, int64_t column, int64_t count) {
                        copy_run(values + first + offset, count, to + row * g.cols + column);
                      });
                    });
}

template <class T>
bool to_dense_as(const BlockGeometry& g, const T* values, const uint8_t* metadata, T* dense, int threads) {
  std::fill(dense, dense + g.out * g.in, T{0});
  return for_blocks(g, metadata, threads,
                    [&](int64_t, int64_t down, int64_t across, int64_t first, int64_t strip_stride) {
                      for_runs(g, strip_stride, [&](int64_t offset, int64_t row, int64_t column, int64_t count) {
                        const int64_t y = down * g.rows + row, x = across * g.cols + column;
                        if (y < g.out)
                          copy_run(values + first + offset, std::min(count, g.in - x), dense + y * g.in + x);
                      });
                    });
}

// Calls `function` with a null pointer to an integer as wide as the elements.
template <class Function>
bool with_element(const BlockGeometry& g, const Function& function) {
  switch (element_bytes(g.dtype)) {
    case 4:
      return function(static_cast<uint32_t*>(nullptr));
    case 2:
      return function(static_cast<uint16_t*>(nullptr));
    default:
      return function(static_cast<uint8_t*>(nullptr));
  }
}

}  // namespace

bool make_block_geometry(const sparsecomp_block& weight, BlockGeometry* geometry) {
  BlockGeometry& g = *geometry;
  g.out = weight.out_features;
  g.in = weight.in_features;
  g.rows = weight.rows;
  g.cols = weight.cols;
  g.kept = weight.kept;
  g.dtype = weight.dtype;
  constexpr int64_t kMost = int64_t{1} << 31, kMostWeights = int64_t{1} << 50;
  if (g.out < 0 || g.in < 0 || g.out >= kMost || g.in >= kMost || g.rows < 1 || g.cols < 1 || g.kept < 0) return false;
  if (g.dtype < SPARSECOMP_F32 || g.dtype > SPARSECOMP_I8) return false;
  g.down = divide_up(g.out, g.rows);
  g.across = divide_up(g.in, g.cols);
  if (g.kept > g.down * g.across) return false;

  int64_t least = 0;
  for (int shape = kLaneShapes - 1; shape >= 0; --shape) {
    const int64_t lane_rows = int64_t{1} << shape, lane_cols = kLanes / lane_rows;
    const int64_t strips = divide_up(g.rows, lane_rows), groups = divide_up(g.cols, lane_cols);
    if (least != 0 && strips * groups >= least) continue;
    least = strips * groups;
    g.shape = shape;
    g.lane_rows = static_cast<int>(lane_rows);
    g.lane_cols = static_cast<int>(lane_cols);
    g.strips = strips;
    g.groups = groups;
  }
  g.bitmap_bytes = divide_up(g.across, 8);
  return g.kept == 0 || least <= kMostWeights / kLanes / g.kept;
}

int64_t block_row_start(const uint8_t* metadata, int64_t block_row) {
  int64_t start;
  std::memcpy(&start, metadata + block_row * 8, 8);
  return start;
}

int64_t kept_columns(const BlockGeometry& g, const uint8_t* bitmap_row, int64_t most, int32_t* columns) {
  int64_t count = 0;
  for (int64_t byte = 0; byte < g.bitmap_bytes; byte += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bitmap_row + byte, static_cast<size_t>(std::min<int64_t>(8, g.bitmap_bytes - byte)));
    for (; word; word &= word - 1) {
      const int64_t column = byte * 8 + __builtin_ctzll(word);
      if (count == most || column >= g.across) return -1;
      columns[count++] = static_cast<int32_t>(column);
    }
  }
  return count;
}

int64_t layout_columns(const BlockGeometry& g, const uint8_t* metadata, int64_t block_row, int32_t* columns) {
  const int64_t start = block_row_start(metadata, block_row), end = block_row_start(metadata, block_row + 1);
  if (start < 0 || end < start || end > g.kept) return -1;
  const uint8_t* bitmap = metadata + (g.down + 1) * 8 + block_row * g.bitmap_bytes;
  return kept_columns(g, bitmap, std::min(end - start, g.across), columns) == end - start ? end - start : -1;
}

bool pack_blocks(const BlockGeometry& g, const uint8_t* canonical_values, const uint8_t* bitmap, uint8_t* values,
                 uint8_t* metadata) {
  std::vector<int32_t> columns(static_cast<size_t>(g.across));
  int64_t kept = 0;
  std::memcpy(metadata, &kept, 8);
  for (int64_t block_row = 0; block_row < g.down; ++block_row) {
    const int64_t count = kept_columns(g, bitmap + block_row * g.bitmap_bytes, g.across, columns.data());
    if (count < 0) return false;
    kept += count;
    std::memcpy(metadata + (block_row + 1) * 8, &kept, 8);
  }
  if (kept != g.kept) return false;
  if (g.down * g.across > 0)
    std::memcpy(metadata + (g.down + 1) * 8, bitmap, static_cast<size_t>(g.down * g.bitmap_bytes));
  if (kept == 0) return true;
  std::memset(values, 0, static_cast<size_t>(g.values_bytes()));
  return with_element(g, [&](auto* element) {
    using T = decltype(element);
    return pack_as(g, reinterpret_cast<const std::remove_pointer_t<T>*>(canonical_values), reinterpret_cast<T>(values),
                   metadata);
  });
}

bool unpack_blocks(const BlockGeometry& g, const uint8_t* values, const uint8_t* metadata, uint8_t* canonical_values,
                   uint8_t* bitmap) {
  if (g.down * g.across > 0)
    std::memcpy(bitmap, metadata + (g.down + 1) * 8, static_cast<size_t>(g.down * g.bitmap_bytes));
  return with_element(g, [&](auto* element) {
    using T = decltype(element);
    return unpack_as(g, reinterpret_cast<const std::remove_pointer_t<T>*>(values), metadata,
                     reinterpret_cast<T>(canonical_values));
  });
}

bool blocks_to_dense(const BlockGeometry& g, const uint8_t* values, const uint8_t* metadata, uint8_t* dense,
                     int threads) {
  return with_element(g, [&](auto* element) {
    using T = decltype(element);
    return to_dense_as(g, reinterpret_cast<const std::remove_pointer_t<T>*>(values), metadata,
                       reinterpret_cast<T>(dense), threads);
  });
}

}  // namespace sparsecomp
