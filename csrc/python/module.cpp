// Python module `_native`: the C ABI with raw pointers as integers, and the eager call. Stable ABI of Python 3.10.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>

#include "arguments.hpp"
#include "eager.hpp"
#include "layer_call.hpp"
#include "sparsecomp.h"
#include "torch_functions.hpp"

namespace {

// Every argument of every function is an integer; `Count` of them.
template <size_t Count>
bool read_integers(const char* name, PyObject* const* args, Py_ssize_t given, std::array<int64_t, Count>* values) {
  if (given != static_cast<Py_ssize_t>(Count)) {
    PyErr_Format(PyExc_TypeError, "%s takes %zu integers, got %zd arguments", name, Count, given);
    return false;
  }
  for (size_t i = 0; i < Count; ++i) {
    (*values)[i] = PyLong_AsLongLong(args[i]);
    if ((*values)[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

template <class T>
T* pointer(int64_t value) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
}

PyObject* isa(PyObject*, PyObject*) {
  if (const char* error = sparsecomp_isa_error()) {
    PyErr_SetString(PyExc_RuntimeError, error);
    return nullptr;
  }
  return PyUnicode_FromString(sparsecomp_isa());
}

PyObject* isa_available(PyObject*, PyObject*) { return PyUnicode_FromString(sparsecomp_isa_available()); }

PyObject* byte_count(const char* name, int64_t (*function)(const sparsecomp_nm*), PyObject* const* args,
                     Py_ssize_t given) {
  std::array<int64_t, 6> v;
  if (!read_integers(name, args, given, &v)) return nullptr;
  const sparsecomp_nm weight = weight_of(v);
  const int64_t bytes = function(&weight);
  return bytes < 0 ? raise_code(SPARSECOMP_INVALID) : PyLong_FromLongLong(bytes);
}

PyObject* nm_values_bytes(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return byte_count("nm_values_bytes", sparsecomp_nm_values_bytes, args, given);
}

PyObject* nm_metadata_bytes(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return byte_count("nm_metadata_bytes", sparsecomp_nm_metadata_bytes, args, given);
}

PyObject* none_or_error(int code) {
  if (code != SPARSECOMP_OK) return raise_code(code);
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* nm_pack(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 10> v;
  if (!read_integers("nm_pack", args, given, &v)) return nullptr;
  const sparsecomp_nm weight = weight_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_nm_pack(&weight, pointer<const void>(v[6]), pointer<const uint8_t>(v[7]), pointer<void>(v[8]),
                            pointer<void>(v[9]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

PyObject* nm_unpack(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 10> v;
  if (!read_integers("nm_unpack", args, given, &v)) return nullptr;
  const sparsecomp_nm weight = weight_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_nm_unpack(&weight, pointer<const void>(v[6]), pointer<const void>(v[7]), pointer<void>(v[8]),
                              pointer<uint8_t>(v[9]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

PyObject* nm_to_dense(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 10> v;
  if (!read_integers("nm_to_dense", args, given, &v)) return nullptr;
  const sparsecomp_nm weight = weight_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_nm_to_dense(&weight, pointer<const void>(v[6]), pointer<const void>(v[7]), pointer<void>(v[8]),
                                thread_count(v[9]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

// The last step of nm_linear and block_linear, whose arguments stand in the same places.
sparsecomp_epilogue epilogue_of(const std::array<int64_t, 18>& v) {
  return {pointer<const float>(v[12]), pointer<const void>(v[13]), narrow(v[14], -1)};
}

PyObject* nm_linear(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 18> v;
  if (!read_integers("nm_linear", args, given, &v)) return nullptr;
  const sparsecomp_nm weight = weight_of(v);
  const sparsecomp_epilogue epilogue = epilogue_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_nm_linear(&weight, pointer<const void>(v[6]), pointer<const void>(v[7]), narrow(v[8], -1),
                              pointer<const void>(v[9]), v[10], v[11], &epilogue, pointer<void>(v[15]), v[16],
                              thread_count(v[17]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

PyObject* block_byte_count(const char* name, int64_t (*function)(const sparsecomp_block*), PyObject* const* args,
                           Py_ssize_t given) {
  std::array<int64_t, 6> v;
  if (!read_integers(name, args, given, &v)) return nullptr;
  const sparsecomp_block weight = block_of(v);
  const int64_t bytes = function(&weight);
  return bytes < 0 ? raise_code(SPARSECOMP_INVALID) : PyLong_FromLongLong(bytes);
}

PyObject* block_values_bytes(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return block_byte_count("block_values_bytes", sparsecomp_block_values_bytes, args, given);
}

PyObject* block_metadata_bytes(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return block_byte_count("block_metadata_bytes", sparsecomp_block_metadata_bytes, args, given);
}

PyObject* block_pack(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 10> v;
  if (!read_integers("block_pack", args, given, &v)) return nullptr;
  const sparsecomp_block weight = block_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_block_pack(&weight, pointer<const void>(v[6]), pointer<const uint8_t>(v[7]), pointer<void>(v[8]),
                               pointer<void>(v[9]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

PyObject* block_unpack(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 10> v;
  if (!read_integers("block_unpack", args, given, &v)) return nullptr;
  const sparsecomp_block weight = block_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_block_unpack(&weight, pointer<const void>(v[6]), pointer<const void>(v[7]), pointer<void>(v[8]),
                                 pointer<uint8_t>(v[9]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

PyObject* block_to_dense(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 10> v;
  if (!read_integers("block_to_dense", args, given, &v)) return nullptr;
  const sparsecomp_block weight = block_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_block_to_dense(&weight, pointer<const void>(v[6]), pointer<const void>(v[7]), pointer<void>(v[8]),
                                   thread_count(v[9]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

PyObject* block_linear(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 18> v;
  if (!read_integers("block_linear", args, given, &v)) return nullptr;
  const sparsecomp_block weight = block_of(v);
  const sparsecomp_epilogue epilogue = epilogue_of(v);
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = sparsecomp_block_linear(&weight, pointer<const void>(v[6]), pointer<const void>(v[7]), narrow(v[8], -1),
                                 pointer<const void>(v[9]), v[10], v[11], &epilogue, pointer<void>(v[15]), v[16],
                                 thread_count(v[17]));
  Py_END_ALLOW_THREADS;
  return none_or_error(code);
}

PyObject* measure_flops(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 3> v;
  if (!read_integers("measure_flops", args, given, &v)) return nullptr;
  double rate;
  Py_BEGIN_ALLOW_THREADS;
  rate = sparsecomp_measure_flops(static_cast<int32_t>(v[0]), thread_count(v[1]), 1e-6 * static_cast<double>(v[2]));
  Py_END_ALLOW_THREADS;
  return PyFloat_FromDouble(rate);
}

PyObject* measure_read_bandwidth(PyObject*, PyObject* const* args, Py_ssize_t given) {
  std::array<int64_t, 1> v;
  if (!read_integers("measure_read_bandwidth", args, given, &v)) return nullptr;
  double rate;
  Py_BEGIN_ALLOW_THREADS;
  rate = sparsecomp_measure_read_bandwidth(thread_count(v[0]));
  Py_END_ALLOW_THREADS;
  return PyFloat_FromDouble(rate);
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef fast(const char* name, FastCall function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

#define WEIGHT "out, in, n, m, mask_rows, dtype"
#define BLOCK_WEIGHT "out, in, rows, cols, kept, dtype"

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS,
     "isa() -> str: the instruction set in use. Raises RuntimeError if SPARSECOMP_ISA names one that cannot run here."},
    {"isa_available", isa_available, METH_NOARGS, "isa_available() -> str: all that can run, best first, with commas."},
    fast("nm_values_bytes", nm_values_bytes, "nm_values_bytes(" WEIGHT ") -> int: bytes of the layout's values."),
    fast("nm_metadata_bytes", nm_metadata_bytes, "nm_metadata_bytes(" WEIGHT ") -> int: bytes of its metadata."),
    fast("nm_pack", nm_pack,
         "nm_pack(" WEIGHT ", canonical_values, canonical_metadata, values, metadata): canonical form -> layout."),
    fast("nm_unpack", nm_unpack,
         "nm_unpack(" WEIGHT ", values, metadata, canonical_values, canonical_metadata): layout -> canonical form."),
    fast("nm_to_dense", nm_to_dense,
         "nm_to_dense(" WEIGHT ", values, metadata, dense, threads): layout -> dense weight [out, in]."),
    fast("nm_linear", nm_linear,
         "nm_linear(" WEIGHT
         ", values, metadata, x dtype, x, ldx, batch, row_scales or 0, bias or 0, activation, y, ldy, threads):"
         " y = activation(row_scales * x W^T + bias)."),
    fast("block_values_bytes", block_values_bytes, "block_values_bytes(" BLOCK_WEIGHT ") -> int: as nm_values_bytes."),
    fast("block_metadata_bytes", block_metadata_bytes,
         "block_metadata_bytes(" BLOCK_WEIGHT ") -> int: as nm_metadata_bytes."),
    fast("block_pack", block_pack,
         "block_pack(" BLOCK_WEIGHT ", canonical_values, canonical_metadata, values, metadata): as nm_pack."),
    fast("block_unpack", block_unpack,
         "block_unpack(" BLOCK_WEIGHT ", values, metadata, canonical_values, canonical_metadata): as nm_unpack."),
    fast("block_to_dense", block_to_dense,
         "block_to_dense(" BLOCK_WEIGHT ", values, metadata, dense, threads): as nm_to_dense."),
    fast("block_linear", block_linear,
         "block_linear(" BLOCK_WEIGHT
         ", values, metadata, x dtype, x, ldx, batch, row_scales or 0, bias or 0, activation, y, ldy, threads):"
         " as nm_linear."),
    fast("measure_flops", measure_flops,
         "measure_flops(dtype, threads, microseconds of a round) -> float: FLOP/s of multiply-adds, the best of three "
         "rounds."),
    fast("measure_read_bandwidth", measure_read_bandwidth, "measure_read_bandwidth(threads) -> float: bytes/s."),
    fast("torch_functions", torch_functions,
         "torch_functions(DLPack table, Tensor, Parameter, watchers, namespace of forward_ad, get_num_threads, "
         "is_grad_enabled, Tensor.is_neg, empty_strided_cpu, Tensor.contiguous) -> for eager_product, or None if the "
         "table is of another version."),
    fast("eager_product", eager_product,
         "eager_product(torch_functions(...), is block, (" WEIGHT
         "), x dtype, tensors, activation, otherwise, torch's dtype) -> "
         "product(x, bias, dense_above), which calls otherwise for gradients and from dense_above rows on."),
    fast("layer_call", layer_call,
         "layer_call(class of the layer, nn.Module, its globals, watchers, names of the product, of dense_above and of "
         "what stands for the weight) -> "
         "__call__ for the class, which calls the product at once where nothing surrounds the call. A watcher is a "
         "function that gives None where it does not watch."),
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_native",
                          "CPU kernels of sparsecomp; pointers are integers (tensor.data_ptr()).",
                          0,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
