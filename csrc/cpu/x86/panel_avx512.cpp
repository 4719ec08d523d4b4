// Panels of 16-lane vectors: 2 rows by 8 vectors are 16 sums and 2 weights; 4 rows that share a mask by 6 vectors are
// 24 sums, 4 weights and the activations.
#include <immintrin.h>

#include "../panel_kernel.hpp"
#include "panel_sets.hpp"
#include "vector_avx512.hpp"

namespace sparsecomp {
namespace {

template <int M, int N>
const PanelSet* alone() {
  // at 64 columns the kernels that permute are as fast, or faster where they decode nothing
  static constexpr PanelSet set = make_panel_set<Avx512, M, N, 2, 4, 8, false>(M == 4 ? 64 : 65, 1.06);
  return &set;
}

template <int M, int N>
const PanelSet* shared() {
  static constexpr PanelSet set = make_panel_set<Avx512, M, N, 4, 1, 6, true>(25, 1.2);
  return &set;
}

}  // namespace

// Where rows do not share masks the walk over the slots must be unrolled to beat the kernels that permute, and at less
// than half the weights it does not.
const PanelSet* select_panels_avx512(const Geometry& g) {
  const bool fours = g.mask_rows % 4 == 0;
  switch (g.m * 100 + g.n) {
    case 201:
      return fours ? shared<2, 0>() : alone<2, 1>();
    case 402:
      return fours ? shared<4, 2>() : alone<4, 2>();
    case 403:
      return fours ? shared<4, 0>() : alone<4, 3>();
    case 804:
      return fours ? shared<8, 0>() : alone<8, 4>();
    case 806:
      return fours ? shared<8, 0>() : alone<8, 6>();
    case 1608:
      return fours ? shared<16, 8>() : alone<16, 8>();
    case 1610:
      return fours ? shared<16, 0>() : alone<16, 10>();
    case 1612:
      return fours ? shared<16, 0>() : alone<16, 12>();
    default:
      if (!fours) return nullptr;
      return g.m == 2 ? shared<2, 0>() : g.m == 4 ? shared<4, 0>() : g.m == 8 ? shared<8, 0>() : shared<16, 0>();
  }
}

}  // namespace sparsecomp
