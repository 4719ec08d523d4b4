// Python module `_native`: the C ABI with pointers as integers, and what csrc/eager adds. Stable ABI of Python 3.10.
//
// What the module and csrc/eager hold does not change after it was made, so two threads may use one product. Where they
// borrow a reference from a container of Python's they count on the GIL. An interpreter without a GIL cannot load them:
// it has no stable ABI of Python 3.10, and its headers refuse Py_LIMITED_API. Built for one in another way, the module
// has no slot Py_mod_gil, so that the interpreter would turn its GIL on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>

#include "arguments.hpp"
#include "product.hpp"
#include "sparsecomp.h"
#include "torch_functions.hpp"

namespace {

template <size_t Count>
using Integers = std::array<int64_t, Count>;

// An integer of Python's where the C ABI takes a pointer of any kind.
struct Address {
  int64_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
  }
};

// What the functions below give, as Python sees it: an error code, a number of bytes (-1: not valid), or a rate.
PyObject* answer(int code) {
  if (code != SPARSECOMP_OK) return raise_code(code);
  Py_INCREF(Py_None);
  return Py_None;
}
PyObject* answer(int64_t bytes) { return bytes < 0 ? raise_code(SPARSECOMP_INVALID) : PyLong_FromLongLong(bytes); }
PyObject* answer(double rate) { return PyFloat_FromDouble(rate); }

// A method of Python's, all of whose arguments are integers, from a function of so many, which runs without the GIL.
template <auto Function>
struct Method;
template <class Result, size_t Count, Result (*Function)(const Integers<Count>&)>
struct Method<Function> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t given) {
    if (given != static_cast<Py_ssize_t>(Count)) {
      PyErr_Format(PyExc_TypeError, "this function takes %zu integers, got %zd arguments", Count, given);
      return nullptr;
    }
    Integers<Count> v;
    for (size_t i = 0; i < Count; ++i) {
      v[i] = PyLong_AsLongLong(args[i]);
      if (v[i] == -1 && PyErr_Occurred()) return nullptr;
    }
    PyThreadState* thread = PyEval_SaveThread();
    const Result result = Function(v);
    PyEval_RestoreThread(thread);
    return answer(result);
  }
};

// Two families of functions of the C ABI, whose arguments stand in the same places.
struct Nm {
  template <size_t Count>
  static sparsecomp_nm weight(const Integers<Count>& v) {
    return weight_of(v);
  }
  static constexpr auto values_bytes = sparsecomp_nm_values_bytes;
  static constexpr auto metadata_bytes = sparsecomp_nm_metadata_bytes;
  static constexpr auto pack = sparsecomp_nm_pack;
  static constexpr auto unpack = sparsecomp_nm_unpack;
  static constexpr auto to_dense = sparsecomp_nm_to_dense;
  static constexpr auto linear = sparsecomp_nm_linear;
};

struct Block {
  template <size_t Count>
  static sparsecomp_block weight(const Integers<Count>& v) {
    return block_of(v);
  }
  static constexpr auto values_bytes = sparsecomp_block_values_bytes;
  static constexpr auto metadata_bytes = sparsecomp_block_metadata_bytes;
  static constexpr auto pack = sparsecomp_block_pack;
  static constexpr auto unpack = sparsecomp_block_unpack;
  static constexpr auto to_dense = sparsecomp_block_to_dense;
  static constexpr auto linear = sparsecomp_block_linear;
};

template <class Family>
int64_t values_bytes(const Integers<6>& v) {
  const auto weight = Family::weight(v);
  return Family::values_bytes(&weight);
}

template <class Family>
int64_t metadata_bytes(const Integers<6>& v) {
  const auto weight = Family::weight(v);
  return Family::metadata_bytes(&weight);
}

template <class Family>
int pack(const Integers<10>& v) {
  const auto weight = Family::weight(v);
  return Family::pack(&weight, Address{v[6]}, Address{v[7]}, Address{v[8]}, Address{v[9]});
}

template <class Family>
int unpack(const Integers<10>& v) {
  const auto weight = Family::weight(v);
  return Family::unpack(&weight, Address{v[6]}, Address{v[7]}, Address{v[8]}, Address{v[9]});
}

template <class Family>
int to_dense(const Integers<10>& v) {
  const auto weight = Family::weight(v);
  return Family::to_dense(&weight, Address{v[6]}, Address{v[7]}, Address{v[8]}, thread_count(v[9]));
}

template <class Family>
int linear(const Integers<18>& v) {
  const auto weight = Family::weight(v);
  const sparsecomp_epilogue epilogue = {Address{v[13]}, narrow(v[14], -1)};
  return Family::linear(&weight, Address{v[6]}, Address{v[7]}, Address{v[12]}, narrow(v[8], -1), Address{v[9]}, v[10],
                        v[11], &epilogue, Address{v[15]}, v[16], thread_count(v[17]));
}

int gather(const Integers<7>& v) {
  return sparsecomp_gather(narrow(v[0], -1), Address{v[1]}, v[2], Address{v[3]}, v[4], Address{v[5]},
                           thread_count(v[6]));
}

