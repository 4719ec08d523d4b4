// Panels of 16-lane vectors. Rows of different masks: 2 rows by C vectors of the panel, bound by loads, and meanwhile Q
// batch columns by permutes, which leave the load ports alone (Intel: none of these). Rows that share a mask: 4 rows by
// 6 vectors are 24 sums, 4 weights and the activations (2:4 and 8:16 on Intel: by 5 at most, in longer slices).
#include <immintrin.h>

#include "nm/kernel_list.hpp"
#include "nm/panel_kernel.hpp"
#include "nm/x86/panel_avx512.hpp"
#include "nm/x86/panel_sets.hpp"
#include "nm/x86/permute_avx512.hpp"

namespace sparsecomp {
namespace {

// Two rows by C vectors, and for every two rows another Q permuted columns of the whole tile.
// Registers for C = 5 and Q = 6: 16 sums, 6 activations, 2 weights, a value, a word, an index and a permuted
// activation; the constants of groups smaller than 16 take the rest.
template <int M, int N, int C, int Q>
struct MixedRows {
  using Step = StepGeometry<M, N>;
  static constexpr int kRows = 2, kTransposed = C * Avx512::kLanes, kPermuted = Q * kTile / kRows;

  SPARSECOMP_INLINE static void run(const PanelArgs& args, int row) {
    const Geometry& g = *args.geometry;
    const auto* values = reinterpret_cast<const float*>(args.values);
    const uint8_t* metadata = args.metadata;
    const auto* panel = static_cast<const float*>(args.panel);
    const float* x = panel + kStep * kTransposed + row / kRows * Q * kStep;
    float* permuted_sums = args.sums + kTile * kTransposed + row / kRows * Q * kTile;
    __m512 sums[kRows][C], permuted[Q];
    load_sums<Avx512>(args, row, sums);
    SPARSECOMP_UNROLL
    for (int q = 0; q < Q; ++q)
      permuted[q] = args.add ? _mm512_loadu_ps(permuted_sums + q * kTile) : _mm512_setzero_ps();
    NextValues<kRows, Step::kSlots> next(args, row);
    for (int64_t step = 0; step < args.steps; ++step) {
      next.step();
      uint64_t bits[kRows];
      SPARSECOMP_UNROLL
      for (int r = 0; r < kRows; ++r) bits[r] = row_bits<Step>(g, metadata, row + r);
      __m512 xs[Q];
      SPARSECOMP_UNROLL
      for (int q = 0; q < Q; ++q) xs[q] = kept(_mm512_loadu_ps(x + q * kStep));
      const float* weights = kept(values + row);
      __m512i word;
      SPARSECOMP_UNROLL
      for (int slot = 0; slot < Step::kSlots; ++slot) {
        multiply_slot<Avx512, kRows, C, false>(weights + slot * kTile, panel, slot / N * M * kTransposed, bits,
                                               slot * Step::kBits, M - 1, sums);
        if (slot % Step::kWordSlots == 0)
          word = load_index_word(metadata, slot / Step::kWordSlots, Step::kFullWords, Step::kRestBytes);
        const __m512 value = kept(_mm512_loadu_ps(values + slot * kTile));
        const __m512i columns = slot_columns<M>(word, slot / N * M);
        SPARSECOMP_UNROLL
        for (int q = 0; q < Q; ++q)
          permuted[q] = _mm512_fmadd_ps(value, _mm512_permutexvar_ps(columns, xs[q]), permuted[q]);
        word = _mm512_srli_epi32(word, Step::kBits);
      }
      values += Step::kSlots * kTile;
      metadata += Step::kMetadataBytes;
      panel += kStep * (kTransposed + kPermuted);
      x += kStep * (kTransposed + kPermuted);
    }
    store_sums<Avx512>(args, row, sums);
    SPARSECOMP_UNROLL
    for (int q = 0; q < Q; ++q) _mm512_storeu_ps(permuted_sums + q * kTile, permuted[q]);
  }

