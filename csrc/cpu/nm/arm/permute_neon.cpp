// fp32 products on aarch64 NEON, from the same layout: a slot of a tile is four registers of 4 rows. The activations
// of a group are a table of bytes, which one lookup turns into the activations that 4 rows want: a group of 4 is one
// register of the table, a group of 8 two, a group of 16 four. Narrower weights are widened in registers; x arrives
// widened.
#include <arm_neon.h>

#include <cstring>

#include "common/unroll.hpp"
#include "nm/kernel_list.hpp"
#include "nm/kernels.hpp"
#include "nm/permute.hpp"

namespace sparsecomp {
namespace {

constexpr int kRegisterRows = 4;
constexpr int kQuarters = kTile / kRegisterRows;
constexpr int64_t kAhead = 2048;  // bytes of weights that are fetched before their use

uint32x4_t load_bytes(const uint8_t* from) {
  uint32_t four;
  std::memcpy(&four, from, 4);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}

uint32x4_t load_halves(const uint8_t* from) {
  uint64_t four;
  std::memcpy(&four, from, 8);
  return vmovl_u16(vcreate_u16(four));
}

uint32x4_t load_words(const uint8_t* from) { return vreinterpretq_u32_u8(vld1q_u8(from)); }

// In-group positions of rows 4 * quarter to 4 * quarter + 3: index word `word` of a metadata block.
inline uint32x4_t load_index_word(const Geometry& g, const uint8_t* block, int word, int quarter) {
  const uint8_t* plane = block + word * kTile * 4;
  if (word < g.full_words || g.rest_bytes == 4) return load_words(plane + quarter * 16);
  if (g.rest_bytes == 1) return load_bytes(plane + quarter * 4);
  const uint32x4_t low = load_halves(plane + quarter * 8);
  if (g.rest_bytes == 2) return low;
  return vorrq_u32(low, vshlq_n_u32(load_bytes(plane + kTile * 2 + quarter * 4), 16));
}

struct ValuesF32 {
  static float32x4_t load(const uint8_t* block, int slot, int quarter) {
    return vreinterpretq_f32_u8(vld1q_u8(block + slot * kTile * 4 + quarter * 16));
  }
};

struct ValuesI8 {
  static float32x4_t load(const uint8_t* block, int slot, int quarter) {
    uint32_t four;
    std::memcpy(&four, block + slot * kTile + quarter * kRegisterRows, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
  }
};

struct ValuesBf16 {
  static float32x4_t load(const uint8_t* block, int slot, int quarter) {
    const uint32x4_t raw = load_words(block + slot / 2 * kTile * 4 + quarter * 16);
    return vreinterpretq_f32_u32(slot % 2 ? vandq_u32(raw, vdupq_n_u32(0xffff0000)) : vshlq_n_u32(raw, 16));
  }
};

struct ValuesF16 {
  static float32x4_t load(const uint8_t* block, int slot, int quarter) {
    const uint32x4_t raw = load_words(block + slot / 2 * kTile * 4 + quarter * 16);
    const uint16x4_t half = slot % 2 ? vshrn_n_u32(raw, 16) : vmovn_u32(raw);
    return vcvt_f32_f16(vreinterpret_f16_u16(half));
  }
};

uint8x16_t load_x(const float* x) { return vreinterpretq_u8_f32(vld1q_f32(x)); }

// Activations of 4 rows: the floats of the slot's group that `bytes` names.
template <int M>
float32x4_t look_up(const float* group, uint8x16_t bytes) {
  if constexpr (M <= 4) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(load_x(group), bytes));
  } else if constexpr (M == 8) {
    return vreinterpretq_f32_u8(vqtbl2q_u8({{load_x(group), load_x(group + 4)}}, bytes));
  } else {
    return vreinterpretq_f32_u8(
        vqtbl4q_u8({{load_x(group), load_x(group + 4), load_x(group + 8), load_x(group + 12)}}, bytes));
  }
}

// One tile by NB columns. Registers for NB = 4: 16 sums, 4 values, 4 lookups, 4 index words; four are left for a table.
template <class Values, int M, int N, int NB>
void micro(const PermuteArgs& args) {
  using Step = StepGeometry<M, N>;
  constexpr int kBits = Step::kBits, kWordSlots = Step::kWordSlots;
  static_assert(Step::kSlots <= kWordSlots, "kernels of their own read the positions of a step from one index word");
  const Geometry& g = *args.geometry;
  const uint8_t* values = args.values;
  const uint8_t* metadata = args.metadata;
  const auto* x = static_cast<const float*>(args.x);
  int bases[kStep];
  for (int slot = 0; slot < kStep; ++slot) bases[slot] = slot / g.n * M;

  float32x4_t sums[kQuarters][NB];
  SPARSECOMP_UNROLL
  for (int q = 0; q < kQuarters; ++q) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b)
      sums[q][b] = args.add ? vld1q_f32(args.sums + b * kTile + q * kRegisterRows) : vdupq_n_f32(0);
  }

  for (int64_t step = 0; step < args.steps; ++step) {
    if (args.stream) {
      for (int64_t byte = 0; byte < g.value_bytes; byte += 64) __builtin_prefetch(values + kAhead + byte);
      __builtin_prefetch(metadata + kAhead / 4);
    }
    uint32x4_t index[kQuarters];
    const auto load_index = [&](int word) {
      SPARSECOMP_UNROLL
      for (int q = 0; q < kQuarters; ++q) index[q] = load_index_word(g, metadata, word, q);
    };
    const auto multiply = [&](int slot, int base) {
      // a group of 2 lies in the lower or the upper half of a register
      const int table = M == 2 ? base / 4 * 4 : base;
      const uint32_t first = 0x03020100u + 0x04040404u * static_cast<uint32_t>(base - table);
      SPARSECOMP_UNROLL
      for (int q = 0; q < kQuarters; ++q) {
        const float32x4_t value = Values::load(values, slot, q);
        const uint32x4_t position = vandq_u32(index[q], vdupq_n_u32(M - 1));
        const uint8x16_t bytes = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(first), position, 0x04040404u));
        SPARSECOMP_UNROLL
        for (int b = 0; b < NB; ++b)
          sums[q][b] = vfmaq_f32(sums[q][b], value, look_up<M>(x + b * args.ldx + table, bytes));
        index[q] = vshrq_n_u32(index[q], kBits);
      }
    };
    if constexpr (N != 0) {
      load_index(0);
      SPARSECOMP_UNROLL
      for (int slot = 0; slot < Step::kSlots; ++slot) multiply(slot, slot / N * M);
    } else {
      for (int word = 0, slot = 0; word < g.words; ++word) {
        load_index(word);
        const int end = g.slots < slot + kWordSlots ? g.slots : slot + kWordSlots;
        for (; slot < end; ++slot) multiply(slot, bases[slot]);
      }
    }
    values += g.value_bytes;
    metadata += g.metadata_bytes;
    x += kStep;
  }

  SPARSECOMP_UNROLL
  for (int q = 0; q < kQuarters; ++q) {
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b) vst1q_f32(args.sums + b * kTile + q * kRegisterRows, sums[q][b]);
  }
}

