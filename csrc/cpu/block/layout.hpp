// The kernel layout of a block-sparse weight: its geometry, and conversion from and to the canonical form.
// Takes and gives raw bytes; knows nothing of instruction sets.
//
// One layout serves every instruction set and every batch size. It lives in memory only and is never saved.
//
//   strip   lane_rows consecutive rows of a block row; the last strip of a block row may be padded with rows of zeros
//   vector  16 weights: lane_rows rows by lane_cols columns of a strip, row by row. lane_rows * lane_cols = 16 is
//           chosen so that blocks are cut into vectors with the least padding; a tie goes to more rows, which need no
//           sum across lanes
//
// Values: for block row, for strip, for kept block (ascending column), for group of lane_cols columns: one vector. A
// strip of a block row is one stream of weights. Blocks whose sides are multiples of the vector's are stored without
// padding: the canonical values in another order.
//
// Metadata: int64 [block rows + 1], the kept blocks before each block row; then the canonical bitmap as it is.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/numbers.hpp"
#include "sparsecomp.h"

namespace sparsecomp {

constexpr int kLanes = 16;

struct BlockGeometry {
  int64_t out, in, rows, cols, kept;
  int dtype;
  int64_t down, across;  // blocks down and across the weight
  int shape;             // log2 of lane_rows
  int lane_rows, lane_cols;
  int64_t strips, groups;  // of a block: strips down, vectors across
  int64_t bitmap_bytes;    // of one block row

  int64_t padded_cols() const { return groups * lane_cols; }
  int64_t vector_bytes() const { return int64_t{kLanes} * element_bytes(dtype); }
  int64_t block_bytes() const { return strips * groups * vector_bytes(); }
  int64_t values_bytes() const { return kept * block_bytes(); }
  int64_t metadata_bytes() const { return (down + 1) * 8 + down * bitmap_bytes; }
};

constexpr int kLaneShapes = 5;  // 1x16, 2x8, 4x4, 8x2, 16x1

// False if the description is not valid.
bool make_block_geometry(const sparsecomp_block& weight, BlockGeometry* geometry);

// Kept blocks before a block row, as the metadata says.
int64_t block_row_start(const uint8_t* metadata, int64_t block_row);

// Writes the columns of the kept blocks of a bitmap row, at most `most` of them; their number, or -1 if the bitmap
// names more, or columns that do not exist.
int64_t kept_columns(const BlockGeometry& g, const uint8_t* bitmap_row, int64_t most, int32_t* columns);

// The kept columns of a block row of the layout; -1 if its metadata is damaged.
int64_t layout_columns(const BlockGeometry& g, const uint8_t* metadata, int64_t block_row, int32_t* columns);

// Canonical values [kept, rows, cols] and bitmap <-> layout. False if the bitmap does not name `kept` blocks.
bool pack_blocks(const BlockGeometry& g, const uint8_t* canonical_values, const uint8_t* bitmap, uint8_t* values,
                 uint8_t* metadata);
bool unpack_blocks(const BlockGeometry& g, const uint8_t* values, const uint8_t* metadata, uint8_t* canonical_values,
                   uint8_t* bitmap);
bool blocks_to_dense(const BlockGeometry& g, const uint8_t* values, const uint8_t* metadata, uint8_t* dense,
                     int threads);

}  // namespace sparsecomp