 private:
  // In a register. GCC would load a vector again for every multiply-add, and make and spill an address for every
  // weight.
  SPARSECOMP_INLINE static __m512 kept(__m512 v) {
    __asm__("" : "+v"(v));
    return v;
  }
  SPARSECOMP_INLINE static const float* kept(const float* at) {
    __asm__("" : "+r"(at));
    return at;
  }
};

constexpr int kUnit = 8;  // columns of a panel that are permuted together: one for every two rows of a tile

template <int M, int N, int C, int Q>
constexpr void add_width(PanelSet* set) {
  using Rows = MixedRows<M, N, C, Q>;
  constexpr int kUnits = (Rows::kTransposed + Rows::kPermuted) / kUnit;
  set->micro[kUnits] = panel_micro<Rows, Rows::kRows>;
  set->permuted[kUnits] = Rows::kPermuted;
}

template <int M, int N>
const PanelSet* mixed() {
  static constexpr PanelSet set = [] {
    // where little is multiplied, packing and writing y weigh more: 4:16 gains nothing below these
    constexpr bool kFew = 4 * N <= M;
    constexpr int64_t kLeastBatch = kFew ? 104 : 60, kLeastOutputs = kFew ? 512 * 128 : 0;
    constexpr int64_t kLeastRows = kFew ? 256 : 96;
    PanelSet made{Avx512::kLanes,       kUnit,           SPARSECOMP_F32, 16, kLeastBatch,
                  kLeastRows,           kLeastOutputs,   1.12,           {}, {},
                  pack_columns<Avx512>, transpose_16x16, widen_values};
    add_width<M, N, 2, 4>(&made);
    add_width<M, N, 2, 5>(&made);
    add_width<M, N, 2, 6>(&made);
    add_width<M, N, 3, 5>(&made);
    add_width<M, N, 3, 6>(&made);
    add_width<M, N, 4, 5>(&made);
    add_width<M, N, 4, 6>(&made);
    add_width<M, N, 5, 5>(&made);
    // 2:4 has no registers left for eight, and 12:16 is 5% slower with them
    constexpr bool kEight = M == 8 || (M == 16 && N <= 8);
    add_width<M, N, kEight ? 4 : 5, kEight ? 8 : 6>(&made);
    return made;
  }();
  return &set;
}

// Without permuted columns, each of which would cost two multiply-adds.
template <int M, int N>
const PanelSet* transposed() {
  static constexpr PanelSet set = make_panel_set<Avx512Intel, M, N, 2, 4, 8, false>(54, 96, 1.2);
  return &set;
}

template <int M, int N>
const PanelSet* alone(const Processor& processor) {
  if (!processor.intel) return mixed<M, N>();
  // up to a quarter of the weights permutes alone are faster
  if constexpr (4 * N > M) return transposed<M, N>();
  return nullptr;
}

template <int M, int N>
const PanelSet* shared(const Processor& processor) {
  static constexpr PanelSet set = make_panel_set<Avx512, M, N, 4, 2, 6, true>(25, 48, 1.2);
  if constexpr (N != 0) {  // loops over slots are 4-10% faster with the sums where GCC puts them
    static constexpr PanelSet of_intel = make_panel_set<Avx512Intel, M, N, 4, 2, 5, true>(25, 48, 1.2);
    if (processor.intel) return &of_intel;
  }
  return &set;
}

}  // namespace

// Rows that do not share masks have kernels for the patterns people prune to: their walk over the slots must be
// unrolled.
const PanelSet* select_panels_avx512(const Geometry& g, const Processor& processor) {
  if (g.mask_rows % 4 == 0)
    return own_or_group_kernels<line_of("avx512", "shared panel"), PanelSet>(
        g, [&](auto pattern) { return shared<pattern.kM, pattern.kN>(processor); });
  return own_kernels<line_of("avx512", "panel"), PanelSet>(
      g, [&](auto pattern) { return alone<pattern.kM, pattern.kN>(processor); });
}

}  // namespace sparsecomp
