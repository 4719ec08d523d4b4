// The panel kernels of each instruction set.
#pragma once

#include "nm/panel.hpp"

namespace sparsecomp {

const PanelSet* select_panels_avx2(const Geometry& g, const Processor& processor);
const PanelSet* select_panels_avx512(const Geometry& g, const Processor& processor);
const PanelSet* select_panels_avx512_bf16(const Geometry& g, const Processor& processor);

}  // namespace sparsecomp
