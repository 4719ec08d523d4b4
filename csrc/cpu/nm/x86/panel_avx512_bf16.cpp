// bf16 panels for rows that share a mask: every activation lies twice in a 32-bit lane, so that one blend of two rows
// of the panel makes the pair that the dot product wants, for four rows of weights at once. Rows of different masks
// would need two loads and a blend each: the kernels that permute are faster for them.
#include <immintrin.h>

#include "nm/kernel_list.hpp"
#include "nm/panel_kernel.hpp"
#include "nm/x86/panel_avx512.hpp"
#include "nm/x86/panel_sets.hpp"

namespace sparsecomp {
namespace {

// R rows by C vectors; a pair of slots at a time. N = 0: any N.
template <int M, int N, int R, int C>
struct DotRows {
  SPARSECOMP_INLINE static void run(const PanelArgs& args, int row) {
    constexpr int64_t kWidth = int64_t{C} * Avx512::kLanes;
    using Step = StepGeometry<M, N>;
    static_assert(Step::kSlots % 2 == 0, "kernels of their own take slots in pairs: 16 N / M must be even");
    const Geometry& g = *args.geometry;
    const uint8_t* values = args.values + row * 4;
    const uint8_t* metadata = args.metadata;
    const float* panel = static_cast<const float*>(args.panel);
    __m512 sums[R][C];
    load_sums<Avx512>(args, row, sums);
    const auto multiply = [&](const uint8_t* of_pair, const float* first, const float* second, uint64_t bits,
                              bool odd) __attribute__((always_inline)) {
      __m512bh weights[R];
      SPARSECOMP_UNROLL
      for (int r = 0; r < R; ++r)
        weights[r] = reinterpret_cast<__m512bh>(_mm512_set1_epi32(load_as<int32_t>(of_pair + r * 4)));
      const uint64_t at = row_offset<kWidth * 4>(bits, 0, M - 1),
                     next = row_offset<kWidth * 4>(bits, Step::kBits, M - 1);
      SPARSECOMP_UNROLL
      for (int c = 0; c < C; ++c) {
        // the last of an odd number of slots has no partner: zero, as Inf there would not vanish against a zero weight
        const __m512i pair = odd ? _mm512_maskz_loadu_epi16(0x55555555, vector_at<Avx512>(first, c, at))
                                 : _mm512_mask_loadu_epi16(_mm512_loadu_si512(vector_at<Avx512>(first, c, at)),
                                                           0xaaaaaaaa, vector_at<Avx512>(second, c, next));
        SPARSECOMP_UNROLL
        for (int r = 0; r < R; ++r)
          sums[r][c] = _mm512_dpbf16_ps(sums[r][c], weights[r], reinterpret_cast<__m512bh>(pair));
      }
    };
    NextValues<R, Step::kSlots / 2> next(args, row);
    for (int64_t step = 0; step < args.steps; ++step) {
      next.step();
      uint64_t bits = row_bits<Step>(g, metadata, row);
      if constexpr (N != 0) {
        SPARSECOMP_UNROLL
        for (int slot = 0; slot < Step::kSlots; slot += 2)
          multiply(values + slot / 2 * kTile * 4, panel + slot / N * M * kWidth, panel + (slot + 1) / N * M * kWidth,
                   bits >> (slot * Step::kBits), false);
      } else {
        int slot = 0;
        for (; slot + 1 < g.slots; slot += 2, bits >>= 2 * Step::kBits)
          multiply(values + slot / 2 * kTile * 4, panel + args.groups[slot], panel + args.groups[slot + 1], bits,
                   false);
        if (slot < g.slots) multiply(values + slot / 2 * kTile * 4, panel + args.groups[slot], panel, bits, true);
      }
      values += g.value_bytes;
      metadata += g.metadata_bytes;
      panel += kStep * kWidth;
    }
    store_sums<Avx512>(args, row, sums);
  }
};

// Rows of x to rows of the panel, every number in both halves of its lane.
void pack_doubled(const void* from, int64_t ld_from, float* to, int64_t width) {
  __m512 columns[kStep];
  SPARSECOMP_UNROLL
  for (int i = 0; i < kStep; ++i) {
    const auto* row = static_cast<const uint16_t*>(from) + i * ld_from;
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    columns[i] = _mm512_castsi512_ps(_mm512_or_si512(words, _mm512_slli_epi32(words, 16)));
  }
  transpose_rows(columns);
  SPARSECOMP_UNROLL
  for (int k = 0; k < kStep; ++k) _mm512_storeu_ps(to + k * width, columns[k]);
}

// Rows that share a mask. N = 0: any N.
template <int M, int N>
const PanelSet* shared() {
  static constexpr PanelSet set = [] {
    PanelSet made{Avx512::kLanes, Avx512::kLanes,  SPARSECOMP_BF16, 6, 33, 128, 0, 1.2, {}, {},
                  pack_doubled,   transpose_16x16, nullptr};
    made.micro[3] = panel_micro<DotRows<M, N, 4, 3>, 4>;
    made.micro[4] = panel_micro<DotRows<M, N, 4, 4>, 4>;
    made.micro[5] = panel_micro<DotRows<M, N, 4, 5>, 4>;
    made.micro[6] = panel_micro<DotRows<M, N, 4, 6>, 4>;
    return made;
  }();
  return &set;
}

}  // namespace

const PanelSet* select_panels_avx512_bf16(const Geometry& g, const Processor& processor) {
  if (g.dtype != SPARSECOMP_BF16) return select_panels_avx512(g, processor);
  if (g.mask_rows % 4 != 0) return nullptr;
  return own_or_group_kernels<line_of("avx512_bf16", "shared panel"), PanelSet>(
      g, [](auto pattern) { return shared<pattern.kM, pattern.kN>(); });
}

}  // namespace sparsecomp
