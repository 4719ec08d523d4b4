// The micro-kernel of block-sparse weights, for every instruction set: a vector of weights is loaded once and
// multiplied with as many batch columns as there are registers for sums. Included by files that are compiled for one
// instruction set; everything here is local to the file that includes it.
//
// `Lanes` holds 16 fp32 lanes in registers of its instruction set:
//   Register, zero(), add(a, b), multiply_add(a, b, sum)
//   load<dtype>(pointer)                16 weights, widened
//   spread<LC>(pointer)                 LC activations, repeated 16 / LC times
//   store_rows<LC>(sums, pointer, ld)   of each register the sums of LC neighbouring lanes: 16 / LC floats, ld apart
#pragma once

#include <type_traits>

#include "block/linear.hpp"
#include "common/unroll.hpp"

namespace sparsecomp {
namespace {

// DRAM latency at the rate of the widest micro-kernel; the hardware prefetcher stops at 4 KB pages.
constexpr int64_t kBlockPrefetchBytes = 4096;

template <class Lanes, int Dtype, int LC, int NB>
void block_micro(const BlockMicroArgs& args) {
  using Register = typename Lanes::Register;
  // few columns: the blocks are shared out to several sums, or the latency of the multiply-add shows
  constexpr int kChains = NB <= 2 ? 4 : NB <= 4 ? 2 : 1;
  constexpr int64_t kVectorBytes = int64_t{kLanes} * (Dtype == SPARSECOMP_F32 ? 4 : 2);
  const int64_t groups = args.groups;
  const int64_t block_bytes = groups * kVectorBytes, block_x = groups * LC * NB;
  const uint8_t* values = args.values;

  Register sums[NB][kChains];
  SPARSECOMP_UNROLL
  for (int b = 0; b < NB; ++b) {
    SPARSECOMP_UNROLL
    for (int chain = 0; chain < kChains; ++chain) sums[b][chain] = Lanes::zero();
  }
  const auto multiply = [&](const uint8_t* vector, const float* x, int chain) {
    const Register weights = Lanes::template load<Dtype>(vector);
    __builtin_prefetch(vector + kBlockPrefetchBytes);
    SPARSECOMP_UNROLL
    for (int b = 0; b < NB; ++b)
      sums[b][chain] = Lanes::multiply_add(weights, Lanes::template spread<LC>(x + b * LC), sums[b][chain]);
  };

  const auto walk = [&](auto one_group) {
    // not its conversion to bool: an inline function that the linker could give to other files
    const int64_t count = decltype(one_group)::value ? 1 : groups;
    int64_t block = 0;
    for (; block + kChains <= args.blocks; block += kChains, values += kChains * block_bytes) {
      const float* x[kChains];
      SPARSECOMP_UNROLL
      for (int chain = 0; chain < kChains; ++chain) x[chain] = args.x + args.columns[block + chain] * block_x;
      for (int64_t group = 0; group < count; ++group) {
        SPARSECOMP_UNROLL
        for (int chain = 0; chain < kChains; ++chain)
          multiply(values + chain * block_bytes + group * kVectorBytes, x[chain] + group * LC * NB, chain);
      }
    }
    for (; block < args.blocks; ++block, values += block_bytes) {
      const float* x = args.x + args.columns[block] * block_x;
      for (int64_t group = 0; group < count; ++group) multiply(values + group * kVectorBytes, x + group * LC * NB, 0);
    }
  };
  if (groups == 1)
    walk(std::true_type());
  else
    walk(std::false_type());

  Register totals[NB];
  SPARSECOMP_UNROLL
  for (int b = 0; b < NB; ++b) {
    totals[b] = sums[b][0];
    SPARSECOMP_UNROLL
    for (int chain = 1; chain < kChains; ++chain) totals[b] = Lanes::add(totals[b], sums[b][chain]);
  }
  Lanes::template store_rows<LC>(totals, args.sums, args.ld);
}

template <class Lanes, int Dtype, int LC, int... Widths>
constexpr void fill_widths(BlockMicro* row) {
  int i = 0;
  ((row[i++] = block_micro<Lanes, Dtype, LC, Widths>), ...);
}

template <class Lanes, int Dtype, int... Widths>
constexpr void fill_shapes(BlockMicro (*shapes)[kMostWidths]) {
  fill_widths<Lanes, Dtype, 16, Widths...>(shapes[0]);
  fill_widths<Lanes, Dtype, 8, Widths...>(shapes[1]);
  fill_widths<Lanes, Dtype, 4, Widths...>(shapes[2]);
  fill_widths<Lanes, Dtype, 2, Widths...>(shapes[3]);
  fill_widths<Lanes, Dtype, 1, Widths...>(shapes[4]);
}

template <class Lanes, int... Widths>
constexpr BlockKernels make_block_kernels() {
  static_assert(sizeof...(Widths) <= kMostWidths, "the table has room for these widths");
  BlockKernels kernels{sizeof...(Widths), {Widths...}, {}};
  fill_shapes<Lanes, SPARSECOMP_F32, Widths...>(kernels.micro[SPARSECOMP_F32]);
  fill_shapes<Lanes, SPARSECOMP_F16, Widths...>(kernels.micro[SPARSECOMP_F16]);
  fill_shapes<Lanes, SPARSECOMP_BF16, Widths...>(kernels.micro[SPARSECOMP_BF16]);
  return kernels;
}

}  // namespace
}  // namespace sparsecomp
