// The product of int8 weights and int8 activations one element at a time, from the kernel layout: the truth for every
// kernel.
#pragma once

#include "common/call.hpp"
#include "int8/layout.hpp"

namespace sparsecomp::int8 {

void reference_linear(const Geometry& g, const LinearCall& call);

}  // namespace sparsecomp::int8
