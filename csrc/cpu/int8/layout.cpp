#include "int8/layout.hpp"

#include <algorithm>
#include <cstring>

#include "common/bits.hpp"
#include "common/description.hpp"

namespace sparsecomp::int8 {
namespace {

struct Weight {
  int value;
  int column;  // in the step
};

// The weights of a row and step, in the order in which the layout stores them.
struct StepRow {
  Weight weights[kStep];
  int count;  // 4 for each word
};

// The weights that the canonical form keeps in a row and step; fewer than the slots where the columns end.
int kept_weights(const Geometry& g, int64_t row, int64_t step, const int8_t* values, const uint8_t* metadata,
                 Weight* found) {
  const int64_t row_slots = g.canonical_slots(), first = step * g.slots;
  const int count = static_cast<int>(std::clamp<int64_t>(row_slots - first, 0, g.slots));
  const int bits = position_bits(g.m);
  const int64_t row_bytes = (row_slots * bits + 7) / 8;
  uint64_t positions =
      g.dense || count == 0 ? 0 : load_bits(metadata + row / g.mask_rows * row_bytes, row_bytes, first * bits);
  for (int slot = 0; slot < count; ++slot, positions >>= bits) {
    const int position = g.dense ? slot % g.m : static_cast<int>(positions & low_bits(bits));
    found[slot] = {values[row * row_slots + first + slot], slot / g.n * g.m + position};
  }
  return count;
}

// Padding repeats the first column, with weight 0, so that the columns alone tell what is kept.
StepRow in_order(const Geometry& g, const Weight* kept, int count) {
  StepRow row;
  row.count = g.words * kWordWeights;
  if (g.dense) {
    for (int i = 0; i < row.count; ++i) row.weights[i] = i < count ? kept[i] : Weight{0, i};
    return row;
  }
  Weight sorted[kStep];
  for (int i = 0; i < row.count; ++i) sorted[i] = i < count ? kept[i] : Weight{0, kept[0].column};
  std::sort(sorted, sorted + row.count, [](const Weight& a, const Weight& b) {
    return a.value != b.value ? a.value < b.value : a.column < b.column;
  });
  for (int i = 0; i < row.count; i += 2) {
    row.weights[i] = sorted[i / 2];
    row.weights[i + 1] = sorted[row.count - 1 - i / 2];
  }
  return row;
}

bool is_narrow(const StepRow& row) {
  for (int i = 0; i < row.count; i += 2) {
    const int a = row.weights[i].value, b = row.weights[i + 1].value;
    if (std::max(a, 0) + std::max(b, 0) > kNarrowPair || std::max(-a, 0) + std::max(-b, 0) > kNarrowPair) return false;
  }
  return true;
}

// Where weight i of a row and step lies in the blocks of its round.
struct Place {
  int64_t value, position;
  int shift;  // of the position
};

Place place_of(const Geometry& g, int64_t step, int row, int i) {
  const int word = static_cast<int>(step % g.round_steps) * g.words + i / kWordWeights;
  const int lane = row * kWordWeights + i % kWordWeights;
  return {int64_t{word} * kTile * kWordWeights + lane, int64_t{word} / 2 * kTile * kWordWeights + lane, word % 2 * 4};
}

template <class Byte>
auto at_round(const Geometry& g, Byte* values, Byte* metadata, int64_t tile, int64_t step) {
  struct {
    Byte *values, *metadata;
  } found = {values + (tile * g.rounds + step / g.round_steps) * g.value_bytes,
             metadata + (tile * g.rounds + step / g.round_steps) * g.metadata_bytes};
  return found;
}

// The weights of a row and step of the layout, by column, each column once: what `kept_weights` gave. Metadata that no
// canonical form gives may name fewer columns than there are slots; the rest are 0 then.
void stored_weights(const Geometry& g, int64_t tile, int64_t step, int row, const uint8_t* values,
                    const uint8_t* metadata, int weights[kStep], int columns[kStep]) {
  bool kept[kStep] = {};
  std::fill(weights, weights + kStep, 0);
  std::fill(columns, columns + kStep, 0);
  const auto block = at_round(g, values, metadata, tile, step);
  for (int i = 0; i < g.words * kWordWeights; ++i) {
    const Place place = place_of(g, step, row, i);
    const int column = g.dense ? i : block.metadata[place.position] >> place.shift & 15;
    kept[column] = true;
    weights[column] += static_cast<int8_t>(block.values[place.value]);
  }
  int count = 0;
  for (int column = 0; column < kStep; ++column)
    if (kept[column]) columns[count++] = column;
}

int64_t step_count(const Geometry& g) { return (g.in + kStep - 1) / kStep; }

}  // namespace

bool make_geometry(const sparsecomp_nm& weight, Geometry* geometry) {
  Geometry& g = *geometry;
  g.out = weight.out_features;
  g.in = weight.in_features;
  g.n = weight.n;
  g.m = weight.m;
  g.mask_rows = weight.mask_rows;
  if (!known_nm(weight)) return false;
  if (g.canonical_slots() > kMostKept) return false;

  g.dense = g.n == g.m;
  g.slots = kStep / g.m * g.n;
  g.words = (g.slots + kWordWeights - 1) / kWordWeights;
  g.round_steps = g.words % 2 ? 2 : 1;
  g.tiles = (g.out + kTile - 1) / kTile;
  g.rounds = (step_count(g) + g.round_steps - 1) / g.round_steps;
  g.columns = g.rounds * g.round_steps * kStep;
  if (g.tiles * g.rounds >= kMostBlocks) return false;
  const int64_t round_words = int64_t{g.round_steps} * g.words;
  g.value_bytes = round_words * kTile * kWordWeights;
  g.metadata_bytes = g.dense ? 0 : g.value_bytes / 2;
  return true;
}

const int32_t* row_sums(const Geometry& g, const uint8_t* values, int64_t tile) {
  return reinterpret_cast<const int32_t*>(values + g.blocks_bytes()) + tile * kTile;
}

bool narrow_pairs(const Geometry& g, const uint8_t* values, int64_t tile) {
  return values[g.blocks_bytes() + g.tiles * kTile * 4 + tile] != 0;
}

void pack_tile(const Geometry& g, int64_t tile, const int8_t* canonical_values, const uint8_t* canonical_metadata,
               uint8_t* values, uint8_t* metadata) {
  const auto tile_start = at_round(g, values, metadata, tile, 0);
  std::memset(tile_start.values, 0, static_cast<size_t>(g.rounds * g.value_bytes));
  std::memset(tile_start.metadata, 0, static_cast<size_t>(g.rounds * g.metadata_bytes));
  int32_t sums[kTile] = {};
  bool narrow = true;
  const int rows = static_cast<int>(std::min<int64_t>(kTile, g.out - tile * kTile));
  for (int64_t step = 0; step < step_count(g); ++step) {
    const auto block = at_round(g, values, metadata, tile, step);
    for (int r = 0; r < rows; ++r) {
      Weight kept[kStep] = {};
      const int count = kept_weights(g, tile * kTile + r, step, canonical_values, canonical_metadata, kept);
      const StepRow row = in_order(g, kept, count);
      narrow = narrow && is_narrow(row);
      for (int i = 0; i < row.count; ++i) {
        const Place place = place_of(g, step, r, i);
        sums[r] += row.weights[i].value;
        block.values[place.value] = static_cast<uint8_t>(row.weights[i].value);
        if (!g.dense) block.metadata[place.position] |= static_cast<uint8_t>(row.weights[i].column << place.shift);
      }
    }
  }
  std::memcpy(values + g.blocks_bytes() + tile * sizeof sums, sums, sizeof sums);
  values[g.blocks_bytes() + g.tiles * sizeof sums + tile] = narrow;
}

void unpack_tile(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata,
                 int8_t* canonical_values, uint8_t* canonical_metadata) {
  const int64_t row_slots = g.canonical_slots();
  const int bits = position_bits(g.m);
  const int64_t row_bytes = (row_slots * bits + 7) / 8;
  const int rows = static_cast<int>(std::min<int64_t>(kTile, g.out - tile * kTile));
  for (int r = 0; r < rows; ++r) {
    const int64_t row = tile * kTile + r;
    const bool named = !g.dense && row % g.mask_rows == 0;
    uint8_t* metadata_row = named ? canonical_metadata + row / g.mask_rows * row_bytes : nullptr;
    if (metadata_row) std::memset(metadata_row, 0, static_cast<size_t>(row_bytes));
    for (int64_t step = 0; step < step_count(g); ++step) {
      int weights[kStep], columns[kStep];
      stored_weights(g, tile, step, r, values, metadata, weights, columns);
      const int64_t first = step * g.slots;
      const int count = static_cast<int>(std::min<int64_t>(g.slots, row_slots - first));
      uint64_t positions = 0;
      for (int slot = 0; slot < count; ++slot) {
        canonical_values[row * row_slots + first + slot] = static_cast<int8_t>(weights[columns[slot]]);
        positions |= static_cast<uint64_t>(columns[slot] % g.m) << (slot * bits);
      }
      if (metadata_row) or_bits(metadata_row, row_bytes, first * bits, positions);
    }
  }
}

void tile_to_dense(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata, int8_t* dense) {
  const int rows = static_cast<int>(std::min<int64_t>(kTile, g.out - tile * kTile));
  for (int r = 0; r < rows; ++r) {
    int8_t* row = dense + (tile * kTile + r) * g.in;
    for (int64_t step = 0; step < step_count(g); ++step) {
      int weights[kStep], columns[kStep];
      stored_weights(g, tile, step, r, values, metadata, weights, columns);
      const int64_t left = std::min<int64_t>(kStep, g.in - step * kStep);
      for (int64_t column = 0; column < left; ++column)
        row[step * kStep + column] = static_cast<int8_t>(weights[column]);
    }
  }
}

}  // namespace sparsecomp::int8
