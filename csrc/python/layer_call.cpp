// `layer(x)` in one function: what nn.Module.__call__ and the layer's forward come to where no hook, no patch, no
// profiler and no compiler surrounds them, without the interpreter. All other calls go to nn.Module.__call__. That
// torch exports or traces is the product's to see.
//
// The object is for the class of the layer: Python's call of a layer finds it in its slot. Whoever asks for the
// attribute `__call__`, of a layer or of its class, is to get what a class without it would have, as tracers and
// compilers read it, follow it and compare it with that of nn.Module. sparsecomp/eager.py gives the type that `__get__`
// in Python, as TorchDynamo follows no other; so the type must stay mutable.
#include "layer_call.hpp"

#include <array>

#include "eager.hpp"
#include "reference.hpp"

namespace {

// An attribute of a class, and its value when the object was made.
struct Fact {
  Reference owner, name, value;
};

// What a call reads and what it must find unchanged.
struct State {
  Reference type;                      // of the layer
  Reference globals;                   // of nn.Module
  Reference watchers;                  // a tuple of functions without arguments: profilers and compilers of frames
  std::array<Reference, 4> hooks;      // dicts of a layer
  std::array<Reference, 4> of_all;     // dicts among the globals
  std::array<Reference, 3> overrides;  // attributes that a layer has only where somebody gave it another call
  std::array<Fact, 3> facts;
  Reference call_name, parameters_name, bias_name, weight_name, stand_in_name, product_name, limit_name;
};

// The class of a layer and this object hold one another, and are not looked for by the garbage collector: they stay.
struct LayerCall {
  PyObject_HEAD;
  State* state;
};

const State& state_of(PyObject* self) { return *reinterpret_cast<LayerCall*>(self)->state; }

// Borrowed, or null without an exception.
PyObject* item(PyObject* dict, const Reference& name) {
  PyObject* found = PyDict_GetItemWithError(dict, name.get());
  if (found == nullptr) PyErr_Clear();
  return found;
}

bool all_empty(PyObject* dict, const std::array<Reference, 4>& names) {
  for (const Reference& name : names) {
    PyObject* found = item(dict, name);
    if (found == nullptr || !PyDict_Check(found) || PyDict_Size(found) != 0) return false;
  }
  return true;
}

bool watched(const State& s) {
  const Py_ssize_t count = PyTuple_Size(s.watchers.get());
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Reference watcher(PyObject_CallNoArgs(PyTuple_GetItem(s.watchers.get(), i)));
    if (watcher.get() != Py_None) return true;
  }
  return false;
}

bool patched(const State& s, PyObject* attributes) {
  for (const Reference& name : s.overrides) {
    if (item(attributes, name) != nullptr) return true;
  }
  for (const Fact& fact : s.facts) {
    const Reference now(PyObject_GetAttr(fact.owner.get(), fact.name.get()));
    if (now.get() != fact.value.get()) return true;
  }
  return false;
}

// y; None where this call is not for the layer's product alone; null with its exception.
PyObject* quick(const State& s, PyObject* layer, PyObject* x) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(layer)) == s.type.get()) {
    const Reference attributes(PyObject_GenericGetDict(layer, nullptr));
    if (attributes && all_empty(attributes.get(), s.hooks) && all_empty(s.globals.get(), s.of_all) &&
        !patched(s, attributes.get()) && !watched(s)) {
      Reference parameters, bias, product, limit;  // the call may let another thread replace them
      parameters.share(item(attributes.get(), s.parameters_name));
      // a dict of a class of its own may do more than hold the bias; another weight there than the one that stands for
      // the packed one is somebody's who wants it multiplied
      if (parameters && PyDict_CheckExact(parameters.get()) &&
          item(parameters.get(), s.weight_name) == item(attributes.get(), s.stand_in_name)) {
        bias.share(item(parameters.get(), s.bias_name));
      }
      product.share(item(attributes.get(), s.product_name));
      limit.share(item(attributes.get(), s.limit_name));
      if (bias && product && limit) return call_product(product.get(), x, bias.get(), limit.get());
    }
  }
  PyErr_Clear();  // who called finds the same in nn.Module.__call__
  Py_INCREF(Py_None);
  return Py_None;
}

