// The scalar twin of the epilogue.
#pragma once

#include "common/call.hpp"

namespace sparsecomp {

// Stores the y of a row and a batch column whose products add up to `sum`.
void reference_finish(const LinearCall& call, float sum, int64_t row, int64_t column);

}  // namespace sparsecomp
