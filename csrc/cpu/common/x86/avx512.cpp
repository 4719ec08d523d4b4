// Epilogue, widening and probes on AVX-512 F/BW/VL/DQ.
#include <immintrin.h>

#include "common/epilogue.hpp"
#include "common/isa.hpp"
#include "common/measure.hpp"
#include "common/unroll.hpp"
#include "common/x86/convert_avx512.hpp"

namespace sparsecomp {
namespace {

__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

// 16 fp32 lanes, as the epilogue wants them.
struct Lanes {
  using Float = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  static Float set(float value) { return _mm512_set1_ps(value); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float abs(Float a) { return _mm512_abs_ps(a); }
  static Float round(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Float times_power_of_2(Float a, Float exponent) { return _mm512_scalef_ps(a, exponent); }
  static Float if_negative(Float sign, Float a, Float b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign)), b, a);
  }

  static Mask first(int64_t count) { return first_lanes(count); }
  static Float load(const void* from, int64_t index, int dtype, Mask lanes) {
    if (dtype == SPARSECOMP_F32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(from) + index);
    return widen_vector(_mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(from) + index), dtype);
  }
  static void store(Float value, void* to, int64_t index, int dtype, Mask lanes) {
    if (dtype == SPARSECOMP_F32)
      _mm512_mask_storeu_ps(static_cast<float*>(to) + index, lanes, value);
    else
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + index, lanes, narrow_vector(value, dtype));
  }
};

void widen(const void* from, int dtype, float* to, int64_t count) { widen_lanes<Lanes>(from, dtype, to, count); }
void finish(const FinishArgs& args) { finish_lanes<Lanes>(args); }

double flops(int, double seconds) {
  constexpr int kChains = 16;
  const __m512 factor = _mm512_set1_ps(0.999f);
  return measure_rate(seconds, 2.0 * Lanes::kLanes * kChains, [=](int64_t rounds) {
    __m512 sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        sums[i] = _mm512_fmadd_ps(factor, factor, sums[i]);
        __asm__ volatile("" : "+v"(sums[i]));  // keeps the work, in registers
      }
    }
  });
}

}  // namespace

// constexpr: a table filled in at load would run AVX-512 code on machines that have none
constexpr Isa kAvx512 = {widen, finish, flops, read_stream};

}  // namespace sparsecomp
