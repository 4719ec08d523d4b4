// What the kernels of AVX2 that permute share: the positions of a step, and weights of every type as floats.
// Included by files that are compiled for AVX2 only.
#pragma once

#include <immintrin.h>

#include "common/unroll.hpp"
#include "nm/layout.hpp"
#include "nm/permute.hpp"

namespace sparsecomp {
namespace {

constexpr int kLanes = 8;
constexpr int kHalves = kTile / kLanes;

SPARSECOMP_INLINE __m128i load_128(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
SPARSECOMP_INLINE __m256i load_256(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// In-group positions of rows 8 * half to 8 * half + 7: index word `word` of a metadata block that has `full_words` and
// then `rest_bytes` for each row.
SPARSECOMP_INLINE __m256i load_index_word(const uint8_t* block, int word, int half, int full_words, int rest_bytes) {
  const uint8_t* plane = block + word * kTile * 4;
  if (word < full_words || rest_bytes == 4) return load_256(plane + half * 32);
  const auto bytes = [&](const uint8_t* from) __attribute__((always_inline)) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + half * 8)));
  };
  if (rest_bytes == 1) return bytes(plane);
  const __m256i low = _mm256_cvtepu16_epi32(load_128(plane + half * 16));
  if (rest_bytes == 2) return low;
  return _mm256_or_si256(low, _mm256_slli_epi32(bytes(plane + kTile * 2), 16));
}

// Weights of one type: the bytes of a step, and as floats half a tile of one slot, or of slots 2 * pair and 2 * pair +
// 1, of which 16-bit types hold both in a lane.
struct ValuesF32 {
  static constexpr int bytes(int slots) { return slots * kTile * 4; }
  SPARSECOMP_INLINE static __m256 load(const uint8_t* block, int slot, int half) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(block + slot * kTile * 4 + half * 32));
  }
  SPARSECOMP_INLINE static void load_pair(const uint8_t* block, int pair, int half, __m256 (&to)[2]) {
    to[0] = load(block, 2 * pair, half);
    to[1] = load(block, 2 * pair + 1, half);
  }
};

struct ValuesI8 {
  static constexpr int bytes(int slots) { return slots * kTile; }
  SPARSECOMP_INLINE static __m256 load(const uint8_t* block, int slot, int half) {
    const uint8_t* from = block + slot * kTile + half * kLanes;
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  SPARSECOMP_INLINE static void load_pair(const uint8_t* block, int pair, int half, __m256 (&to)[2]) {
    to[0] = load(block, 2 * pair, half);
    to[1] = load(block, 2 * pair + 1, half);
  }
};

struct ValuesBf16 {
  static constexpr int bytes(int slots) { return (slots + 1) / 2 * kTile * 4; }
  SPARSECOMP_INLINE static void load_pair(const uint8_t* block, int pair, int half, __m256 (&to)[2]) {
    const __m256i raw = load_256(block + pair * kTile * 4 + half * 32);
    to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
    to[1] = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(~0xffff)));
  }
  SPARSECOMP_INLINE static __m256 load(const uint8_t* block, int slot, int half) {
    __m256 both[2];
    load_pair(block, slot / 2, half, both);
    return slot % 2 ? both[1] : both[0];
  }
};

// Rows 0, 1, 4, 5 are widened together, and 2, 3, 6, 7: then slots are taken apart within 128 bits.
struct ValuesF16 {
  static constexpr int bytes(int slots) { return (slots + 1) / 2 * kTile * 4; }
  SPARSECOMP_INLINE static void load_pair(const uint8_t* block, int pair, int half, __m256 (&to)[2]) {
    const uint8_t* from = block + pair * kTile * 4 + half * 32;
    const __m128i first = load_128(from), last = load_128(from + 16);
    const __m256 outer = _mm256_cvtph_ps(_mm_unpacklo_epi64(first, last));
    const __m256 inner = _mm256_cvtph_ps(_mm_unpackhi_epi64(first, last));
    to[0] = _mm256_shuffle_ps(outer, inner, 0x88);
    to[1] = _mm256_shuffle_ps(outer, inner, 0xdd);
  }
  SPARSECOMP_INLINE static __m256 load(const uint8_t* block, int slot, int half) {
    __m256 both[2];
    load_pair(block, slot / 2, half, both);
    return slot % 2 ? both[1] : both[0];
  }
};

// A step of values as float [slots][16].
template <class Values>
void widen_step_of(const uint8_t* values, int slots, float* to) {
  const auto store = [&](int slot, int half, __m256 v)
                         __attribute__((always_inline)) { _mm256_storeu_ps(to + slot * kTile + half * kLanes, v); };
  for (int pair = 0; pair < slots / 2; ++pair) {
    SPARSECOMP_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      __m256 both[2];
      Values::load_pair(values, pair, half, both);
      store(2 * pair, half, both[0]);
      store(2 * pair + 1, half, both[1]);
    }
  }
  if (slots % 2 == 0) return;
  for (int half = 0; half < kHalves; ++half) store(slots - 1, half, Values::load(values, slots - 1, half));
}

inline void widen_step(const uint8_t* values, int dtype, int slots, float* to) {
  if (dtype == SPARSECOMP_I8) return widen_step_of<ValuesI8>(values, slots, to);
  if (dtype == SPARSECOMP_F16) return widen_step_of<ValuesF16>(values, slots, to);
  widen_step_of<ValuesBf16>(values, slots, to);
}

// Of fp16, whose widening is as much work as two multiply-adds and permutes. bf16 and int8 are faster in registers,
// however many calls widen them again.
constexpr PermuteSet with_floats(PermuteSet set, const PermuteSet* of_floats) {
  set.of_floats = of_floats;
  set.widen = widen_step;
  return set;
}

}  // namespace
}  // namespace sparsecomp
