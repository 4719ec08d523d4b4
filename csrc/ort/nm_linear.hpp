// The kernel of sparsecomp::NMLinear in ONNX Runtime: canonical constants -> kernel layout once, then one product per
// run.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ort_api.hpp"
#include "sparsecomp.h"

namespace sparsecomp::ort {

// Inputs of the operator; the attributes are those of the function body in sparsecomp/onnx/function.py.
enum Input : size_t { kX = 0, kValues = 1, kMetadata = 2, kBias = 3, kInputs = 4 };

class NMLinear {
 public:
  // Throws std::runtime_error for weights that are not constant or do not fit the attributes.
  NMLinear(const Api& api, const OrtKernelInfo* info, int32_t dtype, int32_t activation);
  void compute(OrtKernelContext* context) const;

 private:
  struct Free {
    void operator()(void* pointer) const;
  };
  using Buffer = std::unique_ptr<void, Free>;
  static Buffer allocate(int64_t bytes);

  // Consecutive rows of the weight, packed by themselves: one task of the session's own thread pool. A second pool
  // beside it would fight for the cores, as its idle threads spin.
  struct Slice {
    sparsecomp_nm weight;
    int64_t first_row;
    Buffer values, metadata;
  };
  void add_slice(int64_t first_row, int64_t rows, const uint8_t* values, const uint8_t* metadata);

  Api api_;
  sparsecomp_nm weight_{};
  int32_t activation_;
  int64_t row_values_bytes_ = 0, tile_metadata_bytes_ = 0;
  int64_t cores_ = 1;
  std::vector<Slice> slices_;
};

// Products computed since the library was loaded, over all sessions.
int64_t runs();

}  // namespace sparsecomp::ort
