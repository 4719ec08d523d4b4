// The call of a layer without the interpreter; see layer_call.cpp.
#ifndef SPARSECOMP_PYTHON_LAYER_CALL_HPP
#define SPARSECOMP_PYTHON_LAYER_CALL_HPP

#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject* layer_call(PyObject*, PyObject* const* args, Py_ssize_t given);

#endif
