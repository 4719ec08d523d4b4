#include "block/reference.hpp"

#include <algorithm>
#include <vector>

#include "common/numbers.hpp"
#include "common/reference.hpp"

namespace sparsecomp {

int block_reference(const BlockGeometry& g, const LinearCall& call) {
  std::vector<int32_t> columns(static_cast<size_t>(g.across));
  std::vector<float> sums;
  for (int64_t block_row = 0; block_row < g.down; ++block_row) {
    const int64_t start = block_row_start(call.metadata, block_row);
    const int64_t count = layout_columns(g, call.metadata, block_row, columns.data());
    if (count < 0) return SPARSECOMP_INVALID;
    for (int64_t r = 0; r < g.rows && block_row * g.rows + r < g.out; ++r) {
      const int64_t row = block_row * g.rows + r;
      sums.assign(static_cast<size_t>(call.batch), 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = columns[static_cast<size_t>(i)] * g.cols;
        for (int64_t c = 0; c < g.cols && first + c < g.in; ++c) {
          const int64_t vector = (start * g.strips + r / g.lane_rows * count + i) * g.groups + c / g.lane_cols;
          const int64_t lane = r % g.lane_rows * g.lane_cols + c % g.lane_cols;
          const float weight = load_number(call.values, vector * kLanes + lane, g.dtype);
          for (int64_t b = 0; b < call.batch; ++b)
            sums[static_cast<size_t>(b)] += weight * load_number(call.x, b * call.ldx + first + c, g.dtype);
        }
      }
      for (int64_t b = 0; b < call.batch; ++b) reference_finish(call, sums[static_cast<size_t>(b)], row, b);
    }
  }
  return SPARSECOMP_OK;
}

}  // namespace sparsecomp
