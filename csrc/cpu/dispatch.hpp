// Which instruction set serves this process: decided once, from CPUID, the OS state and SPARSECOMP_ISA.
// The one place that knows every family of kernels.
#pragma once

#include "block/linear.hpp"
#include "common/isa.hpp"
#include "int8/linear.hpp"
#include "nm/kernels.hpp"

namespace sparsecomp {

struct Dispatch {
  const char* name;
  const Isa* isa;              // nullptr: the scalar reference
  const NmKernels* nm;         // likewise
  const BlockKernels* blocks;  // likewise
  const int8::Kernels* int8;   // nullptr: the scalar reference of int8 products
  const char* available;       // best first, separated by commas
  const char* error;           // one sentence if SPARSECOMP_ISA could not be followed, else nullptr
};

const Dispatch& dispatch();

}  // namespace sparsecomp
