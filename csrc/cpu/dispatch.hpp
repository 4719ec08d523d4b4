// Which instruction set serves this process: decided once, from CPUID, the OS state and SPARSECOMP_ISA.
#pragma once

#include "block.hpp"
#include "linear.hpp"

namespace sparsecomp {

struct Dispatch {
  const char* name;
  const Isa* isa;              // nullptr: the scalar reference
  const BlockKernels* blocks;  // likewise
  const char* available;       // best first, separated by commas
  const char* error;           // one sentence if SPARSECOMP_ISA could not be followed, else nullptr
};

const Dispatch& dispatch();

#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512, kAvx512Bf16;
extern const BlockKernels kBlockAvx2, kBlockAvx512;
#elif defined(__aarch64__)
extern const Isa kNeon;
extern const BlockKernels kBlockNeon;
#endif

}  // namespace sparsecomp
