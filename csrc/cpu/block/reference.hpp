// The scalar block-sparse product: the truth that every fast path is compared with.
#pragma once

#include "block/layout.hpp"
#include "common/call.hpp"

namespace sparsecomp {

// SPARSECOMP_OK, or SPARSECOMP_INVALID for damaged metadata.
int block_reference(const BlockGeometry& g, const LinearCall& call);

}  // namespace sparsecomp
