// Quotients of sizes, rounded up.
#pragma once

#include <cstdint>

namespace sparsecomp {

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t unit) { return divide_up(a, unit) * unit; }

}  // namespace sparsecomp
