// The product of one kernel as a Python callable that reads torch's tensors itself; see eager.cpp.
#ifndef SPARSECOMP_PYTHON_EAGER_HPP
#define SPARSECOMP_PYTHON_EAGER_HPP

#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject* eager_product(PyObject*, PyObject* const* args, Py_ssize_t given);

// product(x, bias, dense_above) for any callable, faster for one that eager_product made. All are borrowed.
PyObject* call_product(PyObject* product, PyObject* x, PyObject* bias, PyObject* dense_above);

#endif
