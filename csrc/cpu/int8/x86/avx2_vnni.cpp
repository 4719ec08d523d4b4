// Int8 products on AVX-VNNI: AVX2 with an instruction that multiplies four bytes and adds them to 32 bits.
#include <immintrin.h>

#include "int8/x86/round_avx2.hpp"
#include "int8/x86/ymm.hpp"

namespace sparsecomp::int8 {
namespace {

class Product {
 public:
  explicit Product(__m256i weights) : weights_(weights) {}
  __m256i add(__m256i activations, __m256i sum) const { return _mm256_dpbusd_avx_epi32(sum, activations, weights_); }

 private:
  __m256i weights_;
};

struct Table {
  static constexpr bool kSignedWhereDense = false;

  template <int W, bool kDense, int NB>
  static void micro(const MicroArgs& args) {
    multiply<Product, W, kDense, NB>(args);
  }
};

const MicroSet* select(const Geometry& g, int64_t) { return select_of<Table>(g); }

}  // namespace

constexpr Kernels kAvx2Vnni = {select, range, round, operations_of<Product>};

}  // namespace sparsecomp::int8
