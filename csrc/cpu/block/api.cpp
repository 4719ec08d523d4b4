// The C ABI of block-sparse weights: checks its arguments and hands over to the layout, the kernels or the reference.
#include "block/layout.hpp"
#include "block/linear.hpp"
#include "block/reference.hpp"
#include "common/pages.hpp"
#include "common/parallel.hpp"
#include "dispatch.hpp"
#include "sparsecomp.h"

using sparsecomp::BlockGeometry;

namespace {

const uint8_t* bytes(const void* data) { return static_cast<const uint8_t*>(data); }
uint8_t* bytes(void* data) { return static_cast<uint8_t*>(data); }

bool valid(const sparsecomp_block* weight, BlockGeometry* g) { return weight && make_block_geometry(*weight, g); }

// Values may be absent where there are none.
bool present(const BlockGeometry& g, const void* values, const void* metadata) {
  return metadata && (values || g.kept == 0);
}

int code(bool done) { return done ? SPARSECOMP_OK : SPARSECOMP_INVALID; }

}  // namespace

extern "C" {

int64_t sparsecomp_block_values_bytes(const sparsecomp_block* weight) {
  BlockGeometry g;
  return valid(weight, &g) ? g.values_bytes() : -1;
}

int64_t sparsecomp_block_metadata_bytes(const sparsecomp_block* weight) {
  BlockGeometry g;
  return valid(weight, &g) ? g.metadata_bytes() : -1;
}

int sparsecomp_block_pack(const sparsecomp_block* weight, const void* canonical_values,
                          const uint8_t* canonical_metadata, void* values, void* metadata) {
  BlockGeometry g;
  if (!valid(weight, &g) || !present(g, canonical_values, metadata) || !present(g, values, metadata))
    return SPARSECOMP_INVALID;
  if (!canonical_metadata && g.down * g.across > 0) return SPARSECOMP_INVALID;
  sparsecomp::prefer_huge_pages(values, g.values_bytes());
  const bool done = pack_blocks(g, bytes(canonical_values), canonical_metadata, bytes(values), bytes(metadata));
  if (done) sparsecomp::gather_huge_pages(values, g.values_bytes());
  return code(done);
}

int sparsecomp_block_unpack(const sparsecomp_block* weight, const void* values, const void* metadata,
                            void* canonical_values, uint8_t* canonical_metadata) {
  BlockGeometry g;
  if (!valid(weight, &g) || !present(g, values, metadata) || !present(g, canonical_values, metadata))
    return SPARSECOMP_INVALID;
  if (!canonical_metadata && g.down * g.across > 0) return SPARSECOMP_INVALID;
  return code(unpack_blocks(g, bytes(values), bytes(metadata), bytes(canonical_values), canonical_metadata));
}

int sparsecomp_block_to_dense(const sparsecomp_block* weight, const void* values, const void* metadata, void* dense,
                              int threads) {
  BlockGeometry g;
  if (!valid(weight, &g) || !present(g, values, metadata)) return SPARSECOMP_INVALID;
  if (g.out == 0 || g.in == 0) return SPARSECOMP_OK;
  if (!dense) return SPARSECOMP_INVALID;
  return code(blocks_to_dense(g, bytes(values), bytes(metadata), bytes(dense), sparsecomp::resolve_threads(threads)));
}

int sparsecomp_block_linear(const sparsecomp_block* weight, const void* values, const void* metadata,
                            const float* scales, int32_t dtype, const void* x, int64_t ldx, int64_t batch,
                            const sparsecomp_epilogue* epilogue, void* y, int64_t ldy, int threads) {
  BlockGeometry g;
  if (!valid(weight, &g) || batch < 0) return SPARSECOMP_INVALID;
  const sparsecomp_epilogue last = epilogue ? *epilogue : sparsecomp_epilogue{};
  if (!sparsecomp::known_activation(last.activation)) return SPARSECOMP_INVALID;
  if (g.dtype == SPARSECOMP_I8 || g.dtype != dtype) return SPARSECOMP_UNSUPPORTED;
  if (g.out == 0 || batch == 0) return SPARSECOMP_OK;
  if (batch > 1 && (ldx < g.in || ldy < g.out)) return SPARSECOMP_INVALID;
  if (!y || !present(g, values, metadata) || (g.in > 0 && !x)) return SPARSECOMP_INVALID;
  const sparsecomp::LinearCall call{
      bytes(values), bytes(metadata), scales, dtype, x, ldx, batch, last, y, ldy, sparsecomp::resolve_threads(threads)};
  const sparsecomp::Dispatch& dispatch = sparsecomp::dispatch();
  if (!dispatch.blocks) return sparsecomp::block_reference(g, call);
  return sparsecomp::block_linear(*dispatch.isa, *dispatch.blocks, g, call);
}

}  // extern "C"
