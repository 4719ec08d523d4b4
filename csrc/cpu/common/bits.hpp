// Streams of bits in bytes, least significant bit first: how the canonical form stores positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the canonical metadata is read as little-endian words"
#endif

namespace sparsecomp {

static inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// The positions of one row and step as one integer; 16 positions of 4 bits are the most there can be. A step starts at
// most 7 - (bits of the step) % 8 bits into a byte, so 8 bytes always reach its end.
static inline uint64_t load_bits(const uint8_t* row, int64_t row_bytes, int64_t first_bit) {
  const int64_t byte = first_bit / 8;
  uint64_t bits = 0;
  if (byte < row_bytes) std::memcpy(&bits, row + byte, static_cast<size_t>(std::min<int64_t>(8, row_bytes - byte)));
  return bits >> (first_bit % 8);
}

static inline void or_bits(uint8_t* row, int64_t row_bytes, int64_t first_bit, uint64_t bits) {
  const int64_t byte = first_bit / 8;
  if (byte >= row_bytes) return;
  const auto size = static_cast<size_t>(std::min<int64_t>(8, row_bytes - byte));
  uint64_t old = 0;
  std::memcpy(&old, row + byte, size);
  old |= bits << (first_bit % 8);
  std::memcpy(row + byte, &old, size);
}

// Bits of one position in a group of M.
static inline int position_bits(int m) { return m == 16 ? 4 : m == 8 ? 3 : m == 4 ? 2 : 1; }

}  // namespace sparsecomp
