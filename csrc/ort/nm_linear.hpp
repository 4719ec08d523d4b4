// The kernel of sparsecomp::NMLinear, NMLinearInt8 and LinearInt8 in ONNX Runtime: canonical constants -> kernel layout
// once, then one product per run.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ort_api.hpp"
#include "sparsecomp.h"

namespace sparsecomp::ort {

// Where an operator has its inputs, x being the first and values the second; 0 is what it has not. The attributes are
// those of the function bodies in sparsecomp/onnx/function.py.
struct Inputs {
  size_t metadata, scales, bias;

  size_t count() const { return bias + 1; }
};
constexpr size_t kX = 0, kValues = 1;
constexpr Inputs kFloats = {2, 0, 3}, kIntegers = {2, 3, 4}, kDenseIntegers = {0, 2, 3};

class NMLinear {
 public:
  // Throws std::runtime_error for weights that are not constant or do not fit the attributes.
  // `dtype` is that of x and y.
  NMLinear(const Api& api, const OrtKernelInfo* info, const Inputs& inputs, int32_t dtype, int32_t activation);
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

  void describe(const OrtKernelInfo* info, const std::vector<int64_t>& values_shape);
  // Bytes of a row of canonical metadata.
  int64_t check_metadata(const OrtKernelInfo* info, const OrtValue* metadata) const;
  void read_scales(const OrtKernelInfo* info);
  int64_t slots() const { return (weight_.in_features + weight_.m - 1) / weight_.m * weight_.n; }

  Api api_;
  Inputs inputs_;
  sparsecomp_nm weight_{};
  int32_t dtype_, activation_;
  std::vector<float> scales_;
  int64_t row_values_bytes_ = 0, tile_metadata_bytes_ = 0;
  int64_t cores_ = 1;
  std::vector<Slice> slices_;
};

// Products computed since the library was loaded, over all sessions.
int64_t runs();

}  // namespace sparsecomp::ort