template <class Values, int M, int N>
constexpr PermuteSet make_set() {
  PermuteSet set{SPARSECOMP_F32, 1, {}, 1, -1};
  set.micro[1][1] = micro<Values, M, N, 1>;
  set.micro[1][2] = micro<Values, M, N, 2>;
  set.micro[1][3] = micro<Values, M, N, 3>;
  set.micro[1][4] = micro<Values, M, N, 4>;
  return set;
}

template <class Values, int M, int N>
const PermuteSet* set_of() {
  static constexpr PermuteSet set = make_set<Values, M, N>();
  return &set;
}

template <class Values>
const PermuteSet* select_for(const Geometry& g) {
  return own_or_group_kernels<line_of("neon", "permute"), PermuteSet>(
      g, [](auto pattern) { return set_of<Values, pattern.kM, pattern.kN>(); });
}

const PermuteSet* select(const Geometry& g, const Processor&) {
  switch (g.dtype) {
    case SPARSECOMP_F32:
      return select_for<ValuesF32>(g);
    case SPARSECOMP_F16:
      return select_for<ValuesF16>(g);
    case SPARSECOMP_I8:
      return select_for<ValuesI8>(g);
    default:
      return select_for<ValuesBf16>(g);
  }
}

// The panels of x86 were not timed here, and one that is slower than the lookups must not be chosen.
const PanelSet* no_panels(const Geometry&, const Processor&) { return nullptr; }

}  // namespace

constexpr NmKernels kNmNeon = {select, no_panels};

}  // namespace sparsecomp
