// How Python's integers become descriptions of weights, pointers and thread counts, and error codes exceptions.
#ifndef SPARSECOMP_PYTHON_ARGUMENTS_HPP
#define SPARSECOMP_PYTHON_ARGUMENTS_HPP

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>

#include "sparsecomp.h"

inline PyObject* raise_code(int code) {
  PyErr_SetString(PyExc_RuntimeError, sparsecomp_error_text(code));
  return nullptr;
}

// Any integer; the library cuts down what no machine has.
inline int thread_count(int64_t value) {
  constexpr int64_t kMost = 1 << 20;
  return static_cast<int>(value < 0 ? 0 : value > kMost ? kMost : value);
}

inline int32_t narrow(int64_t value, int32_t otherwise) {
  return value == static_cast<int32_t>(value) ? static_cast<int32_t>(value) : otherwise;
}

// The first six integers of every nm_ function. Values beyond int32 become 0, which no description allows as M.
template <size_t Count>
sparsecomp_nm weight_of(const std::array<int64_t, Count>& v) {
  const bool dtype = v[5] == static_cast<int32_t>(v[5]);
  return {v[0], v[1], narrow(v[2], 0), dtype ? narrow(v[3], 0) : 0, narrow(v[4], 0), narrow(v[5], 0)};
}

// The first six integers of every block_ function. Values beyond int32 become 0, which no description allows.
template <size_t Count>
sparsecomp_block block_of(const std::array<int64_t, Count>& v) {
  const bool dtype = v[5] == static_cast<int32_t>(v[5]);
  return {v[0], v[1], dtype ? narrow(v[2], 0) : 0, narrow(v[3], 0), v[4], narrow(v[5], 0)};
}

#endif
