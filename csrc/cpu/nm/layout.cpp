#include "nm/layout.hpp"

#include <algorithm>
#include <cstring>

#include "common/bits.hpp"
#include "common/description.hpp"

namespace sparsecomp {
namespace {

void store_word(const Geometry& g, uint8_t* block, int word, int row, uint32_t value) {
  uint8_t* plane = block + word * kTile * 4;
  if (word < g.full_words || g.rest_bytes == 4) {
    std::memcpy(plane + row * 4, &value, 4);
  } else if (g.rest_bytes == 1) {
    plane[row] = static_cast<uint8_t>(value);
  } else {
    std::memcpy(plane + row * 2, &value, 2);
    if (g.rest_bytes == 3) plane[kTile * 2 + row] = static_cast<uint8_t>(value >> 16);
  }
}

// Positions 0..N-1 in every group: what padding holds, a valid row that multiplies zeros.
uint64_t padding_bits(const Geometry& g) {
  uint64_t bits = 0;
  for (int slot = 0; slot < g.slots; ++slot) bits |= uint64_t(slot % g.n) << (slot * g.bits);
  return bits;
}

template <class T>
void move_values_in(const Geometry& g, const T* canonical, int slots, uint8_t* block, int row) {
  for (int slot = 0; slot < slots; ++slot) std::memcpy(block + value_offset(g, slot, row), canonical + slot, sizeof(T));
}

template <class T>
void move_values_out(const Geometry& g, const uint8_t* block, int row, int slots, T* canonical) {
  for (int slot = 0; slot < slots; ++slot) std::memcpy(canonical + slot, block + value_offset(g, slot, row), sizeof(T));
}

template <class T>
void pack_tile_as(const Geometry& g, int64_t tile, const T* canonical_values, const uint8_t* canonical_metadata,
                  uint8_t* values, uint8_t* metadata) {
  const int64_t row_slots = g.canonical_slots();
  const int64_t row_bytes = g.canonical_metadata_bytes();
  const uint64_t padding = padding_bits(g);
  std::memset(values, 0, static_cast<size_t>(g.steps * g.value_bytes));
  for (int64_t step = 0; step < g.steps; ++step) {
    uint8_t* value_block = values + step * g.value_bytes;
    uint8_t* metadata_block = metadata + step * g.metadata_bytes;
    const int64_t first = step * g.slots;
    const int slots = static_cast<int>(std::min<int64_t>(g.slots, row_slots - first));
    const uint64_t valid = low_bits(int64_t{slots} * g.bits);
    for (int r = 0; r < kTile; ++r) {
      const int64_t row = tile * kTile + r;
      uint64_t bits = padding;
      if (row < g.out) {
        move_values_in(g, canonical_values + row * row_slots + first, slots, value_block, r);
        const uint64_t read = load_bits(canonical_metadata + row / g.mask_rows * row_bytes, row_bytes, first * g.bits);
        bits = (read & valid) | (padding & ~valid);
      }
      for (int word = 0; word < g.words; ++word) {
        const int shift = word * g.word_slots * g.bits;
        store_word(g, metadata_block, word, r,
                   static_cast<uint32_t>((bits >> shift) & low_bits(g.word_slots * g.bits)));
      }
    }
  }
}

template <class T>
void unpack_tile_as(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata,
                    T* canonical_values, uint8_t* canonical_metadata) {
  const int64_t row_slots = g.canonical_slots();
  const int64_t row_bytes = g.canonical_metadata_bytes();
  const int rows = static_cast<int>(std::min<int64_t>(kTile, g.out - tile * kTile));
  for (int r = 0; r < rows; ++r) {
    const int64_t row = tile * kTile + r;
    uint8_t* metadata_row = row % g.mask_rows == 0 ? canonical_metadata + row / g.mask_rows * row_bytes : nullptr;
    if (metadata_row) std::memset(metadata_row, 0, static_cast<size_t>(row_bytes));
    for (int64_t step = 0; step < g.steps; ++step) {
      const int64_t first = step * g.slots;
      const int slots = static_cast<int>(std::min<int64_t>(g.slots, row_slots - first));
      move_values_out(g, values + step * g.value_bytes, r, slots, canonical_values + row * row_slots + first);
      if (!metadata_row) continue;
      uint64_t bits = 0;
      for (int word = 0; word < g.words; ++word)
        bits |= uint64_t{load_word(g, metadata + step * g.metadata_bytes, word, r)} << (word * g.word_slots * g.bits);
      or_bits(metadata_row, row_bytes, first * g.bits, bits & low_bits(int64_t{slots} * g.bits));
    }
  }
}

template <class T>
void tile_to_dense_as(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata, T* dense) {
  const int rows = static_cast<int>(std::min<int64_t>(kTile, g.out - tile * kTile));
  T* first = dense + tile * kTile * g.in;
  std::memset(first, 0, static_cast<size_t>(rows * g.in) * sizeof(T));
  for (int64_t step = 0; step < g.steps; ++step) {
    for (int r = 0; r < rows; ++r) {
      int columns[kStep];
      row_columns(g, metadata + step * g.metadata_bytes, r, columns);
      for (int slot = 0; slot < g.slots; ++slot) {
        const int64_t column = step * kStep + columns[slot];
        if (column < g.in)
          std::memcpy(first + r * g.in + column, values + step * g.value_bytes + value_offset(g, slot, r), sizeof(T));
      }
    }
  }
}

}  // namespace

bool make_geometry(const sparsecomp_nm& weight, Geometry* geometry) {
  Geometry& g = *geometry;
  g.out = weight.out_features;
  g.in = weight.in_features;
  g.n = weight.n;
  g.m = weight.m;
  g.mask_rows = weight.mask_rows;
  g.dtype = weight.dtype;
  if (!known_nm(weight)) return false;
  if (g.dtype < SPARSECOMP_F32 || g.dtype > SPARSECOMP_I8) return false;

  g.tiles = (g.out + kTile - 1) / kTile;
  g.steps = (g.in + kStep - 1) / kStep;
  if (g.tiles * g.steps >= kMostBlocks) return false;
  g.bits = position_bits(g.m);
  g.mask = g.m - 1;
  g.slots = kStep / g.m * g.n;
  g.word_slots = 32 / g.bits;
  g.words = (g.slots + g.word_slots - 1) / g.word_slots;
  g.rest_bytes = (g.slots % g.word_slots * g.bits + 7) / 8;
  g.full_words = g.rest_bytes ? g.words - 1 : g.words;
  const int size = element_bytes(g.dtype);
  g.value_bytes = size == 2 ? int64_t{(g.slots + 1) / 2} * kTile * 4 : int64_t{g.slots} * kTile * size;
  g.metadata_bytes = (g.full_words * 4 + g.rest_bytes) * kTile;
  return true;
}

uint32_t load_word(const Geometry& g, const uint8_t* block, int word, int row) {
  const uint8_t* plane = block + word * kTile * 4;
  uint32_t value = 0;
  if (word < g.full_words || g.rest_bytes == 4) {
    std::memcpy(&value, plane + row * 4, 4);
  } else if (g.rest_bytes == 1) {
    value = plane[row];
  } else {
    std::memcpy(&value, plane + row * 2, 2);
    if (g.rest_bytes == 3) value |= uint32_t{plane[kTile * 2 + row]} << 16;
  }
  return value;
}

void row_columns(const Geometry& g, const uint8_t* metadata_block, int row, int columns[kStep]) {
  for (int word = 0, slot = 0; word < g.words; ++word) {
    uint32_t bits = load_word(g, metadata_block, word, row);
    for (int i = 0; i < g.word_slots && slot < g.slots; ++i, ++slot, bits >>= g.bits)
      columns[slot] = slot / g.n * g.m + static_cast<int>(bits & static_cast<uint32_t>(g.mask));
  }
}

void pack_tile(const Geometry& g, int64_t tile, const uint8_t* canonical_values, const uint8_t* canonical_metadata,
               uint8_t* values, uint8_t* metadata) {
  values += tile * g.steps * g.value_bytes;
  metadata += tile * g.steps * g.metadata_bytes;
  switch (element_bytes(g.dtype)) {
    case 4:
      return pack_tile_as(g, tile, reinterpret_cast<const uint32_t*>(canonical_values), canonical_metadata, values,
                          metadata);
    case 2:
      return pack_tile_as(g, tile, reinterpret_cast<const uint16_t*>(canonical_values), canonical_metadata, values,
                          metadata);
    default:
      return pack_tile_as(g, tile, canonical_values, canonical_metadata, values, metadata);
  }
}

void unpack_tile(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata,
                 uint8_t* canonical_values, uint8_t* canonical_metadata) {
  values += tile * g.steps * g.value_bytes;
  metadata += tile * g.steps * g.metadata_bytes;
  switch (element_bytes(g.dtype)) {
    case 4:
      return unpack_tile_as(g, tile, values, metadata, reinterpret_cast<uint32_t*>(canonical_values),
                            canonical_metadata);
    case 2:
      return unpack_tile_as(g, tile, values, metadata, reinterpret_cast<uint16_t*>(canonical_values),
                            canonical_metadata);
    default:
      return unpack_tile_as(g, tile, values, metadata, canonical_values, canonical_metadata);
  }
}

void tile_to_dense(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata, uint8_t* dense) {
  values += tile * g.steps * g.value_bytes;
  metadata += tile * g.steps * g.metadata_bytes;
  switch (element_bytes(g.dtype)) {
    case 4:
      return tile_to_dense_as(g, tile, values, metadata, reinterpret_cast<uint32_t*>(dense));
    case 2:
      return tile_to_dense_as(g, tile, values, metadata, reinterpret_cast<uint16_t*>(dense));
    default:
      return tile_to_dense_as(g, tile, values, metadata, dense);
  }
}

}  // namespace sparsecomp
