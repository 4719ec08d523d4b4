// The scalar N:M product: the truth that every fast path is compared with.
#pragma once

#include "common/call.hpp"
#include "nm/layout.hpp"

namespace sparsecomp {

void reference_linear(const Geometry& g, const LinearCall& call);

}  // namespace sparsecomp
