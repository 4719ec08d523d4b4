#include "reference.hpp"

#include <algorithm>

#include "numbers.hpp"
#include "parallel.hpp"

namespace sparsecomp {
namespace {

constexpr int64_t kColumns = 64;  // batch columns at a time, so that sums have a fixed place

void reference_block(const Geometry& g, const LinearCall& call, int64_t tile, int64_t first, int64_t columns) {
  float sums[kTile][kColumns] = {};
  for (int64_t step = 0; step < g.steps; ++step) {
    const int64_t block = tile * g.steps + step;
    for (int r = 0; r < kTile; ++r) {
      int position[kStep];
      row_columns(g, call.metadata + block * g.metadata_bytes, r, position);
      for (int slot = 0; slot < g.slots; ++slot) {
        const int64_t k = step * kStep + position[slot];
        if (k >= g.in) continue;
        const float weight = load_number(call.values + block * g.value_bytes + value_offset(g, slot, r), 0, g.dtype);
        for (int64_t b = 0; b < columns; ++b)
          sums[r][b] += weight * load_number(call.x, (first + b) * call.ldx + k, g.dtype);
      }
    }
  }
  for (int r = 0; r < kTile && tile * kTile + r < g.out; ++r) {
    const int64_t row = tile * kTile + r;
    const float bias = call.bias ? load_number(call.bias, row, g.dtype) : 0.0f;
    for (int64_t b = 0; b < columns; ++b)
      store_number(sums[r][b] + bias, call.y, (first + b) * call.ldy + row, g.dtype);
  }
}

}  // namespace

void reference_linear(const Geometry& g, const LinearCall& call) {
  parallel_for(call.threads, g.tiles, [&](int64_t tile) {
    for (int64_t first = 0; first < call.batch; first += kColumns)
      reference_block(g, call, tile, first, std::min(kColumns, call.batch - first));
  });
}

}  // namespace sparsecomp
