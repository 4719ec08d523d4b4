// The product of one kernel as a Python callable that reads torch's tensors itself; see product.cpp.
#ifndef SPARSECOMP_EAGER_PRODUCT_HPP
#define SPARSECOMP_EAGER_PRODUCT_HPP

#define PY_SSIZE_T_CLEAN
#include <Python.h>

// A method of the module; module.cpp says what it takes and gives.
PyObject* eager_product(PyObject*, PyObject* const* args, Py_ssize_t given);

#endif
