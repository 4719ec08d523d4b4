// Panels of 8-lane vectors: 2 rows by 4 to 6 vectors or 4 by 1 to 3 are up to 12 of the 16 registers, the weights and a
// temporary the rest.
#include <immintrin.h>

#include "nm/kernel_list.hpp"
#include "nm/panel_kernel.hpp"
#include "nm/x86/panel_sets.hpp"
#include "nm/x86/permute_avx2.hpp"

namespace sparsecomp {
namespace {

// to[j][i] = from[i][j] for 8 by 8 elements of 4 bytes.
void transpose_8x8(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m256 a[8], b[8];
  SPARSECOMP_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * ld_from);
  // pairs of elements, then of pairs: every 128-bit lane is a transposed 4 by 4 block
  SPARSECOMP_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  SPARSECOMP_UNROLL
  for (int i = 0; i < 8; i += 4) {
    SPARSECOMP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m256d low = _mm256_castps_pd(b[i + half]), high = _mm256_castps_pd(b[i + half + 2]);
      a[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      a[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  SPARSECOMP_UNROLL
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * ld_to, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * ld_to, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}

void widen(Widen, const uint8_t* values, int dtype, int slots, float* to) { widen_step(values, dtype, slots, to); }

struct Avx2 {
  using Register = __m256;
  static constexpr int kLanes = sparsecomp::kLanes;
  static constexpr bool kOneRegister = false;
  static Register zero() { return _mm256_setzero_ps(); }
  static Register load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Register v) { _mm256_storeu_ps(to, v); }
  static Register broadcast(float v) { return _mm256_set1_ps(v); }
  static SPARSECOMP_INLINE void add_product(Register a, Register b, Register* sum) {
    *sum = _mm256_fmadd_ps(a, b, *sum);
  }
  static SPARSECOMP_INLINE void add_product(Register a, const float* b, Register* sum) { add_product(a, load(b), sum); }
  static constexpr auto transpose = transpose_8x8;
};

// For processors that take a multiply-add apart whose memory operand has two registers. The sum stays in its place, as
// for Avx512Intel.
struct Avx2OneRegister : Avx2 {
  static constexpr bool kOneRegister = true;
  static SPARSECOMP_INLINE void add_product(Register a, Register b, Register* sum) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "x"(b));
  }
  static SPARSECOMP_INLINE void add_product(Register a, const float* b, Register* sum) {
#if defined(SPARSECOMP_SANITIZED)
    add_product(a, load(b), sum);
#else
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "m"(*reinterpret_cast<const __m256_u*>(b)));
#endif
  }
};

// R rows by C vectors. Loads bound them: one for each vector, one for each weight, and some time for its position;
// loops of unknown length take an eighth more. Rows that share masks share the loads of vectors. Where there are fewer
// sums than multiply-adds under way, these are waited for.
template <class Vector, int M, int N, int R, int C, bool kShared>
constexpr void add_width(PanelSet* set) {
  constexpr double kLoop = N == 0 ? 1.12 : 1, kPosition = 0.25;
  constexpr int kUnderWay = 8, kLeast = C > kUnderWay / R ? C : kUnderWay / R;
  constexpr double kLoads = kShared ? C / double{R} + 1 : C + 1;
  set->micro[C] = panel_micro<FloatRows<Vector, M, N, R, C, kShared>, R>;
  set->cost[C] = ((kLoads > kLeast ? kLoads : kLeast) + kPosition) * kLoop;
}

template <class Vector>
constexpr PanelSet empty_set(int most_units) {
  return {kLanes, kLanes, SPARSECOMP_F32, most_units, 1, 0, 0, 1, {}, {}, pack_columns<Vector>, transpose_8x8, widen};
}

template <class Vector, int M, int N>
const PanelSet* alone() {
  static constexpr PanelSet set = [] {
    PanelSet made = empty_set<Vector>(6);
    add_width<Vector, M, N, 4, 1, false>(&made);
    add_width<Vector, M, N, 4, 2, false>(&made);
    add_width<Vector, M, N, 4, 3, false>(&made);
    add_width<Vector, M, N, 2, 4, false>(&made);
    add_width<Vector, M, N, 2, 5, false>(&made);
    add_width<Vector, M, N, 2, 6, false>(&made);
    return made;
  }();
  return &set;
}

template <class Vector, int M, int N>
const PanelSet* shared() {
  static constexpr PanelSet set = [] {
    PanelSet made = empty_set<Vector>(2);
    add_width<Vector, M, N, 4, 1, true>(&made);
    add_width<Vector, M, N, 4, 2, true>(&made);
    return made;
  }();
  return &set;
}

template <class Vector>
const PanelSet* select_vector(const Geometry& g) {
  if (g.mask_rows % 4 == 0)
    return own_or_group_kernels<line_of("avx2", "shared panel"), PanelSet>(
        g, [](auto pattern) { return shared<Vector, pattern.kM, pattern.kN>(); });
  return own_or_group_kernels<line_of("avx2", "panel"), PanelSet>(
      g, [](auto pattern) { return alone<Vector, pattern.kM, pattern.kN>(); });
}

}  // namespace

const PanelSet* select_panels_avx2(const Geometry& g, const Processor& processor) {
  constexpr double kAsFast = 0.9;
  const bool two_registers = processor.rates.indexed >= kAsFast * processor.rates.multiply;
  return two_registers ? select_vector<Avx2>(g) : select_vector<Avx2OneRegister>(g);
}

}  // namespace sparsecomp
