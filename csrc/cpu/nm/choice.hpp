// Whether panels or permutes serve a product: pure arithmetic on sizes and rates, so that it is tested for processors
// that this machine is not.
#pragma once

#include <cstdint>

#include "common/rates.hpp"
#include "nm/layout.hpp"
#include "nm/panel.hpp"

namespace sparsecomp {

// Nanoseconds of a column step of the weight in registers and L1: by the kernels that permute, and by those of
// `kernels`, which must have costs, with packing.
double permute_nanoseconds(const Geometry& g, int64_t batch, const Rates& rates);
double panel_nanoseconds(const PanelSet& kernels, const Geometry& g, int64_t batch, const Rates& rates);

// Whether panels are worth their packing, and the columns that the batch leaves empty.
bool panels_pay(const PanelSet& kernels, const Geometry& g, int64_t batch, int threads, const Rates& rates);

}  // namespace sparsecomp
