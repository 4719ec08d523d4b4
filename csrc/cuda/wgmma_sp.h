/* The C ABI of a 2:4 product on sm_90: y = activation(x W^T + b) through CUTLASS's wgmma.sp collective.
 *
 * One shared library holds one configuration of csrc/cuda/wgmma_sp.cu; each exports the same three functions. The
 * layouts are those of sparsecomp/packing/layouts/wgmma.py. */
#ifndef SPARSECOMP_WGMMA_SP_H
#define SPARSECOMP_WGMMA_SP_H

#include <stdint.h>

#define SPARSECOMP_WGMMA_SP_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

/* All pointers are device pointers aligned to 16 bytes, but for bias and the scales, which need their element's. */
typedef struct {
  const void* values;         /* [out, depth / 2], depth being columns rounded up to 128 */
  const void* metadata;       /* uint8 [out rounded up to 64, depth / 8], in tiles */
  const void* x;              /* [tokens, columns], rows x_stride elements apart; rows start at 16 bytes */
  const void* bias;           /* [out] of y's type, or null */
  void* y;                    /* [tokens, out], rows y_stride elements apart; rows start at 16 bytes */
  const float* weight_scales; /* fp8 only: one, or [out] */
  const float* x_scales;      /* fp8 only: one, or [tokens] */
  int64_t x_stride;
  int64_t y_stride;
  int32_t out;
  int32_t tokens;
  int32_t columns;
  int32_t activation; /* none, relu, gelu (by erf), gelu_tanh, silu: the numbers of csrc/include/sparsecomp.h */
  int32_t scale_per_row;
  int32_t scale_per_token;
  int32_t swizzle; /* tiles that neighbouring blocks share across before they go on; 1, 2, 4 or 8 */
  int32_t device;
  int32_t multiprocessors;
} sparsecomp_wgmma_sp_arguments;

/* SPARSECOMP_WGMMA_SP_ABI of the library. */
int sparsecomp_wgmma_sp_abi(void);

/* Launches on the stream (a cudaStream_t of the current context) and returns 0, or a number for the next function.
 * Nothing is allocated, and nothing on the stream is waited for. */
int sparsecomp_wgmma_sp(const sparsecomp_wgmma_sp_arguments* arguments, void* stream);

/* What a result of the launch means, in words; a constant string. */
const char* sparsecomp_wgmma_sp_error(int result);

#ifdef __cplusplus
}
#endif
#endif
