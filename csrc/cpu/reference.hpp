// The scalar product: the truth that every fast path is compared with.
#pragma once

#include "layout.hpp"
#include "linear.hpp"

namespace sparsecomp {

void reference_linear(const Geometry& g, const LinearCall& call);

// Stores the y of a row and a batch column whose products add up to `sum`.
void reference_finish(const LinearCall& call, float sum, int64_t row, int64_t column);

}  // namespace sparsecomp
