#include "nm/reference.hpp"

#include <algorithm>

#include "common/numbers.hpp"
#include "common/parallel.hpp"
#include "common/reference.hpp"

namespace sparsecomp {
namespace {

constexpr int64_t kColumns = 64;  // batch columns at a time, so that sums have a fixed place

void reference_block(const Geometry& g, const LinearCall& call, int64_t tile, int64_t first, int64_t columns) {
  float sums[kTile][kColumns] = {};
  float x[kStep][kColumns];  // of one step, widened once for all rows
  for (int64_t step = 0; step < g.steps; ++step) {
    const int64_t block = tile * g.steps + step;
    const int64_t used = std::min<int64_t>(kStep, g.in - step * kStep);
    for (int64_t b = 0; b < columns; ++b)
      for (int64_t k = 0; k < used; ++k)
        x[k][b] = load_number(call.x, (first + b) * call.ldx + step * kStep + k, call.dtype);
    for (int r = 0; r < kTile; ++r) {
      int position[kStep];
      row_columns(g, call.metadata + block * g.metadata_bytes, r, position);
      for (int slot = 0; slot < g.slots; ++slot) {
        if (position[slot] >= used) continue;
        const float weight = load_number(call.values + block * g.value_bytes + value_offset(g, slot, r), 0, g.dtype);
        const float* activations = x[position[slot]];
        float* sum = sums[r];
        for (int64_t b = 0; b < columns; ++b) sum[b] += weight * activations[b];
      }
    }
  }
  for (int r = 0; r < kTile && tile * kTile + r < g.out; ++r) {
    const int64_t row = tile * kTile + r;
    for (int64_t b = 0; b < columns; ++b) reference_finish(call, sums[r][b], row, first + b);
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
