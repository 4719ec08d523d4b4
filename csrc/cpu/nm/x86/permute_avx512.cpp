// fp32 products on AVX-512 F/BW/VL/DQ. A register holds 16 rows of one slot; 16 activations of a step are one load
// (QuarterProduct: those of a group), the slot's positions permute them into place, one multiply-add per slot and batch
// column does the rest.
// Narrower weights are widened in registers; x arrives widened.
#include "nm/x86/permute_avx512.hpp"

#include "nm/kernels.hpp"
#include "nm/x86/panel_sets.hpp"

namespace sparsecomp {
namespace {

struct ValuesF32 {
  using Raw = __m512;
  static constexpr int kBytes = 4;
  static constexpr bool kPaired = false;
  static Raw load(const uint8_t* block, int slot) { return _mm512_loadu_ps(block + slot * kTile * 4); }
  static __m512 even(Raw raw) { return raw; }
  static __m512 odd(Raw raw) { return raw; }
};

struct ValuesI8 {
  using Raw = __m512;
  static constexpr int kBytes = 1;
  static constexpr bool kPaired = false;
  static Raw load(const uint8_t* block, int slot) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + slot * kTile));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  static __m512 even(Raw raw) { return raw; }
  static __m512 odd(Raw raw) { return raw; }
};

struct ValuesBf16 {
  using Raw = __m512i;
  static constexpr int kBytes = 2;
  static constexpr bool kPaired = true;
  static Raw load(const uint8_t* block, int slot) { return _mm512_loadu_si512(block + slot / 2 * kTile * 4); }
  static __m512 even(Raw raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)); }
  static __m512 odd(Raw raw) { return _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(~0xffff))); }
};

struct ValuesF16 {
  using Raw = __m512i;
  static constexpr int kBytes = 2;
  static constexpr bool kPaired = true;
  static Raw load(const uint8_t* block, int slot) { return _mm512_loadu_si512(block + slot / 2 * kTile * 4); }
  static __m512 even(Raw raw) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(raw)); }
  static __m512 odd(Raw raw) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(raw, 16))); }
};

struct FloatY {
  static constexpr int kDtype = SPARSECOMP_F32;
  static __m512 load(const void* from, int64_t index) {
    return _mm512_loadu_ps(static_cast<const float*>(from) + index);
  }
  static void store(__m512 value, void* to, int64_t index) { _mm512_storeu_ps(static_cast<float*>(to) + index, value); }
};

// Registers for T = 2, NB = 8: 16 sums, 8 activations, 2 index words, a value, an index and a permuted activation; the
// constants of groups smaller than 16 take the rest.
template <class Values>
struct Product {
  using X = float;
  using Vector = __m512;
  using Base = int32_t;
  using Y = FloatY;
  static constexpr int kXDtype = SPARSECOMP_F32;
  static constexpr int kWeightBytes = Values::kBytes;
  template <class Shape, int NB>
  static constexpr int kSpan = 1;
  static constexpr int kSlotsOfSum = 1;

  template <int Span>
  static Vector load(const X* x) {
    return _mm512_loadu_ps(x);
  }

  template <int M>
  static constexpr bool kReadsBases = M < 16;

  // groups of 8 gain up to 8%; to 8:16 and 4:16, which decode by a shift alone, stores are more work than that, and 2:4
  // gains nothing
  template <class Shape, int NB>
  static constexpr bool kAhead = Shape::kStatic && Shape::kBits == 3 && NB > 4;

  template <class Shape>
  static __m512i first(__m512i word) {
    return word;
  }
  template <class Shape>
  static __m512i later(__m512i word, int slots) {
    return slots == 0 ? word : _mm512_srli_epi32(word, slots * Shape::kBits);
  }
  template <int M, class Shape, int NB>
  static __m512i columns(__m512i word, const Base* bases) {
    return slot_columns<M>(word, *bases);
  }

  template <class Shape, int NB, int C>
  static inline void pair(const uint8_t* block, int slot, bool odd, const __m512i (&indices)[2], int chain,
                          const Vector (&xs)[NB], __m512 (&sums)[NB][C]) {
    const typename Values::Raw raw = Values::load(block, slot);
    multiply<NB, C>(Values::even(raw), indices[0], 2 * chain % C, xs, sums);
    if (!odd) return;
    const typename Values::Raw next = Values::kPaired ? raw : Values::load(block, slot + 1);
    multiply<NB, C>(Values::odd(next), indices[1], (2 * chain + 1) % C, xs, sums);
  }

 private:
  template <int NB, int C>
  static void multiply(__m512 value, __m512i index, int chain, const Vector (&xs)[NB], __m512 (&sums)[NB][C]) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b)
      sums[b][chain] = _mm512_fmadd_ps(value, _mm512_permutexvar_ps(index, xs[b]), sums[b][chain]);
  }
};

// 2:4 where decoding takes the ports that multiply. A group is a quarter of a register: loads repeat it in all four,
// and a permute within quarters reads two bits of its index, which needs no mask and no first column.
template <class Values>
struct QuarterProduct : Product<Values> {
  using X = float;
  using Vector = const X*;  // loaded where it is used

  template <int Span>
  static Vector load(const X* x) {
    return x;
  }

  template <int M>
  static constexpr bool kReadsBases = false;

  template <int M, class Shape, int NB>
  static __m512i columns(__m512i word, const int32_t*) {
    return word;
  }

  template <class Shape, int NB, int C>
  static inline void pair(const uint8_t* block, int slot, bool, const __m512i (&indices)[2], int chain,
                          const Vector (&xs)[NB], __m512 (&sums)[NB][C]) {
    static_assert(Shape::kBits == 2 && Shape::kSlots == 8, "a pair of slots is a group");
    const typename Values::Raw raw = Values::load(block, slot);
    const __m512 first = Values::even(raw);
    const __m512 second = Values::odd(Values::kPaired ? raw : Values::load(block, slot + 1));
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) {
      const __m512 group = _mm512_broadcast_f32x4(_mm_loadu_ps(xs[b] + slot * 2));
      __m512& one = sums[b][2 * chain % C];
      one = _mm512_fmadd_ps(first, _mm512_permutevar_ps(group, indices[0]), one);
      __m512& other = sums[b][(2 * chain + 1) % C];
      other = _mm512_fmadd_ps(second, _mm512_permutevar_ps(group, indices[1]), other);
    }
  }
};

template <class Values>
const PermuteSet* select_values(const Geometry& g, const Processor& processor) {
  static constexpr PermuteSet by_quarters = make_set<QuarterProduct<Values>, 4, 2>();
  if (processor.intel && g.m == 4 && g.n == 2) return &by_quarters;
  return select_for<line_of("avx512", "permute"), Product<Values>>(g);
}

const PermuteSet* select(const Geometry& g, const Processor& processor) {
  switch (g.dtype) {
    case SPARSECOMP_F32:
      return select_values<ValuesF32>(g, processor);
    case SPARSECOMP_F16:
      return select_values<ValuesF16>(g, processor);
    case SPARSECOMP_I8:
      return select_values<ValuesI8>(g, processor);
    default:
      return select_values<ValuesBf16>(g, processor);
  }
}

}  // namespace

// constexpr: a table filled in at load would run AVX-512 code on machines that have none
constexpr NmKernels kNmAvx512 = {select, select_panels_avx512};

}  // namespace sparsecomp
