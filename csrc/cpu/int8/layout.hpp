// The kernel layout of an int8 N:M weight that is multiplied with int8 activations: its geometry, and conversion from
// and to the canonical form. Takes and gives raw bytes; knows nothing of instruction sets or threads.
//
// One layout serves every instruction set and every batch size. It lives in memory only and is never saved.
//
//   tile   16 consecutive rows (output features); the last tile is padded with rows of zeros
//   step   16 consecutive columns (input features): as many bytes of activations as one byte shuffle reads
//   word   4 kept weights of a row in a step, what one lane of 32 bits multiplies and adds. A row has
//          W = ceil(4 N / M) words in every step, the last one padded with zeros
//   round  one step, or two where W is odd, so that words come in pairs
//
// Values: for tile, for round, int8 [words of the round][16 rows][4]. After them, for tile, int32 [16]: the sums of the
// rows, which undo the zero points of activations. After them, for tile, a byte: 1 if the pairs are narrow, see below.
//
// Metadata: for tile, for round, a byte for every two weights [words of the round / 2][16 rows][4]: in the low half the
// column within the step of a weight of the even word, in the high half that of the odd word. Columns have 4 bits
// whatever M is. Where N = M nothing is stored: word w holds columns 4 w to 4 w + 3.
//
// The weights of a row and step are sorted, and the smallest stands beside the largest, the next smallest beside the
// next largest, and so on: two neighbours times two activations of 0 to 255 then nearly always fit 16 bits, which is
// all that instruction sets before VNNI add them in. A tile in which they always do has narrow pairs.
#pragma once

#include <cstdint>

#include "sparsecomp.h"

namespace sparsecomp::int8 {

constexpr int kTile = 16;
constexpr int kStep = 16;
constexpr int kWordWeights = 4;
constexpr int kMostWords = kStep / kWordWeights;
// Most kept weights of a row: 65536 * 255 * 128 is below 2^31.
constexpr int64_t kMostKept = 1 << 16;
// Two weights whose positive parts, and whose negative parts, sum to no more: 128 * 255 is below 2^15.
constexpr int kNarrowPair = 128;

struct Geometry {
  int64_t out, in;
  int64_t tiles, rounds;
  int64_t columns;  // padded to whole rounds. No function: kernels read it, and may define nothing for others to link
  int n, m, mask_rows;
  bool dense;              // N = M
  int slots;               // per row and step
  int words;               // likewise
  int round_steps;         // 1 or 2
  int64_t value_bytes;     // of one (tile, round) block
  int64_t metadata_bytes;  // of one (tile, round) block

  int64_t canonical_slots() const { return (in + m - 1) / m * n; }
  int64_t blocks_bytes() const { return tiles * rounds * value_bytes; }
  int64_t values_bytes() const { return blocks_bytes() + tiles * (kTile * 4 + 1); }
};

// False if the description is not valid, or a row keeps more than kMostKept weights.
bool make_geometry(const sparsecomp_nm& weight, Geometry* geometry);

// Sums of the rows of a tile, and whether its pairs are narrow.
const int32_t* row_sums(const Geometry& g, const uint8_t* values, int64_t tile);
bool narrow_pairs(const Geometry& g, const uint8_t* values, int64_t tile);

// One tile of rows. `values` and `metadata` are those of the whole weight.
void pack_tile(const Geometry& g, int64_t tile, const int8_t* canonical_values, const uint8_t* canonical_metadata,
               uint8_t* values, uint8_t* metadata);
void unpack_tile(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata,
                 int8_t* canonical_values, uint8_t* canonical_metadata);
void tile_to_dense(const Geometry& g, int64_t tile, const uint8_t* values, const uint8_t* metadata, int8_t* dense);

}  // namespace sparsecomp::int8
