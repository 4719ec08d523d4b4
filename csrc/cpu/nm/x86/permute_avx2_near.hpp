// The kernels of AVX2 for groups of 2 and 4 columns, made in permute_avx2_near.cpp.
#pragma once

#include "nm/permute.hpp"

namespace sparsecomp {

const PermuteSet* select_permute_avx2_near(const Geometry& g);

}  // namespace sparsecomp
