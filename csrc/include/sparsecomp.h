/* sparsecomp: C ABI of the CPU kernels. No torch, Python or ONNX Runtime types cross it.
 *
 * All pointers are to contiguous memory unless a leading dimension is given, aligned as their elements are; `values`
 * and `metadata` of the kernel layout lie anywhere. Every function that returns int gives SPARSECOMP_OK or an error
 * code; sparsecomp_error_text() puts it in words. No function keeps a pointer it was given.
 */
#ifndef SPARSECOMP_H
#define SPARSECOMP_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SPARSECOMP_API __attribute__((visibility("default")))
#else
#define SPARSECOMP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { SPARSECOMP_OK = 0, SPARSECOMP_INVALID = 1, SPARSECOMP_UNSUPPORTED = 2, SPARSECOMP_NO_MEMORY = 3 };

/* Element types of weights and activations. I8_A8 is of N:M weights: int8 whose product rounds the activations to 8
 * bits and adds integers, where that of I8 is in fp32. */
enum { SPARSECOMP_F32 = 0, SPARSECOMP_F16 = 1, SPARSECOMP_BF16 = 2, SPARSECOMP_I8 = 3, SPARSECOMP_I8_A8 = 4 };

/* Activation functions, as torch.nn.functional defines them: max(0, v), v Phi(v) with the normal distribution function
 * Phi, its approximation by tanh, and v / (1 + exp(-v)). */
enum {
  SPARSECOMP_NO_ACTIVATION = 0,
  SPARSECOMP_RELU = 1,
  SPARSECOMP_GELU = 2,
  SPARSECOMP_GELU_TANH = 3,
  SPARSECOMP_SILU = 4
};

/* An N:M weight [out_features, in_features]; mask_rows consecutive rows share their metadata (1: none do). A row of an
 * I8_A8 weight keeps at most 65536 weights, so that its sums fit 32 bits. Where N = M it has no metadata, canonical or
 * not: pointers to it are not followed and may be NULL. */
typedef struct sparsecomp_nm {
  int64_t out_features;
  int64_t in_features;
  int32_t n;
  int32_t m;
  int32_t mask_rows;
  int32_t dtype;
} sparsecomp_nm;

/* What becomes of the product before it is rounded and stored: activation(x W^T + bias), in fp32. */
typedef struct sparsecomp_epilogue {
  const void* bias; /* [out_features] of the dtype of x and y, or NULL */
  int32_t activation;
} sparsecomp_epilogue;

SPARSECOMP_API const char* sparsecomp_error_text(int code);

/* Name of the instruction set in use: "avx512_bf16", "avx512", "avx2_vnni", "avx2", "neon_dotprod", "neon" or
 * "reference". Chosen once at load from what the processor and the OS say; the environment variable SPARSECOMP_ISA
 * names a lower one. */
SPARSECOMP_API const char* sparsecomp_isa(void);
/* All instruction sets this machine can run, best first, separated by commas. */
SPARSECOMP_API const char* sparsecomp_isa_available(void);
/* NULL, or one sentence if SPARSECOMP_ISA names a set this machine cannot run (the best one is in use then). */
SPARSECOMP_API const char* sparsecomp_isa_error(void);

/* Bytes of the kernel layout of a weight; -1 if the description is not valid. */
SPARSECOMP_API int64_t sparsecomp_nm_values_bytes(const sparsecomp_nm* weight);
SPARSECOMP_API int64_t sparsecomp_nm_metadata_bytes(const sparsecomp_nm* weight);

/* canonical form (docs/format.md) -> kernel layout, and back exactly. The layout does not depend on the ISA. */
SPARSECOMP_API int sparsecomp_nm_pack(const sparsecomp_nm* weight, const void* canonical_values,
                                      const uint8_t* canonical_metadata, void* values, void* metadata);
SPARSECOMP_API int sparsecomp_nm_unpack(const sparsecomp_nm* weight, const void* values, const void* metadata,
                                        void* canonical_values, uint8_t* canonical_metadata);
/* kernel layout -> dense weight [out_features, in_features] of the weight's dtype. */
SPARSECOMP_API int sparsecomp_nm_to_dense(const sparsecomp_nm* weight, const void* values, const void* metadata,
                                          void* dense, int threads);

