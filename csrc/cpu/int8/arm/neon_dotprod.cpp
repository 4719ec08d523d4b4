// Int8 products on NEON with dot products: an instruction that multiplies four bytes and adds them to 32 bits.
#include "int8/arm/neon.hpp"

namespace sparsecomp::int8 {
namespace {

class Product {
 public:
  using Sums = int32x4_t;
  static constexpr int kRegisters = 1;

  static Sums zero() { return vdupq_n_s32(0); }
  static int32x4_t total(Sums sums) { return sums; }

  Product(int8x16_t even, int8x16_t odd) : even_(even), odd_(odd) {}
  Sums add(int8x16_t even, int8x16_t odd, Sums sums) const {
    return vdotq_s32(vdotq_s32(sums, even_, even), odd_, odd);
  }
  Sums add_columns(const uint8_t* step, int word, Sums sums) const {
    const int8x16_t x = load(step);
    if (word == 0) return vdotq_laneq_s32(vdotq_laneq_s32(sums, even_, x, 0), odd_, x, 1);
    return vdotq_laneq_s32(vdotq_laneq_s32(sums, even_, x, 2), odd_, x, 3);
  }

 private:
  int8x16_t even_, odd_;
};

}  // namespace

constexpr Kernels kNeonDotprod = {select<Product>, range, round, operations<Product>};

}  // namespace sparsecomp::int8
