// The eager call of a layer in one function: the checks, y, and the product, without an interpreter in between.
//
// Shape, dtype, strides and device of everything the kernel will read are checked at every call: a tensor whose memory
// was replaced by hand is then refused, not read out of bounds. A storage that was shrunk in place behind a tensor is
// not seen: DLPack's view does not tell its size.
//
// Functions of torch may let other threads run, so addresses are taken last, and checked there.
#include "product.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "arguments.hpp"
#include "capsule.hpp"
#include "dlpack.hpp"
#include "reference.hpp"
#include "sparsecomp.h"
#include "torch_functions.hpp"
#include "views.hpp"

namespace {

constexpr const char* kProductName = "sparsecomp._native.eager_product";

// Products of no more multiply-adds than this, zeros counted, keep the interpreter's lock where vectors compute them:
// they take 2 to 14 us, and to release it and take it again costs 0.04.
constexpr int64_t kShort = 1 << 18;

// One kernel with its activation; nothing of it changes after it was made. What may lead back to the layer is borrowed
// from the tuple of Python objects beside the capsule, where the garbage collector sees it.
struct Product {
  const TorchFunctions* torch;
  Reference torch_owner;
  bool block;
  sparsecomp_nm nm;
  sparsecomp_block blocks;
  int64_t out, columns;
  int64_t short_rows;  // up to so many, the interpreter's lock is kept
  Py_ssize_t count;    // of tensors: values, metadata, and scales or none
  std::array<PyObject*, 3> tensors;
  std::array<int64_t, 3> bytes;
  int32_t dtype, activation;
  dlpack::Type element;
  PyObject* otherwise;
};

// What a call comes to before the product is run.
enum class Verdict { kRun, kOtherwise, kDispatch, kError };

Verdict verdict(int declines, Verdict otherwise) {
  return declines < 0 ? Verdict::kError : declines > 0 ? otherwise : Verdict::kRun;
}

int64_t row_count(const dlpack::Tensor& x) {
  int64_t rows = 1;
  for (int32_t i = 0; i < x.dims - 1; ++i) rows *= x.shape[i];
  return rows;
}

// Whether x is [..., columns] of the kernel's dtype; fills in its view.
bool fits(const Product& p, PyObject* x, dlpack::Tensor* view) {
  return viewed(*p.torch, x, view) && view->dims >= 1 && dlpack::same(view->dtype, p.element) &&
         view->shape[view->dims - 1] == p.columns && (view->data != nullptr || dlpack::elements(*view) == 0);
}

bool bias_fits(const Product& p, PyObject* bias, dlpack::Tensor* view) {
  return viewed(*p.torch, bias, view) && view->dims == 1 && view->shape[0] == p.out &&
         dlpack::same(view->dtype, p.element) && dlpack::contiguous(*view) && (view->data != nullptr || p.out == 0);
}

// Whether y is what the kernel will write: torch made it, by a function of which it promises nothing.
bool result_fits(const Product& p, PyObject* y, int64_t rows, dlpack::Tensor* view) {
  if (!viewed(*p.torch, y, view) || !dlpack::same(view->dtype, p.element)) return false;
  const int64_t count = dlpack::elements(*view);
  return count == rows * p.out && (count == 0 || dlpack::contiguous(*view));
}

bool weight_fits(const Product& p, std::array<dlpack::Tensor, 3>* views) {
  for (Py_ssize_t i = 0; i < p.count; ++i) {
    dlpack::Tensor& view = (*views)[i];
    if (!viewed(*p.torch, p.tensors[i], &view) || !dlpack::holds(view, p.bytes[i])) return false;
  }
  return p.count == 2 || dlpack::same((*views)[2].dtype, {dlpack::kFloat, 32, 1});
}

// Whether this call is one for the kernel, as far as x tells; fills in its view.
Verdict examine(const Product& p, PyObject* x, PyObject* bias, PyObject* dense_above, dlpack::Tensor* x_view) {
  const TorchFunctions& torch = *p.torch;
  // exact types: a subclass may keep its elements elsewhere
  if (!is_a(x, torch.tensor) || !(bias == Py_None || is_a(bias, torch.parameter) || is_a(bias, torch.tensor))) {
    return Verdict::kDispatch;
  }
  Verdict said = verdict(watched(torch), Verdict::kDispatch);
  if (said == Verdict::kRun) said = verdict(wants_gradients(torch, x, bias), Verdict::kOtherwise);
  if (said == Verdict::kRun) said = verdict(negated(torch, x), Verdict::kDispatch);
  if (said == Verdict::kRun && bias != Py_None) said = verdict(negated(torch, bias), Verdict::kDispatch);
  if (said != Verdict::kRun) return said;
  int64_t from = INT64_MAX;
  if (dense_above != Py_None) {
    from = PyLong_AsLongLong(dense_above);
    if (from == -1 && PyErr_Occurred()) return Verdict::kError;
  }
  if (!fits(p, x, x_view)) return Verdict::kDispatch;
  // as sparsecomp/backends/choice.py says in unpacks()
  return row_count(*x_view) >= from ? Verdict::kOtherwise : Verdict::kRun;
}

// A contiguous y [*rows, out], by x.new_empty. The sizes are arguments each: as a tuple they take torch longer.
PyObject* empty_result(const Product& p, PyObject* x, const dlpack::Tensor& view) {
  std::vector<int64_t> sizes(view.shape, view.shape + view.dims);  // a new tuple may set off the collector, and that
  sizes.back() = p.out;                                            // change x
  const Reference arguments(PyTuple_New(static_cast<Py_ssize_t>(sizes.size()) + 1));
  if (!arguments) return nullptr;
  Py_INCREF(x);
  PyTuple_SetItem(arguments.get(), 0, x);
  for (size_t i = 0; i < sizes.size(); ++i) {
    PyObject* size = PyLong_FromLongLong(sizes[i]);
    if (size == nullptr) return nullptr;
    PyTuple_SetItem(arguments.get(), static_cast<Py_ssize_t>(i) + 1, size);
  }
  return PyObject_Call(p.torch->make.get(), arguments.get(), nullptr);
}

// y for x and bias, which stay alive: the caller holds them. None where one of them, or the weight, does not fit.
PyObject* run(const Product& p, PyObject* x, dlpack::Tensor x_view, PyObject* bias) {
  const TorchFunctions& torch = *p.torch;
  const int64_t rows = row_count(x_view);
  const bool strided = rows != 0 && dlpack::row_step(x_view, p.columns) < 0;
  Reference y(empty_result(p, x, x_view));
  if (!y) return nullptr;
  Reference copy;
  if (strided) {
    copy.own(PyObject_CallFunctionObjArgs(torch.contiguous.get(), x, nullptr));
    if (!copy) return nullptr;
    x = copy.get();
  }
  const Reference threads(PyObject_CallNoArgs(torch.threads.get()));
  if (!threads) return nullptr;
  const int64_t wanted = PyLong_AsLongLong(threads.get());
  if (wanted == -1 && PyErr_Occurred()) return nullptr;
  std::array<dlpack::Tensor, 3> views;
  dlpack::Tensor y_view, bias_view;
  if (!result_fits(p, y.get(), rows, &y_view) || !weight_fits(p, &views) ||
      (bias != Py_None && !bias_fits(p, bias, &bias_view)) || !fits(p, x, &x_view) || row_count(x_view) != rows) {
    Py_INCREF(Py_None);
    return Py_None;
  }
  if (rows == 0 || p.out == 0) return y.release();
  const int64_t step = dlpack::row_step(x_view, p.columns);
  if (step < 0) {
    Py_INCREF(Py_None);
    return Py_None;
  }
  const char* bias_start = bias == Py_None ? nullptr : dlpack::start(bias_view);
  const float* scales = p.count == 3 ? reinterpret_cast<const float*>(dlpack::start(views[2])) : nullptr;
  const sparsecomp_epilogue epilogue = {bias_start, p.activation};
  void* result = static_cast<char*>(y_view.data) + y_view.byte_offset;
  const bool released = rows > p.short_rows;
  PyThreadState* thread = released ? PyEval_SaveThread() : nullptr;
  const int code =
      p.block
          ? sparsecomp_block_linear(&p.blocks, dlpack::start(views[0]), dlpack::start(views[1]), scales, p.dtype,
                                    dlpack::start(x_view), step, rows, &epilogue, result, p.out, thread_count(wanted))
          : sparsecomp_nm_linear(&p.nm, dlpack::start(views[0]), dlpack::start(views[1]), scales, p.dtype,
                                 dlpack::start(x_view), step, rows, &epilogue, result, p.out, thread_count(wanted));
  if (released) PyEval_RestoreThread(thread);
  return code == SPARSECOMP_OK ? y.release() : raise_code(code);
}

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  if (given != 3) {
    PyErr_Format(PyExc_TypeError, "a product takes x, bias and dense_above, got %zd arguments", given);
    return nullptr;
  }
  auto* p = static_cast<const Product*>(PyCapsule_GetPointer(PyTuple_GetItem(self, 0), kProductName));
  if (p == nullptr) return nullptr;
  PyObject *x = args[0], *bias = args[1], *dense_above = args[2];
  dlpack::Tensor x_view;
  switch (examine(*p, x, bias, dense_above, &x_view)) {
    case Verdict::kRun:
      return run(*p, x, x_view, bias);
    case Verdict::kOtherwise:
      return PyObject_CallFunctionObjArgs(p->otherwise, x, bias, dense_above, nullptr);
    case Verdict::kDispatch:
      Py_INCREF(Py_None);
      return Py_None;
    default:
      return nullptr;
  }
}

