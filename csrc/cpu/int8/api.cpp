#include "int8/api.hpp"

#include "common/pages.hpp"
#include "common/parallel.hpp"
#include "dispatch.hpp"
#include "int8/layout.hpp"
#include "int8/linear.hpp"
#include "int8/reference.hpp"

namespace sparsecomp::int8 {
namespace {

// Below this many stored weights a second thread costs more than it saves.
constexpr int64_t kManyWeights = 1 << 16;

template <class Function>
int for_tiles(const Geometry& g, int threads, const Function& function) {
  parallel_for(g.blocks_bytes() >= kManyWeights ? resolve_threads(threads) : 1, g.tiles, function);
  return SPARSECOMP_OK;
}

// Whether there is no memory where metadata has to be.
bool lacks(const Geometry& g, const void* metadata) { return !g.dense && !metadata; }

}  // namespace

int64_t values_bytes(const sparsecomp_nm& weight) {
  Geometry g;
  return make_geometry(weight, &g) ? g.values_bytes() : -1;
}

int64_t metadata_bytes(const sparsecomp_nm& weight) {
  Geometry g;
  return make_geometry(weight, &g) ? g.tiles * g.rounds * g.metadata_bytes : -1;
}

int pack(const sparsecomp_nm& weight, const void* canonical_values, const uint8_t* canonical_metadata, void* values,
         void* metadata) {
  Geometry g;
  if (!make_geometry(weight, &g)) return SPARSECOMP_INVALID;
  if (g.out == 0 || g.in == 0) return SPARSECOMP_OK;
  if (!canonical_values || !values || lacks(g, canonical_metadata) || lacks(g, metadata)) return SPARSECOMP_INVALID;
  const int64_t metadata_size = g.tiles * g.rounds * g.metadata_bytes;
  prefer_huge_pages(values, g.values_bytes());
  prefer_huge_pages(metadata, metadata_size);
  const int code = for_tiles(g, 0, [&](int64_t tile) {
    pack_tile(g, tile, static_cast<const int8_t*>(canonical_values), canonical_metadata, static_cast<uint8_t*>(values),
              static_cast<uint8_t*>(metadata));
  });
  gather_huge_pages(values, g.values_bytes());
  gather_huge_pages(metadata, metadata_size);
  return code;
}

int unpack(const sparsecomp_nm& weight, const void* values, const void* metadata, void* canonical_values,
           uint8_t* canonical_metadata) {
  Geometry g;
  if (!make_geometry(weight, &g)) return SPARSECOMP_INVALID;
  if (g.out == 0 || g.in == 0) return SPARSECOMP_OK;
  if (!canonical_values || !values || lacks(g, canonical_metadata) || lacks(g, metadata)) return SPARSECOMP_INVALID;
  return for_tiles(g, 0, [&](int64_t tile) {
    unpack_tile(g, tile, static_cast<const uint8_t*>(values), static_cast<const uint8_t*>(metadata),
                static_cast<int8_t*>(canonical_values), canonical_metadata);
  });
}

int to_dense(const sparsecomp_nm& weight, const void* values, const void* metadata, void* dense, int threads) {
  Geometry g;
  if (!make_geometry(weight, &g)) return SPARSECOMP_INVALID;
  if (g.out == 0 || g.in == 0) return SPARSECOMP_OK;
  if (!dense || !values || lacks(g, metadata)) return SPARSECOMP_INVALID;
  return for_tiles(g, threads, [&](int64_t tile) {
    tile_to_dense(g, tile, static_cast<const uint8_t*>(values), static_cast<const uint8_t*>(metadata),
                  static_cast<int8_t*>(dense));
  });
}

int linear(const sparsecomp_nm& weight, const LinearCall& call) {
  Geometry g;
  if (!make_geometry(weight, &g) || call.batch < 0 || !known_activation(call.epilogue.activation))
    return SPARSECOMP_INVALID;
  if (call.dtype < SPARSECOMP_F32 || call.dtype > SPARSECOMP_BF16) return SPARSECOMP_UNSUPPORTED;
  if (g.out == 0 || call.batch == 0) return SPARSECOMP_OK;
  if (call.batch > 1 && (call.ldx < g.in || call.ldy < g.out)) return SPARSECOMP_INVALID;
  if (!call.y || (g.in > 0 && (!call.x || !call.values || lacks(g, call.metadata)))) return SPARSECOMP_INVALID;
  const Dispatch& found = dispatch();
  // without columns there are no sums of rows either
  if (!found.int8 || g.in == 0) {
    reference_linear(g, call);
    return SPARSECOMP_OK;
  }
  return linear(*found.isa, *found.int8, g, call, processor(*found.isa));
}

}  // namespace sparsecomp::int8
