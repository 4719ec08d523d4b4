// Rounding of activations on AVX2. Included by files of AVX2 and of AVX-VNNI; everything here is local to them.
#pragma once

#include <immintrin.h>

#include "common/unroll.hpp"
#include "int8/linear.hpp"

namespace sparsecomp::int8 {
namespace {

constexpr int kFloats = 8;

bool range(const float* x, int64_t count, float* smallest, float* largest) {
  constexpr int kChains = 4;
  __m256 low[kChains], high[kChains], finite[kChains];
  SPARSECOMP_UNROLL
  for (int c = 0; c < kChains; ++c) low[c] = high[c] = finite[c] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + kChains * kFloats <= count; i += kChains * kFloats) {
    SPARSECOMP_UNROLL
    for (int c = 0; c < kChains; ++c) {
      const __m256 v = _mm256_loadu_ps(x + i + c * kFloats);
      low[c] = _mm256_min_ps(v, low[c]);
      high[c] = _mm256_max_ps(v, high[c]);
      finite[c] = _mm256_fmadd_ps(v, _mm256_setzero_ps(), finite[c]);  // NaN from the first Inf or NaN on
    }
  }
  float lows[kFloats], highs[kFloats], sums[kFloats];
  _mm256_storeu_ps(lows, _mm256_min_ps(_mm256_min_ps(low[0], low[1]), _mm256_min_ps(low[2], low[3])));
  _mm256_storeu_ps(highs, _mm256_max_ps(_mm256_max_ps(high[0], high[1]), _mm256_max_ps(high[2], high[3])));
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_add_ps(finite[0], finite[1]), _mm256_add_ps(finite[2], finite[3])));
  float rest = 0;
  *smallest = *largest = 0;
  for (int lane = 0; lane < kFloats; ++lane) {
    *smallest = lows[lane] < *smallest ? lows[lane] : *smallest;
    *largest = highs[lane] > *largest ? highs[lane] : *largest;
    rest += sums[lane];
  }
  for (; i < count; ++i) {
    *smallest = x[i] < *smallest ? x[i] : *smallest;
    *largest = x[i] > *largest ? x[i] : *largest;
    rest += x[i] * 0.0f;
  }
  return rest == 0.0f;
}

void round(const float* x, int64_t count, float inverse, int zero_point, const MicroSet& set, uint8_t* to) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(zero_point)), least = _mm256_set1_epi8(-kLargest);
  const __m256i flip = _mm256_set1_epi8(set.signed_x ? 0 : -128);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // the packs below go lane by lane
  const auto integers = [&](const float* from) __attribute__((always_inline)) {
    __m256i part[4];
    SPARSECOMP_UNROLL
    for (int c = 0; c < 4; ++c)
      part[c] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + c * kFloats), factor));
    const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(part[0], part[1]), zero);
    const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(part[2], part[3]), zero);
    const __m256i bytes = _mm256_max_epi8(_mm256_packs_epi16(low, high), least);
    return _mm256_xor_si256(_mm256_permutevar8x32_epi32(bytes, order), flip);
  };
  int64_t i = 0;
  for (; i + 4 * kFloats <= count; i += 4 * kFloats)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), integers(x + i));
  if (i < count) {
    float numbers[4 * kFloats] = {};
    for (int64_t j = i; j < count; ++j) numbers[j - i] = x[j];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), integers(numbers));
  }
}

}  // namespace
}  // namespace sparsecomp::int8
