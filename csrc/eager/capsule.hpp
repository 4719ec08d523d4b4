// A C++ object as a Python object that owns it.
#ifndef SPARSECOMP_EAGER_CAPSULE_HPP
#define SPARSECOMP_EAGER_CAPSULE_HPP

#define PY_SSIZE_T_CLEAN
#include <Python.h>

template <class T>
void destroy(PyObject* capsule) {
  delete static_cast<T*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
}

// Takes the object, also where it fails.
template <class T>
PyObject* capsule_of(T* owned, const char* name) {
  PyObject* capsule = PyCapsule_New(owned, name, destroy<T>);
  if (capsule == nullptr) delete owned;
  return capsule;
}

#endif
