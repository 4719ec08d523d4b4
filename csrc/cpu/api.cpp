// The part of the C ABI that is the same for every weight: what an error code means, which instruction set runs.
#include "dispatch.hpp"
#include "sparsecomp.h"

extern "C" {

const char* sparsecomp_error_text(int code) {
  switch (code) {
    case SPARSECOMP_OK:
      return "no error";
    case SPARSECOMP_INVALID:
      return "the weight description, a size, a stride, a pointer or the activation is not valid; "
             "needed are M in 2, 4, 8, 16, 1 <= N <= M, blocks whose bitmap names as many as are kept, "
             "sizes below 2^31, ldx >= in_features, ldy >= out_features";
    case SPARSECOMP_UNSUPPORTED:
      return "x has no element type that goes with the weight; it must be that of the weight, or float32, float16 or "
             "bfloat16 for an int8 weight";
    case SPARSECOMP_NO_MEMORY:
      return "there is no memory for the workspace of this call; free some, or use a smaller batch";
    default:
      return "unknown error code";
  }
}

const char* sparsecomp_isa(void) { return sparsecomp::dispatch().name; }

const char* sparsecomp_isa_available(void) { return sparsecomp::dispatch().available; }

const char* sparsecomp_isa_error(void) { return sparsecomp::dispatch().error; }

}  // extern "C"
