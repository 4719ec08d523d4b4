// Epilogue, widening and probes on AVX2 + FMA + F16C.
#include <immintrin.h>

#include "common/epilogue.hpp"
#include "common/isa.hpp"
#include "common/measure.hpp"
#include "common/numbers.hpp"
#include "common/unroll.hpp"

namespace sparsecomp {
namespace {

__m256 load_numbers(const void* from, int64_t index, int dtype) {
  if (dtype == SPARSECOMP_F32) return _mm256_loadu_ps(static_cast<const float*>(from) + index);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + index));
  if (dtype == SPARSECOMP_F16) return _mm256_cvtph_ps(raw);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// Rounds to nearest even; NaN stays NaN.
__m128i narrow(__m256 value, int dtype) {
  if (dtype == SPARSECOMP_F16) return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
}

// 8 fp32 lanes, as the epilogue wants them. There are no masks: what is left of a row passes through a small buffer.
struct Lanes {
  using Float = __m256;
  using Mask = int;
  static constexpr int kLanes = 8;

  static Float set(float value) { return _mm256_set1_ps(value); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Float round(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // in two steps: one factor of 2^-127 and less would not be a normal number
  static Float times_power_of_2(Float a, Float exponent) {
    const __m256i whole = _mm256_cvtps_epi32(exponent), half = _mm256_srai_epi32(whole, 1);
    return a * power_of_2(half) * power_of_2(_mm256_sub_epi32(whole, half));
  }
  static Float if_negative(Float sign, Float a, Float b) { return _mm256_blendv_ps(b, a, sign); }

  static Mask first(int64_t count) { return count < kLanes ? static_cast<int>(count) : kLanes; }
  static Float load(const void* from, int64_t index, int dtype, Mask lanes) {
    if (lanes == kLanes) return load_numbers(from, index, dtype);
    alignas(32) float part[kLanes] = {};
    for (int i = 0; i < lanes; ++i) part[i] = load_number(from, index + i, dtype);
    return _mm256_load_ps(part);
  }
  static void store(Float value, void* to, int64_t index, int dtype, Mask lanes) {
    if (lanes < kLanes) {
      alignas(32) float part[kLanes];
      _mm256_store_ps(part, value);
      for (int i = 0; i < lanes; ++i) store_number(part[i], to, index + i, dtype);
    } else if (dtype == SPARSECOMP_F32) {
      _mm256_storeu_ps(static_cast<float*>(to) + index, value);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + index), narrow(value, dtype));
    }
  }

 private:
  static Float power_of_2(__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  }
};

void widen(const void* from, int dtype, float* to, int64_t count) { widen_lanes<Lanes>(from, dtype, to, count); }
void finish(const FinishArgs& args) { finish_lanes<Lanes>(args); }

double flops(int, double seconds) {
  constexpr int kChains = 12;
  const __m256 factor = _mm256_set1_ps(0.999f);
  return measure_rate(seconds, 2.0 * Lanes::kLanes * kChains, [=](int64_t rounds) {
    __m256 sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_setzero_ps();
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        sums[i] = _mm256_fmadd_ps(factor, factor, sums[i]);
        __asm__ volatile("" : "+x"(sums[i]));  // keeps the work, in registers
      }
    }
  });
}

}  // namespace

constexpr Isa kAvx2 = {widen, finish, flops, read_stream, measure_rates_avx2};

}  // namespace sparsecomp
