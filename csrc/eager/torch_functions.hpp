// What the eager call asks of torch: the view of a tensor, through DLPack's table of C functions, so that no header of
// torch is needed, and what only torch's own Python functions can tell, which are handed over once.
#ifndef SPARSECOMP_EAGER_TORCH_FUNCTIONS_HPP
#define SPARSECOMP_EAGER_TORCH_FUNCTIONS_HPP

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>

#include "dlpack.hpp"
#include "reference.hpp"

// Functions of torch, and the names of two attributes. Nothing here changes after it was made.
struct TorchFunctions {
  dlpack::View view;
  Reference tensor, parameter;             // types
  Reference watchers;                      // a tuple of functions without arguments: true while one watches
  Reference included, raw;                 // the dispatch keys that this thread adds to every call; those as an integer
  std::array<uint64_t, 2> plain;           // what they come to where nothing watches, outside and inside inference mode
  Reference levels;                        // the namespace of torch.autograd.forward_ad
  Reference threads, grad_enabled;         // functions without arguments
  Reference is_negated, make, contiguous;  // methods of Tensor
  Reference current_level_name, requires_grad_name;
};

// A capsule of them, or None where torch's table is of another version. A method of the module.
PyObject* torch_functions(PyObject*, PyObject* const* args, Py_ssize_t given);

// Those in a capsule that torch_functions made, or null with an exception.
const TorchFunctions* functions_of(PyObject* capsule);

// Whether a tensor was viewed, and lies in the processor's memory. No exception is left.
bool viewed(const TorchFunctions& torch, PyObject* object, dlpack::Tensor* view);

// Of the type itself, not of one derived from it.
inline bool is_a(PyObject* object, const Reference& type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type.get();
}

// 1 or 0, or -1 with an exception:

// whether a mode, a transform, a trace or a dual level wants to see the call,
int watched(const TorchFunctions& torch);

// whether x or bias (or None) needs gradients and they are recorded,
int wants_gradients(const TorchFunctions& torch, PyObject* x, PyObject* bias);

// whether a tensor is the negated view of what lies in memory, the one thing that a DLPack view hides.
int negated(const TorchFunctions& torch, PyObject* tensor);

#endif
