// The C ABI of N:M weights: checks its arguments and hands over to the layout, the kernels or the reference.
#include "int8/api.hpp"
#include "common/pages.hpp"
#include "common/parallel.hpp"
#include "dispatch.hpp"
#include "nm/choice.hpp"
#include "nm/layout.hpp"
#include "nm/panel.hpp"
#include "nm/permute.hpp"
#include "nm/reference.hpp"
#include "sparsecomp.h"

using sparsecomp::Geometry;

namespace {

// Below this many stored weights a second thread costs more than it saves.
constexpr int64_t kManyWeights = 1 << 18;

// Weights that the family of int8 products serves, from their layout on.
bool rounds_activations(const sparsecomp_nm* weight) { return weight && weight->dtype == SPARSECOMP_I8_A8; }

// Packing is set-up work: it takes every core.
template <class Function>
int for_tiles(const Geometry& g, int threads, const Function& function) {
  const bool many = g.tiles * g.steps * g.slots * sparsecomp::kTile >= kManyWeights;
  sparsecomp::parallel_for(many ? sparsecomp::resolve_threads(threads) : 1, g.tiles, function);
  return SPARSECOMP_OK;
}

}  // namespace

extern "C" {

int64_t sparsecomp_nm_values_bytes(const sparsecomp_nm* weight) {
  if (rounds_activations(weight)) return sparsecomp::int8::values_bytes(*weight);
  Geometry g;
  return weight && make_geometry(*weight, &g) ? g.tiles * g.steps * g.value_bytes : -1;
}

int64_t sparsecomp_nm_metadata_bytes(const sparsecomp_nm* weight) {
  if (rounds_activations(weight)) return sparsecomp::int8::metadata_bytes(*weight);
  Geometry g;
  return weight && make_geometry(*weight, &g) ? g.tiles * g.steps * g.metadata_bytes : -1;
}

int sparsecomp_nm_pack(const sparsecomp_nm* weight, const void* canonical_values, const uint8_t* canonical_metadata,
                       void* values, void* metadata) {
  if (rounds_activations(weight))
    return sparsecomp::int8::pack(*weight, canonical_values, canonical_metadata, values, metadata);
  Geometry g;
  if (!weight || !make_geometry(*weight, &g)) return SPARSECOMP_INVALID;
  if (g.out == 0 || g.in == 0) return SPARSECOMP_OK;
  if (!canonical_values || !canonical_metadata || !values || !metadata) return SPARSECOMP_INVALID;
  const int64_t value_bytes = g.tiles * g.steps * g.value_bytes, metadata_bytes = g.tiles * g.steps * g.metadata_bytes;
  sparsecomp::prefer_huge_pages(values, value_bytes);
  sparsecomp::prefer_huge_pages(metadata, metadata_bytes);
  const int code = for_tiles(g, 0, [&](int64_t tile) {
    pack_tile(g, tile, static_cast<const uint8_t*>(canonical_values), canonical_metadata, static_cast<uint8_t*>(values),
              static_cast<uint8_t*>(metadata));
  });
  sparsecomp::gather_huge_pages(values, value_bytes);
  sparsecomp::gather_huge_pages(metadata, metadata_bytes);
  return code;
}

int sparsecomp_nm_unpack(const sparsecomp_nm* weight, const void* values, const void* metadata, void* canonical_values,
                         uint8_t* canonical_metadata) {
  if (rounds_activations(weight))
    return sparsecomp::int8::unpack(*weight, values, metadata, canonical_values, canonical_metadata);
  Geometry g;
  if (!weight || !make_geometry(*weight, &g)) return SPARSECOMP_INVALID;
  if (g.out == 0 || g.in == 0) return SPARSECOMP_OK;
  if (!canonical_values || !canonical_metadata || !values || !metadata) return SPARSECOMP_INVALID;
  return for_tiles(g, 0, [&](int64_t tile) {
    unpack_tile(g, tile, static_cast<const uint8_t*>(values), static_cast<const uint8_t*>(metadata),
                static_cast<uint8_t*>(canonical_values), canonical_metadata);
  });
}

int sparsecomp_nm_to_dense(const sparsecomp_nm* weight, const void* values, const void* metadata, void* dense,
                           int threads) {
  if (rounds_activations(weight)) return sparsecomp::int8::to_dense(*weight, values, metadata, dense, threads);
  Geometry g;
  if (!weight || !make_geometry(*weight, &g)) return SPARSECOMP_INVALID;
  if (g.out == 0 || g.in == 0) return SPARSECOMP_OK;
  if (!dense || !values || !metadata) return SPARSECOMP_INVALID;
  return for_tiles(g, threads, [&](int64_t tile) {
    tile_to_dense(g, tile, static_cast<const uint8_t*>(values), static_cast<const uint8_t*>(metadata),
                  static_cast<uint8_t*>(dense));
  });
}

int sparsecomp_nm_linear(const sparsecomp_nm* weight, const void* values, const void* metadata, const float* scales,
                         int32_t dtype, const void* x, int64_t ldx, int64_t batch, const sparsecomp_epilogue* epilogue,
                         void* y, int64_t ldy, int threads) {
  const sparsecomp_epilogue last = epilogue ? *epilogue : sparsecomp_epilogue{};
  const sparsecomp::LinearCall call{static_cast<const uint8_t*>(values),
                                    static_cast<const uint8_t*>(metadata),
                                    scales,
                                    dtype,
                                    x,
                                    ldx,
                                    batch,
                                    last,
                                    y,
                                    ldy,
                                    sparsecomp::resolve_threads(threads)};
  if (rounds_activations(weight)) return sparsecomp::int8::linear(*weight, call);
  Geometry g;
  if (!weight || !make_geometry(*weight, &g) || batch < 0) return SPARSECOMP_INVALID;
  if (!sparsecomp::known_activation(last.activation)) return SPARSECOMP_INVALID;
  if (dtype < SPARSECOMP_F32 || dtype > SPARSECOMP_BF16) return SPARSECOMP_UNSUPPORTED;
  if (g.dtype != SPARSECOMP_I8 && g.dtype != dtype) return SPARSECOMP_UNSUPPORTED;
  if (g.out == 0 || batch == 0) return SPARSECOMP_OK;
  if (batch > 1 && (ldx < g.in || ldy < g.out)) return SPARSECOMP_INVALID;
  if (!y || (g.in > 0 && (!x || !values || !metadata))) return SPARSECOMP_INVALID;
  const sparsecomp::Dispatch& dispatch = sparsecomp::dispatch();
  if (!dispatch.isa) {
    sparsecomp::reference_linear(g, call);
    return SPARSECOMP_OK;
  }
  const sparsecomp::Processor& processor = sparsecomp::processor(*dispatch.isa);
  const sparsecomp::PanelSet* panels = dispatch.nm->select_panels(g, processor);
  if (panels && panels_pay(*panels, g, batch, call.threads, processor.rates))
    return sparsecomp::panel_linear(*dispatch.isa, *panels, g, call, processor);
  return sparsecomp::permute_linear(*dispatch.isa, *dispatch.nm->select(g, processor), g, call, processor);
}

}  // extern "C"