// super(type, layer).__call__
PyObject* bound(const State& s, PyObject* layer) {
  const Reference above(
      PyObject_CallFunctionObjArgs(reinterpret_cast<PyObject*>(&PySuper_Type), s.type.get(), layer, nullptr));
  return above ? PyObject_GetAttr(above.get(), s.call_name.get()) : nullptr;
}

PyObject* call(PyObject* self, PyObject* args, PyObject* named) {
  const State& s = state_of(self);
  const Py_ssize_t given = PyTuple_Size(args);
  if (given == 0) {
    PyErr_SetString(PyExc_TypeError, "the call of a layer takes the layer");
    return nullptr;
  }
  PyObject* layer = PyTuple_GetItem(args, 0);
  if (given == 2 && (named == nullptr || PyDict_Size(named) == 0)) {
    PyObject* y = quick(s, layer, PyTuple_GetItem(args, 1));
    if (y != Py_None) return y;
    Py_DECREF(y);
  }
  const Reference otherwise(bound(s, layer));
  const Reference rest(PyTuple_GetSlice(args, 1, given));
  return otherwise && rest ? PyObject_Call(otherwise.get(), rest.get(), named) : nullptr;
}

void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<LayerCall*>(self)->state;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyType_Slot slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)}, {Py_tp_call, reinterpret_cast<void*>(call)}, {0, nullptr}};

PyType_Spec spec = {
    "sparsecomp._native.LayerCall", sizeof(LayerCall), 0,
    // the slot of a class calls it with the layer in front, as it does with a function, and asks for no bound method
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

template <size_t Count>
bool intern(std::array<Reference, Count>* names, const std::array<const char*, Count>& texts) {
  for (size_t i = 0; i < Count; ++i) {
    (*names)[i].own(PyUnicode_InternFromString(texts[i]));
    if (!(*names)[i]) return false;
  }
  return true;
}

bool remember(Fact* fact, PyObject* owner, const char* name) {
  fact->owner.share(owner);
  fact->name.own(PyUnicode_InternFromString(name));
  if (fact->name) fact->value.own(PyObject_GetAttr(owner, fact->name.get()));
  return static_cast<bool>(fact->value);
}

bool fill(State* s, PyObject* const* args) {
  s->type.share(args[0]);
  s->globals.share(args[2]);
  s->watchers.share(args[3]);
  s->product_name.share(args[4]);
  s->limit_name.share(args[5]);
  s->stand_in_name.share(args[6]);
  s->call_name.own(PyUnicode_InternFromString("__call__"));
  s->parameters_name.own(PyUnicode_InternFromString("_parameters"));
  s->bias_name.own(PyUnicode_InternFromString("bias"));
  s->weight_name.own(PyUnicode_InternFromString("weight"));
  return s->call_name && s->parameters_name && s->bias_name && s->weight_name &&
         intern<4>(&s->hooks, {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}) &&
         intern<4>(&s->of_all, {"_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
                                "_global_backward_pre_hooks"}) &&
         intern<3>(&s->overrides, {"forward", "_call_impl", "_compiled_call_impl"}) &&
         remember(&s->facts[0], args[0], "forward") && remember(&s->facts[1], args[0], "_call_impl") &&
         remember(&s->facts[2], args[1], "__call__");
}

}  // namespace

PyObject* layer_call(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given != 7 || !PyType_Check(args[0]) || !PyType_Check(args[1]) || !PyDict_Check(args[2]) ||
      !PyTuple_Check(args[3]) || !PyUnicode_Check(args[4]) || !PyUnicode_Check(args[5]) || !PyUnicode_Check(args[6])) {
    PyErr_SetString(PyExc_TypeError, "layer_call takes two classes, a dict, a tuple of functions and three names");
    return nullptr;
  }
  const Reference type(PyType_FromSpec(&spec));
  if (!type) return nullptr;
  auto* made = reinterpret_cast<LayerCall*>(PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type.get()), 0));
  if (made == nullptr) return nullptr;
  made->state = new State{};
  Reference self(reinterpret_cast<PyObject*>(made));
  return fill(made->state, args) ? self.release() : nullptr;
}