/* y [batch, out_features] = epilogue(x [batch, in_features] W^T); sums are fp32. W is `values` times `scales`
 * [out_features], one for each row, or `values` alone where scales are NULL. `dtype` is that of x, the bias and y: the
 * weight's own, or F32, F16 or BF16 for an int8 weight. With an I8_A8 weight each row of x is first rounded to integers
 * q from -127 to 127, x = (q - zero point) * scale with scale = (max(0, largest) - min(0, smallest)) / 254; sums are
 * int32, and a row of x that holds Inf or NaN makes its row of y NaN.
 * ldx and ldy are in elements; epilogue may be NULL; threads <= 0 means all cores.
 * y must not overlap what is read. */
SPARSECOMP_API int sparsecomp_nm_linear(const sparsecomp_nm* weight, const void* values, const void* metadata,
                                        const float* scales, int32_t dtype, const void* x, int64_t ldx, int64_t batch,
                                        const sparsecomp_epilogue* epilogue, void* y, int64_t ldy, int threads);

/* A block-sparse weight [out_features, in_features]: `kept` whole blocks of rows x cols hold the nonzeros. */
typedef struct sparsecomp_block {
  int64_t out_features;
  int64_t in_features;
  int32_t rows;
  int32_t cols;
  int64_t kept;
  int32_t dtype;
} sparsecomp_block;

/* As the functions of N:M weights above. Canonical values are [kept, rows, cols], canonical metadata is the bitmap of
 * the kept blocks; a bitmap that does not name `kept` blocks, or a damaged layout, is SPARSECOMP_INVALID. There is no
 * product of int8 blocks: its code is SPARSECOMP_UNSUPPORTED. */
SPARSECOMP_API int64_t sparsecomp_block_values_bytes(const sparsecomp_block* weight);
SPARSECOMP_API int64_t sparsecomp_block_metadata_bytes(const sparsecomp_block* weight);
SPARSECOMP_API int sparsecomp_block_pack(const sparsecomp_block* weight, const void* canonical_values,
                                         const uint8_t* canonical_metadata, void* values, void* metadata);
SPARSECOMP_API int sparsecomp_block_unpack(const sparsecomp_block* weight, const void* values, const void* metadata,
                                           void* canonical_values, uint8_t* canonical_metadata);
SPARSECOMP_API int sparsecomp_block_to_dense(const sparsecomp_block* weight, const void* values, const void* metadata,
                                             void* dense, int threads);
SPARSECOMP_API int sparsecomp_block_linear(const sparsecomp_block* weight, const void* values, const void* metadata,
                                           const float* scales, int32_t dtype, const void* x, int64_t ldx,
                                           int64_t batch, const sparsecomp_epilogue* epilogue, void* y, int64_t ldy,
                                           int threads);

/* values[i] = source[index[i]] for `count` elements of 2 or 4 bytes; 0 where an index is not one of the `size` elements
 * of the source, as a negative one. With where every value of a kernel layout lies in the dense weight, it puts new
 * values into the layout of a weight whose positions stayed as they were. threads <= 0 means all cores. */
SPARSECOMP_API int sparsecomp_gather(int32_t bytes, const void* source, int64_t size, const int32_t* index,
                                     int64_t count, void* values, int threads);

/* Measured peaks of this machine, for the roofline bound. */
/* Multiply-adds in registers, each counted as 2, per second: the best of three rounds of so many seconds. Those of
 * I8_A8 are of bytes. */
SPARSECOMP_API double sparsecomp_measure_flops(int32_t dtype, int threads, double seconds);
SPARSECOMP_API double sparsecomp_measure_read_bandwidth(int threads);
/* Pairs per second, on one thread, of the permute that finds activations in groups of so many columns (4, 8, 16) and
 * its multiply-add; 1: of a multiply-add alone, with a memory operand. 0 where the instruction set in use chooses no
 * kernel by it. Measured at the first call or product of a process, for half a millisecond. */
SPARSECOMP_API double sparsecomp_pair_rate(int32_t columns); /* bytes per second, DRAM */

#ifdef __cplusplus
}
#endif
#endif
