// An owned reference to a Python object.
#ifndef SPARSECOMP_EAGER_REFERENCE_HPP
#define SPARSECOMP_EAGER_REFERENCE_HPP

#define PY_SSIZE_T_CLEAN
#include <Python.h>

// An owned reference, or none.
class Reference {
 public:
  Reference() = default;
  explicit Reference(PyObject* owned) : object_(owned) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }

  void own(PyObject* owned) {
    PyObject* before = object_;
    object_ = owned;
    Py_XDECREF(before);
  }
  void share(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    own(borrowed);
  }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* owned = object_;
    object_ = nullptr;
    return owned;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

#endif
