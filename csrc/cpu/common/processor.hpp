// What the processor is beyond its instructions, where kernels are chosen by it.
#pragma once

#include <cstdint>

namespace sparsecomp {

struct Processor {
  // Intel's processors permute on one port only, with 512 bits one of the two that multiply and add: a pair of both
  // takes a cycle, in which two multiply-adds could run, and what decodes positions takes the same two. They take a
  // multiply-add apart whose memory operand has two registers, and have no room for moves between registers. Permuting
  // kernels gain from activations cut to what stays near, panels from asking for y where it is written.
  bool intel;
  int64_t l1_bytes;  // of the data cache
};

const Processor& processor();

}  // namespace sparsecomp
