// Full unrolling of loops over registers: an array of vectors lives in registers only if every index is a constant, and
// every function it is passed to is inlined.
#pragma once

#if defined(__clang__)
#define SPARSECOMP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SPARSECOMP_UNROLL _Pragma("GCC unroll 32")
#endif
#define SPARSECOMP_INLINE __attribute__((always_inline)) inline