PyMethodDef call_definition = {
    "product", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
    "product(x, bias or None, dense_above or None) -> y, or None where torch's dispatcher has to see the call."};

bool integers_of(PyObject* tuple, std::array<int64_t, 6>* values) {
  for (size_t i = 0; i < values->size(); ++i) {
    PyObject* item = PyTuple_GetItem(tuple, static_cast<Py_ssize_t>(i));
    if (item == nullptr) return false;
    (*values)[i] = PyLong_AsLongLong(item);
    if ((*values)[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

bool element_type(int64_t dtype, dlpack::Type* type) {
  switch (dtype) {
    case SPARSECOMP_F32:
      *type = {dlpack::kFloat, 32, 1};
      return true;
    case SPARSECOMP_F16:
      *type = {dlpack::kFloat, 16, 1};
      return true;
    case SPARSECOMP_BF16:
      *type = {dlpack::kBfloat, 16, 1};
      return true;
    default:
      return false;
  }
}

// The kernel's description and sizes from its integers; false with an exception.
bool describe(Product* p, PyObject* arguments) {
  std::array<int64_t, 6> v;
  if (!integers_of(arguments, &v)) return false;
  p->out = v[0];
  p->columns = v[1];
  if (p->block) {
    p->blocks = block_of(v);
    p->bytes = {sparsecomp_block_values_bytes(&p->blocks), sparsecomp_block_metadata_bytes(&p->blocks), 4 * p->out};
  } else {
    p->nm = weight_of(v);
    p->bytes = {sparsecomp_nm_values_bytes(&p->nm), sparsecomp_nm_metadata_bytes(&p->nm), 4 * p->out};
  }
  if (p->bytes[0] < 0 || p->bytes[1] < 0) {
    raise_code(SPARSECOMP_INVALID);
    return false;
  }
  const bool vectors = std::string_view(sparsecomp_isa()) != "reference";
  p->short_rows = vectors ? kShort / std::max<int64_t>(1, p->out * p->columns) : 0;
  return true;
}

bool borrow_tensors(Product* p, PyObject* tensors) {
  p->count = PyTuple_Size(tensors);
  if (p->count != 2 && p->count != 3) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a kernel has two tensors, or three with scales");
    return false;
  }
  for (Py_ssize_t i = 0; i < p->count; ++i) {
    PyObject* tensor = PyTuple_GetItem(tensors, i);
    if (!is_a(tensor, p->torch->tensor)) {
      PyErr_SetString(PyExc_TypeError, "the tensors of a kernel are plain ones");
      return false;
    }
    p->tensors[i] = tensor;
  }
  return true;
}

}  // namespace

PyObject* eager_product(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given != 7 || !PyTuple_Check(args[2]) || !PyTuple_Check(args[4])) {
    PyErr_SetString(PyExc_TypeError, "eager_product takes the functions of torch, a bool, two tuples and three more");
    return nullptr;
  }
  const TorchFunctions* torch = functions_of(args[0]);
  if (torch == nullptr) return nullptr;
  auto* p = new Product{};
  const Reference owner(capsule_of(p, kProductName));
  if (!owner) return nullptr;
  p->torch = torch;
  p->torch_owner.share(args[0]);
  p->block = args[1] == Py_True;
  const int64_t dtype = PyLong_AsLongLong(args[3]);
  const int64_t activation = PyLong_AsLongLong(args[5]);
  if (PyErr_Occurred() || !describe(p, args[2]) || !borrow_tensors(p, args[4])) return nullptr;
  if (!element_type(dtype, &p->element)) return raise_code(SPARSECOMP_UNSUPPORTED);
  p->dtype = static_cast<int32_t>(dtype);
  p->activation = narrow(activation, -1);
  p->otherwise = args[6];
  const Reference self(PyTuple_Pack(3, owner.get(), args[4], args[6]));
  return self ? PyCFunction_NewEx(&call_definition, self.get(), nullptr) : nullptr;
}
