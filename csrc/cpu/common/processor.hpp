// What the processor is beyond its instructions, where kernels are chosen by it.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace sparsecomp {

struct Processor {
  // Intel's processors permute on one port only, with 512 bits one of the two that multiply and add: a pair of both
  // takes a cycle, in which two multiply-adds could run, and what decodes positions takes the same two. They take a
  // multiply-add apart whose memory operand has two registers, and have no room for moves between registers. Permuting
  // kernels gain from activations cut to what stays near, panels from asking for y where it is written.
  bool intel;
  int64_t l1_bytes;  // of the data cache
  Rates rates{};     // by which kernels of AVX2 are chosen, whoever made the processor
};

// Found once, by the first call, with the rates of the instruction set that this process uses: half a millisecond.
const Processor& processor(const Isa& isa);

}  // namespace sparsecomp
