// Int8 products on base NEON: bytes are multiplied to 16 bits. The products of two words are added there, as 2 * 127 *
// 128 fits, and neighbours of these to 32 bits, so that a row's sum is in two lanes until the end.
#include "int8/arm/neon.hpp"

namespace sparsecomp::int8 {
namespace {

class Product {
 public:
  struct Sums {
    int32x4_t low, high;  // of the first two rows, and of the others
  };
  static constexpr int kRegisters = 2;

  static Sums zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static int32x4_t total(const Sums& sums) { return vpaddq_s32(sums.low, sums.high); }

  Product(int8x16_t even, int8x16_t odd) : even_(even), odd_(odd) {}
  Sums add(int8x16_t even, int8x16_t odd, Sums sums) const {
    const int16x8_t low = vmull_s8(vget_low_s8(even_), vget_low_s8(even)), high = vmull_high_s8(even_, even);
    return {vpadalq_s16(sums.low, vmlal_s8(low, vget_low_s8(odd_), vget_low_s8(odd))),
            vpadalq_s16(sums.high, vmlal_high_s8(high, odd_, odd))};
  }
  Sums add_columns(const uint8_t* step, int word, Sums sums) const {
    const int32_t* words = reinterpret_cast<const int32_t*>(step) + word;
    return add(vreinterpretq_s8_s32(vld1q_dup_s32(words)), vreinterpretq_s8_s32(vld1q_dup_s32(words + 1)), sums);
  }

 private:
  int8x16_t even_, odd_;
};

}  // namespace

constexpr Kernels kNeon = {select<Product>, range, round, operations<Product>};

}  // namespace sparsecomp::int8
