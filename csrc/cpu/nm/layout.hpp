// The kernel layout of an N:M weight: its geometry, and conversion from and to the canonical form.
// Takes and gives raw bytes; knows nothing of instruction sets or threads.
//
// One layout serves every instruction set and every batch size. It lives in memory only and is never saved.
//
//   tile   16 consecutive rows (output features); the last tile is padded with rows of zeros
//   step   16 consecutive columns (input features); the last step is padded with columns of zeros
//   slot   one kept weight of a row in a step. A row has S = 16 * N / M slots in every step; slot s belongs to group
//          s / N of the step, whose columns start at M * (s / N)
//
// Values: for tile, for step (both ascending), one block of
//   4-byte types   [S][16 rows]
//   2-byte types   [ceil(S / 2)][16 rows][2 slots], so that one 32-bit lane per row holds slots 2p and 2p + 1
//                  (for odd S the last one is zero)
//   1-byte types   [S][16 rows]
//
// Metadata: for tile, for step, one block of in-group positions, b = ceil(log2 M) bits each. The positions of a row are
// cut into 32-bit index words of floor(32 / b) slots, slot order, least significant bits first, so no position
// straddles two words and at most two words exist. A block holds, for 16 rows each,
//   every full word          uint32 [16]
//   the bytes the rest need  0: nothing; 1: uint8 [16]; 2: uint16 [16]; 3: uint16 [16] then uint8 [16] (bits 16 to 23);
//                            4: uint32 [16]
// For 2:4 that is uint16 [16] and for 8:16 uint32 [16]: not a bit more than the canonical form.
//
// A mask that several rows share (mask_rows > 1) is written out for every row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/numbers.hpp"
#include "sparsecomp.h"

namespace sparsecomp {

constexpr int kTile = 16;
constexpr int kStep = 16;

struct Geometry {
  int64_t out, in;
  int64_t tiles, steps;
  int n, m, mask_rows, dtype;
  int bits;                // of one in-group position
  int mask;                // 2^bits - 1
  int slots;               // per row and step
  int word_slots;          // slots in a full index word
  int words;               // index words per row and step
  int full_words;          // of these
  int rest_bytes;          // bytes of the last, partial index word; 0 if every word is full
  int64_t value_bytes;     // of one (tile, step) block
  int64_t metadata_bytes;  // of one (tile, step) block

  int64_t canonical_slots() const { return (in + m - 1) / m * n; }
  int64_t canonical_metadata_bytes() const { return (canonical_slots() * bits + 7) / 8; }
};

// What a Geometry says of a step, where the compiler knows M and N. With N = 0 it knows the bits only.
template <int M, int N>
struct StepGeometry {
  static constexpr bool kStatic = N != 0;
  static constexpr int kBits = M == 16 ? 4 : M == 8 ? 3 : M == 4 ? 2 : 1;
  static constexpr int kSlots = kStep / M * N;
  static constexpr int kWordSlots = 32 / kBits;
  static constexpr int kFullWords = kSlots / kWordSlots;
  static constexpr int kRestBytes = (kSlots % kWordSlots * kBits + 7) / 8;
  static constexpr int kMetadataBytes = (kFullWords * 4 + kRestBytes) * kTile;
};

// False if the description is not valid.
bool make_geometry(const sparsecomp_nm& weight, Geometry* geometry);

// Byte offset of the value of (slot, row) in a block.
static inline int64_t value_offset(const Geometry& g, int slot, int row) {
  switch (element_bytes(g.dtype)) {
    case 4:
      return (int64_t{slot} * kTile + row) * 4;
    case 2:
      return (int64_t{slot / 2} * kTile + row) * 4 + slot % 2 * 2;
    default:
      return int64_t{slot} * kTile + row;
  }
}

// Index word `word` of a row in a metadata block.
uint32_t load_word(const Geometry& g, const uint8_t* block, int word, int row);

// Column within the step of each of the row's slots.
void row_columns(const Geometry& g, const uint8_t* metadata_block, int row, int columns[kStep]);

void pack_tile(const Geometry& g, int64_t tile, const uint8_t* canonical_values, const uint8_t* canonical_metadata,
               uint8_t* values, uint8_t* metadata);
void unpack_tile(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata,
                 uint8_t* canonical_values, uint8_t* canonical_metadata);
void tile_to_dense(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata, uint8_t* dense);

}  // namespace sparsecomp
