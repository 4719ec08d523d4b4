// Block-sparse products on aarch64 NEON: a vector of weights is four registers.
// 4 columns: 16 sums, 4 weights, and the activations, which all four share unless a row of the vector is 8 or 16
// columns.
#include <arm_neon.h>

#include "block/micro.hpp"

namespace sparsecomp {
namespace {

struct NeonLanes {
  struct Register {
    float32x4_t part[4];
  };

  static Register zero() { return same(vdupq_n_f32(0)); }

  static Register add(Register a, Register b) {
    SPARSECOMP_UNROLL
    for (int i = 0; i < 4; ++i) a.part[i] = vaddq_f32(a.part[i], b.part[i]);
    return a;
  }

  static Register multiply_add(Register a, Register b, Register sum) {
    SPARSECOMP_UNROLL
    for (int i = 0; i < 4; ++i) sum.part[i] = vfmaq_f32(sum.part[i], a.part[i], b.part[i]);
    return sum;
  }

  template <int Dtype>
  static Register load(const uint8_t* from) {
    Register weights;
    SPARSECOMP_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (Dtype == SPARSECOMP_F32) {
        weights.part[i] = vreinterpretq_f32_u8(vld1q_u8(from + i * 16));
      } else {
        const uint16x4_t raw = vreinterpret_u16_u8(vld1_u8(from + i * 8));
        weights.part[i] = Dtype == SPARSECOMP_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(raw))
                                                  : vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
      }
    }
    return weights;
  }

  template <int LC>
  static Register spread(const float* from) {
    if (LC == 1) return same(vld1q_dup_f32(from));
    if (LC == 2) {
      const float32x2_t pair = vld1_f32(from);
      return same(vcombine_f32(pair, pair));
    }
    if (LC == 4) return same(vld1q_f32(from));
    const float32x4_t first = vld1q_f32(from), second = vld1q_f32(from + 4);
    if (LC == 8) return {{first, second, first, second}};
    return {{first, second, vld1q_f32(from + 8), vld1q_f32(from + 12)}};
  }

  template <int LC, int NB>
  static void store_rows(const Register (&sums)[NB], float* to, int64_t ld) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) store_one<LC>(sums[b], to + b * ld);
  }

 private:
  template <int LC>
  static void store_one(Register sum, float* to) {
    const float32x4_t low = vpaddq_f32(sum.part[0], sum.part[1]), high = vpaddq_f32(sum.part[2], sum.part[3]);
    if (LC == 1) {
      SPARSECOMP_UNROLL
      for (int i = 0; i < 4; ++i) vst1q_f32(to + i * 4, sum.part[i]);
    } else if (LC == 2) {
      vst1q_f32(to, low);
      vst1q_f32(to + 4, high);
    } else if (LC == 4) {
      vst1q_f32(to, vpaddq_f32(low, high));
    } else {
      const float32x4_t quads = vpaddq_f32(low, high);
      const float32x2_t octets = vpadd_f32(vget_low_f32(quads), vget_high_f32(quads));
      if (LC == 8)
        vst1_f32(to, octets);
      else
        to[0] = vaddv_f32(octets);
    }
  }

  static Register same(float32x4_t value) { return {{value, value, value, value}}; }
};

}  // namespace

constexpr BlockKernels kBlockNeon = make_block_kernels<NeonLanes, 1, 2, 4>();

}  // namespace sparsecomp