double flops(const Integers<3>& v) {
  return sparsecomp_measure_flops(static_cast<int32_t>(v[0]), thread_count(v[1]), 1e-6 * static_cast<double>(v[2]));
}

double pair_rate(const Integers<1>& v) { return sparsecomp_pair_rate(narrow(v[0], -1)); }

double read_bandwidth(const Integers<1>& v) { return sparsecomp_measure_read_bandwidth(thread_count(v[0])); }

PyObject* isa(PyObject*, PyObject*) {
  if (const char* error = sparsecomp_isa_error()) {
    PyErr_SetString(PyExc_RuntimeError, error);
    return nullptr;
  }
  return PyUnicode_FromString(sparsecomp_isa());
}

PyObject* isa_available(PyObject*, PyObject*) { return PyUnicode_FromString(sparsecomp_isa_available()); }

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef fast(const char* name, FastCall function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

template <auto Function>
PyMethodDef of_integers(const char* name, const char* doc) {
  return fast(name, Method<Function>::call, doc);
}

#define WEIGHT "out, in, n, m, mask_rows, dtype"
#define BLOCK_WEIGHT "out, in, rows, cols, kept, dtype"

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS,
     "isa() -> str: the instruction set in use. Raises RuntimeError if SPARSECOMP_ISA names one that cannot run here."},
    {"isa_available", isa_available, METH_NOARGS, "isa_available() -> str: all that can run, best first, with commas."},
    of_integers<values_bytes<Nm>>("nm_values_bytes",
                                  "nm_values_bytes(" WEIGHT ") -> int: bytes of the layout's values."),
    of_integers<metadata_bytes<Nm>>("nm_metadata_bytes",
                                    "nm_metadata_bytes(" WEIGHT ") -> int: bytes of its metadata."),
    of_integers<pack<Nm>>("nm_pack",
                          "nm_pack(" WEIGHT
                          ", canonical_values, canonical_metadata, values, metadata): canonical form -> layout."),
    of_integers<unpack<Nm>>("nm_unpack",
                            "nm_unpack(" WEIGHT
                            ", values, metadata, canonical_values, canonical_metadata): layout -> canonical form."),
    of_integers<to_dense<Nm>>(
        "nm_to_dense", "nm_to_dense(" WEIGHT ", values, metadata, dense, threads): layout -> dense weight [out, in]."),
    of_integers<linear<Nm>>(
        "nm_linear", "nm_linear(" WEIGHT
                     ", values, metadata, x dtype, x, ldx, batch, scales or 0, bias or 0, activation, y, ldy, threads):"
                     " y = activation(x W^T + bias), the rows of W times their scales."),
    of_integers<values_bytes<Block>>("block_values_bytes",
                                     "block_values_bytes(" BLOCK_WEIGHT ") -> int: as nm_values_bytes."),
    of_integers<metadata_bytes<Block>>("block_metadata_bytes",
                                       "block_metadata_bytes(" BLOCK_WEIGHT ") -> int: as nm_metadata_bytes."),
    of_integers<pack<Block>>("block_pack", "block_pack(" BLOCK_WEIGHT
                                           ", canonical_values, canonical_metadata, values, metadata): as nm_pack."),
    of_integers<unpack<Block>>("block_unpack",
                               "block_unpack(" BLOCK_WEIGHT
                               ", values, metadata, canonical_values, canonical_metadata): as nm_unpack."),
    of_integers<to_dense<Block>>("block_to_dense",
                                 "block_to_dense(" BLOCK_WEIGHT ", values, metadata, dense, threads): as nm_to_dense."),
    of_integers<linear<Block>>(
        "block_linear",
        "block_linear(" BLOCK_WEIGHT
        ", values, metadata, x dtype, x, ldx, batch, scales or 0, bias or 0, activation, y, ldy, threads):"
        " as nm_linear."),
    of_integers<gather>("gather",
                        "gather(bytes of an element, source, its elements, index, count, values, threads): "
                        "values[i] = source[index[i]], 0 where there is no such element."),
    of_integers<flops>(
        "measure_flops",
        "measure_flops(dtype, threads, microseconds of a round) -> float: FLOP/s of multiply-adds, the best of three "
        "rounds."),
    of_integers<pair_rate>(
        "pair_rate",
        "pair_rate(columns of a group, or 1) -> float: permutes with a multiply-add per second on one "
        "thread, or multiply-adds alone; 0 where no kernel is chosen by it."),
    of_integers<read_bandwidth>("measure_read_bandwidth", "measure_read_bandwidth(threads) -> float: bytes/s."),
    fast("torch_functions", torch_functions,
         "torch_functions(DLPack table, Tensor, Parameter, watchers, included keys, their raw form, plain raw forms, "
         "namespace of forward_ad, get_num_threads, is_grad_enabled, Tensor.is_neg, Tensor.new_empty, "
         "Tensor.contiguous) -> for eager_product, or None if the table is of another version."),
    fast("eager_product", eager_product,
         "eager_product(torch_functions(...), is block, (" WEIGHT "), x dtype, tensors, activation, otherwise) -> "
         "product(x, bias, dense_above), which calls otherwise for gradients and from dense_above rows on."),
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
