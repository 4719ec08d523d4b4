#include "torch_functions.hpp"

#include <cstdint>

#include "capsule.hpp"

namespace {

constexpr const char* kFunctionsName = "sparsecomp._native.torch_functions";

// 1 or 0 as Python sees it, -1 with an exception; takes the reference.
int truth(PyObject* owned) {
  if (owned == nullptr) return -1;
  const int answer = owned == Py_False || owned == Py_None ? 0 : PyObject_IsTrue(owned);
  Py_DECREF(owned);
  return answer;
}

// 1 if this thread adds other dispatch keys to its calls than it does where nothing watches, 0 if not, -1 with an
// exception. Modes, transforms and traces do, those too that are not known yet.
int adds_keys(const TorchFunctions& torch) {
  const Reference keys(PyObject_CallNoArgs(torch.included.get()));
  if (!keys) return -1;
  const Reference raw(PyObject_CallFunctionObjArgs(torch.raw.get(), keys.get(), nullptr));
  if (!raw) return -1;
  const uint64_t now = PyLong_AsUnsignedLongLong(raw.get());
  if (PyErr_Occurred()) return -1;
  return now != torch.plain[0] && now != torch.plain[1];
}

}  // namespace

PyObject* torch_functions(PyObject*, PyObject* const* args, Py_ssize_t given) {
  constexpr Py_ssize_t kGiven = 13;
  constexpr Py_ssize_t kWatchers = 3, kPlain = 6, kLevels = 7;
  if (given != kGiven || !PyTuple_Check(args[kWatchers]) || !PyTuple_Check(args[kPlain]) ||
      !PyDict_Check(args[kLevels])) {
    PyErr_SetString(PyExc_TypeError,
                    "torch_functions takes a capsule, two types, a tuple, two functions, a tuple, a dict and five "
                    "functions");
    return nullptr;
  }
  const auto* table = static_cast<const dlpack::Table*>(PyCapsule_GetPointer(args[0], dlpack::kTableName));
  if (table == nullptr) return nullptr;
  const dlpack::Header* header = &table->header;
  while (header != nullptr && header->major != dlpack::kMajor) header = header->previous;
  table = reinterpret_cast<const dlpack::Table*>(header);
  if (table == nullptr || table->view == nullptr) {
    Py_INCREF(Py_None);
    return Py_None;
  }
  auto* torch = new TorchFunctions{};
  const Reference owner(capsule_of(torch, kFunctionsName));
  if (!owner) return nullptr;
  torch->view = table->view;
  Reference unused;  // the integers are read below
  Reference* const fields[] = {
      &torch->tensor, &torch->parameter, &torch->watchers,     &torch->included,   &torch->raw,  &unused,
      &torch->levels, &torch->threads,   &torch->grad_enabled, &torch->is_negated, &torch->make, &torch->contiguous};
  static_assert(sizeof(fields) / sizeof(fields[0]) == kGiven - 1, "one field for every argument but the capsule");
  for (Py_ssize_t i = 1; i < kGiven; ++i) fields[i - 1]->share(args[i]);
  for (size_t i = 0; i < torch->plain.size(); ++i) {
    PyObject* keys = PyTuple_GetItem(args[kPlain], static_cast<Py_ssize_t>(i));
    if (keys == nullptr) return nullptr;
    torch->plain[i] = PyLong_AsUnsignedLongLong(keys);
    if (PyErr_Occurred()) return nullptr;
  }
  torch->current_level_name.own(PyUnicode_InternFromString("_current_level"));
  torch->requires_grad_name.own(PyUnicode_InternFromString("requires_grad"));
  if (!torch->current_level_name || !torch->requires_grad_name) return nullptr;
  Py_INCREF(owner.get());
  return owner.get();
}

const TorchFunctions* functions_of(PyObject* capsule) {
  return static_cast<const TorchFunctions*>(PyCapsule_GetPointer(capsule, kFunctionsName));
}

bool viewed(const TorchFunctions& torch, PyObject* object, dlpack::Tensor* view) {
  if (torch.view(object, view) != 0) {
    PyErr_Clear();
    return false;
  }
  return view->device_type == dlpack::kCpu;
}

int watched(const TorchFunctions& torch) {
  PyObject* watchers = torch.watchers.get();
  const Py_ssize_t count = PyTuple_Size(watchers);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int watches = truth(PyObject_CallNoArgs(PyTuple_GetItem(watchers, i)));
    if (watches != 0) return watches;
  }
  const int adds = adds_keys(torch);
  if (adds != 0) return adds;
  // borrowed from a dict of Python's, and read before anything else can run
  PyObject* level = PyDict_GetItemWithError(torch.levels.get(), torch.current_level_name.get());
  if (level == nullptr) return PyErr_Occurred() ? -1 : 1;
  const long number = PyLong_AsLong(level);
  if (number == -1 && PyErr_Occurred()) return -1;
  return number >= 0;
}

int wants_gradients(const TorchFunctions& torch, PyObject* x, PyObject* bias) {
  const int enabled = truth(PyObject_CallNoArgs(torch.grad_enabled.get()));
  if (enabled <= 0) return enabled;
  const int of_x = truth(PyObject_GetAttr(x, torch.requires_grad_name.get()));
  if (of_x != 0 || bias == Py_None) return of_x;
  return truth(PyObject_GetAttr(bias, torch.requires_grad_name.get()));
}

int negated(const TorchFunctions& torch, PyObject* tensor) {
  return truth(PyObject_CallFunctionObjArgs(torch.is_negated.get(), tensor, nullptr));
}
