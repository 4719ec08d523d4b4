// Epilogue, widening and probes on aarch64 NEON.
#include <arm_neon.h>

#include "common/epilogue.hpp"
#include "common/isa.hpp"
#include "common/measure.hpp"
#include "common/numbers.hpp"
#include "common/unroll.hpp"

namespace sparsecomp {
namespace {

float32x4_t load_numbers(const void* from, int64_t index, int dtype) {
  if (dtype == SPARSECOMP_F32) return vld1q_f32(static_cast<const float*>(from) + index);
  const uint16x4_t raw = vld1_u16(static_cast<const uint16_t*>(from) + index);
  if (dtype == SPARSECOMP_F16) return vcvt_f32_f16(vreinterpret_f16_u16(raw));
  return vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
}

// Rounds to nearest even; NaN stays NaN.
uint16x4_t narrow(float32x4_t value, int dtype) {
  if (dtype == SPARSECOMP_F16) return vreinterpret_u16_f16(vcvt_f16_f32(value));
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
}

// 4 fp32 lanes, as the epilogue wants them. There are no masks: what is left of a row passes through a small buffer.
struct Lanes {
  using Float = float32x4_t;
  using Mask = int;
  static constexpr int kLanes = 4;

  static Float set(float value) { return vdupq_n_f32(value); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  // of two arguments of which one is NaN, min gives the other and max NaN
  static Float min(Float a, Float b) { return vminnmq_f32(a, b); }
  static Float max(Float a, Float b) { return vmaxq_f32(a, b); }
  static Float abs(Float a) { return vabsq_f32(a); }
  static Float round(Float a) { return vrndnq_f32(a); }
  // in two steps: one factor of 2^-127 and less would not be a normal number
  static Float times_power_of_2(Float a, Float exponent) {
    const int32x4_t whole = vcvtnq_s32_f32(exponent), half = vshrq_n_s32(whole, 1);
    return a * power_of_2(half) * power_of_2(vsubq_s32(whole, half));
  }
  static Float if_negative(Float sign, Float a, Float b) {
    return vbslq_f32(vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_f32(sign), 31)), a, b);
  }

  static Mask first(int64_t count) { return count < kLanes ? static_cast<int>(count) : kLanes; }
  static Float load(const void* from, int64_t index, int dtype, Mask lanes) {
    if (lanes == kLanes) return load_numbers(from, index, dtype);
    float part[kLanes] = {};
    for (int i = 0; i < lanes; ++i) part[i] = load_number(from, index + i, dtype);
    return vld1q_f32(part);
  }
  static void store(Float value, void* to, int64_t index, int dtype, Mask lanes) {
    if (lanes < kLanes) {
      float part[kLanes];
      vst1q_f32(part, value);
      for (int i = 0; i < lanes; ++i) store_number(part[i], to, index + i, dtype);
    } else if (dtype == SPARSECOMP_F32) {
      vst1q_f32(static_cast<float*>(to) + index, value);
    } else {
      vst1_u16(static_cast<uint16_t*>(to) + index, narrow(value, dtype));
    }
  }

 private:
  static Float power_of_2(int32x4_t exponent) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
  }
};

void widen(const void* from, int dtype, float* to, int64_t count) { widen_lanes<Lanes>(from, dtype, to, count); }
void finish(const FinishArgs& args) { finish_lanes<Lanes>(args); }

double flops(int, double seconds) {
  constexpr int kChains = 16;
  const float32x4_t factor = vdupq_n_f32(0.999f);
  return measure_rate(seconds, 2.0 * Lanes::kLanes * kChains, [=](int64_t rounds) {
    float32x4_t sums[kChains];
    SPARSECOMP_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = vdupq_n_f32(0);
    for (int64_t round = 0; round < rounds; ++round) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        sums[i] = vfmaq_f32(sums[i], factor, factor);
        __asm__ volatile("" : "+w"(sums[i]));  // keeps the work, in registers
      }
    }
  });
}

}  // namespace

constexpr Isa kNeon = {widen, finish, flops, read_stream};

}  // namespace sparsecomp
