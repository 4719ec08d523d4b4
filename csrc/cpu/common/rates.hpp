// How fast this processor runs the instructions that the kernels of AVX2 are made of, as measured: what permutes as
// fast as it multiplies on one make takes twice as long on another.
#pragma once

namespace sparsecomp {

// In 10^9 per second. A permute counts with the multiply-add that follows it. All alike where nothing was measured.
struct Rates {
  double near = 1;      // permutes within 128 bits, two for every load that repeats them: groups of 2 and 4 columns
  double far = 1;       // permutes of the eight floats of a load: groups of 8
  double wide = 1;      // two of these and a blend: groups of 16
  double multiply = 1;  // multiply-adds with a memory operand at one register and a displacement
  double indexed = 1;   // the same at two registers
};

#if defined(__x86_64__)
void measure_rates_avx2(Rates* rates);
#endif

}  // namespace sparsecomp
