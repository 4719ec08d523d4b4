// The scalar product: the truth that every fast path is compared with.
#pragma once

#include "layout.hpp"
#include "linear.hpp"

namespace sparsecomp {

void reference_linear(const Geometry& g, const LinearCall& call);

}  // namespace sparsecomp
