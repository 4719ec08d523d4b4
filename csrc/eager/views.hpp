// Questions about a tensor that was viewed: its type, its size, and whether its elements can be read where they are.
#ifndef SPARSECOMP_EAGER_VIEWS_HPP
#define SPARSECOMP_EAGER_VIEWS_HPP

#include <cstdint>

#include "dlpack.hpp"

namespace dlpack {

inline bool same(const Type& a, const Type& b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

inline int64_t elements(const Tensor& view) {
  int64_t count = 1;
  for (int32_t i = 0; i < view.dims; ++i) count *= view.shape[i];
  return count;
}

inline const char* start(const Tensor& view) {
  return view.data == nullptr ? nullptr : static_cast<const char*>(view.data) + view.byte_offset;
}

inline bool contiguous(const Tensor& view) {
  int64_t expected = 1;
  for (int32_t i = view.dims - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

// Whether a tensor of the kernel still holds its bytes in one piece.
inline bool holds(const Tensor& view, int64_t bytes) {
  const int64_t count = elements(view);
  if (count * view.dtype.bits != 8 * bytes || view.dtype.lanes != 1) return false;
  return count == 0 || (view.data != nullptr && contiguous(view));
}

// The distance between rows of x [..., columns], if its rows can be read where they are; else -1.
inline int64_t row_step(const Tensor& x, int64_t columns) {
  const int32_t last = x.dims - 1;
  if (columns > 1 && x.strides[last] != 1) return -1;
  int64_t step = -1, rows = 1;
  for (int32_t i = last - 1; i >= 0; --i) {
    if (x.shape[i] == 1) continue;
    if (step < 0) {
      step = x.strides[i];
    } else if (x.strides[i] != step * rows) {
      return -1;
    }
    rows *= x.shape[i];
  }
  if (step < 0) return columns;
  return step >= columns ? step : -1;
}

}  // namespace dlpack

#endif
