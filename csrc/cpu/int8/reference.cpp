#include "int8/reference.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/numbers.hpp"
#include "common/parallel.hpp"
#include "common/reference.hpp"
#include "int8/linear.hpp"

namespace sparsecomp::int8 {
namespace {

// x - zero point as integers, and their scale.
float round_row(const LinearCall& call, int64_t column, int64_t count, std::vector<int>* integers) {
  bool finite = true;
  float smallest = 0, largest = 0;
  const auto number = [&](int64_t i) { return load_number(call.x, column * call.ldx + i, call.dtype); };
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(number(i));
    smallest = std::min(smallest, number(i));
    largest = std::max(largest, number(i));
  }
  const RoundedRow row = rounding_of(finite, smallest, largest);
  integers->resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int rounded = finite ? static_cast<int>(std::nearbyint(number(i) * inverse_of(row))) : 0;
    const int stored = std::clamp(rounded + row.zero_point, -kLargest, kLargest);
    (*integers)[static_cast<size_t>(i)] = stored - row.zero_point;
  }
  return row.scale;
}

}  // namespace

void reference_linear(const Geometry& g, const LinearCall& call) {
  std::vector<std::vector<int>> x(static_cast<size_t>(call.batch));
  std::vector<float> x_scales(x.size());
  for (size_t column = 0; column < x.size(); ++column)
    x_scales[column] = round_row(call, static_cast<int64_t>(column), g.in, &x[column]);
  parallel_for(call.threads, g.tiles, [&](int64_t tile) {
    const int64_t rows = std::min<int64_t>(kTile, g.out - tile * kTile);
    // tile_to_dense writes where the whole weight would have the tile
    std::vector<int8_t> dense(static_cast<size_t>(rows * g.in));
    tile_to_dense(g, tile, call.values, call.metadata, dense.data() - tile * kTile * g.in);
    for (int64_t r = 0; r < rows; ++r) {
      for (size_t column = 0; column < x.size(); ++column) {
        int64_t sum = 0;
        for (int64_t i = 0; i < g.in; ++i)
          sum += int64_t{dense[static_cast<size_t>(r * g.in + i)]} * x[column][static_cast<size_t>(i)];
        reference_finish(call, static_cast<float>(sum) * x_scales[column], tile * kTile + r,
                         static_cast<int64_t>(column));
      }
    }
  });
}

}  // namespace sparsecomp::int8
