// Full unrolling of loops over registers: an array of vectors lives in registers only if every index is a constant.
#pragma once

#if defined(__clang__)
#define SPARSECOMP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SPARSECOMP_UNROLL _Pragma("GCC unroll 16")
#endif
