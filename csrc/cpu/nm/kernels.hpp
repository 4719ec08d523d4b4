// The N:M kernels of each instruction set.
#pragma once

#include "common/processor.hpp"
#include "nm/layout.hpp"

namespace sparsecomp {

struct PermuteSet;
struct PanelSet;

// Those of one instruction set.
struct NmKernels {
  const PermuteSet* (*select)(const Geometry& g, const Processor&);
  const PanelSet* (*select_panels)(const Geometry& g, const Processor&);  // nullptr: none for the geometry
};

#if defined(__x86_64__)
extern const NmKernels kNmAvx2, kNmAvx512, kNmAvx512Bf16;
#elif defined(__aarch64__)
extern const NmKernels kNmNeon;
#endif

}  // namespace sparsecomp
