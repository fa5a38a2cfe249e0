// The Python module fused_norm._C. Importing it registers the operators (csrc/ops.cpp). What it holds itself is no operator: the same
// functions without torch's dispatcher, the check of an ordinary call's arguments, and the choice of instruction set.
//
// At small sizes a call costs what surrounds the kernel, and the dispatcher with its boxing is the largest part of that.
// Only Python's limited API and the libtorch stable ABI are used. Neither knows a Python tensor's C++ object, so it comes by two doors that
// torch keeps for others: torch._C._aoti's functions between Python tensors and the stable ABI's handles, and DLPack's C exchange table. The
// first are private: where anything looked up below is missing, every call goes to the operator and every argument to Python's checks.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "ops.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An owned reference.
class Ref {
 public:
  explicit Ref(PyObject* p) : p_(p) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(p_); }
  PyObject* get() const { return p_; }
  PyObject* release() { return std::exchange(p_, nullptr); }
  explicit operator bool() const { return p_ != nullptr; }

 private:
  PyObject* p_;
};

// ------------------------------------------------------------------------------------------------------------ DLPack's C exchange table
// Declared here, by DLPack 1's specification, since torch's header of it is closed to users of the stable ABI.

struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);
  void* current_work_stream;
};

// --------------------------------------------------------------------------------------------------------------------- What torch lends

// Looked up once, when the module is imported, and held for ever; without `ready` nothing else here may be used.
struct Torch {
  bool ready = false;
  PyTypeObject *tensor, *parameter, *size;
  PyObject* dtypes[4];
  PyObject *handle_from_tensor, *tensor_from_handle;
  PyObject *local_include_set, *raw_repr, *profiler_enabled;
  PyObject *peek_interpreter, *function_mode_enabled, *is_neg;
  PyObject *name_is_cpu, *name_is_cuda, *name_is_nested;
  bool tensor_from_handle_steals;
  int (*dltensor)(void*, DLTensor*);
  uint64_t harmless_keys;
};
Torch torch_api;

constexpr ScalarType kDtypes[4] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};

// `path` starts at the module torch: "_C._aoti.unsafe_alloc_void_ptr_from_tensor". A new reference, or null and an exception.
PyObject* look_up(PyObject* torch, const char* path) {
  Py_INCREF(torch);
  PyObject* found = torch;
  while (found && *path) {
    const char* end = path;
    while (*end && *end != '.') end++;
    Ref from(found), name(PyUnicode_FromStringAndSize(path, end - path));
    found = name ? PyObject_GetAttr(from.get(), name.get()) : nullptr;
    path = *end ? end + 1 : end;
  }
  return found;
}

bool bits_of_key_set(PyObject* set, uint64_t& bits) {
  Ref number(set ? PyObject_CallFunctionObjArgs(torch_api.raw_repr, set, nullptr) : nullptr);
  if (!number) return false;
  bits = PyLong_AsUnsignedLongLong(number.get());
  return !PyErr_Occurred();
}

// An owned handle of t; null with or without an exception.
AtenTensorHandle handle_of(PyObject* t) {
  Ref capsule(PyObject_CallFunctionObjArgs(torch_api.handle_from_tensor, t, nullptr));
  return static_cast<AtenTensorHandle>(capsule ? PyCapsule_GetPointer(capsule.get(), nullptr) : nullptr);
}

PyObject* tensor_of(AtenTensorHandle handle) {
  Ref capsule(PyCapsule_New(handle, nullptr, nullptr));
  return capsule ? PyObject_CallFunctionObjArgs(torch_api.tensor_from_handle, capsule.get(), nullptr) : nullptr;
}

// alloc_tensor_by_stealing_from_void_ptr steals nothing up to torch 2.13, whatever its name says: the handle stays the caller's. Should that
// be mended, a handle deleted twice would be the end of the process, and one never deleted a leak; so see what this torch does.
bool find_out_whether_it_steals(bool& steals, PyObject* torch) {
  Ref empty(look_up(torch, "empty")), zero(PyLong_FromLong(0));
  Ref t(empty && zero ? PyObject_CallFunctionObjArgs(empty.get(), zero.get(), nullptr) : nullptr);
  Ref use_count(t ? PyObject_GetAttrString(t.get(), "_use_count") : nullptr);
  if (!use_count) return false;
  const auto uses = [&] {
    Ref count(PyObject_CallNoArgs(use_count.get()));
    return count ? PyLong_AsLong(count.get()) : -1;
  };
  const long before = uses();
  const AtenTensorHandle handle = before < 0 ? nullptr : handle_of(t.get());
  if (!handle) return false;
  const long held = uses();
  Ref same(tensor_of(handle));
  const long after = uses();
  if (same.get() != t.get() || held != before + 1 || (after != held && after != before)) return false;
  steals = after == before;
  if (!steals) aoti_torch_delete_tensor_object(handle);
  return uses() == before;
}

bool fill(Torch& t, PyObject* torch) {
  const auto get = [&](auto*& place, const char* path) {
    place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(look_up(torch, path));
    return place != nullptr;
  };
  const auto intern = [](PyObject*& place, const char* name) { return (place = PyUnicode_InternFromString(name)) != nullptr; };
  if (!get(t.tensor, "Tensor") || !get(t.parameter, "nn.Parameter") || !get(t.size, "Size") || !get(t.dtypes[0], "float32") ||
      !get(t.dtypes[1], "bfloat16") || !get(t.dtypes[2], "float16") || !get(t.dtypes[3], "float64") ||
      !get(t.handle_from_tensor, "_C._aoti.unsafe_alloc_void_ptr_from_tensor") ||
      !get(t.tensor_from_handle, "_C._aoti.alloc_tensor_by_stealing_from_void_ptr") ||
      !get(t.local_include_set, "_C._dispatch_tls_local_include_set") || !get(t.raw_repr, "_C.DispatchKeySet.raw_repr") ||
      !get(t.profiler_enabled, "_C._autograd._profiler_enabled") ||
      !get(t.peek_interpreter, "_C._functorch.peek_interpreter_stack") ||
      !get(t.function_mode_enabled, "_C._is_torch_function_mode_enabled") || !get(t.is_neg, "Tensor.is_neg") ||
      !intern(t.name_is_cpu, "is_cpu") || !intern(t.name_is_cuda, "is_cuda") || !intern(t.name_is_nested, "is_nested"))
    return false;

  // In every thread from the start, and nothing to us: one serves operators that take no tensor, the other views.
  PyObject* key_set = nullptr;
  if (!get(key_set, "_C.DispatchKeySet")) return false;
  Ref key_set_type(key_set);
  for (const char* name : {"_C.DispatchKey.BackendSelect", "_C.DispatchKey.ADInplaceOrView"}) {
    Ref key(look_up(torch, name));
    Ref set(key ? PyObject_CallFunctionObjArgs(key_set_type.get(), key.get(), nullptr) : nullptr);
    uint64_t bits;
    if (!bits_of_key_set(set.get(), bits)) return false;
    t.harmless_keys |= bits;
  }

  Ref capsule(look_up(torch, "Tensor.__dlpack_c_exchange_api__"));
  auto* api = capsule ? static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api")) : nullptr;
  while (api && api->major != 1) api = api->previous;
  if (!api || !api->dltensor_from_py_object_no_sync) return false;
  t.dltensor = api->dltensor_from_py_object_no_sync;
  return find_out_whether_it_steals(t.tensor_from_handle_steals, torch);
}

bool is_plain(PyObject* t) { return Py_TYPE(t) == torch_api.tensor || Py_TYPE(t) == torch_api.parameter; }

// Whether a call or an attribute gave this very object; an exception is no.
bool is(PyObject* owned, PyObject* expected) {
  if (!owned) PyErr_Clear();
  Py_XDECREF(owned);
  return owned == expected;
}

bool attribute_is(PyObject* t, PyObject* name, PyObject* expected) { return is(PyObject_GetAttr(t, name), expected); }

// ------------------------------------------------------------------------------------------------ The operators without the dispatcher

// Whether the dispatcher would find nothing to do in this thread but to call the CPU's kernel. The keys that are switched on here are those
// of dispatch modes (FakeTensorMode and make_fx among them, before autograd too), torch.func, torch.jit.trace, functionalization and
// whatever torch adds: all but two would have to see the call. The profiler is no key.
bool dispatcher_is_idle() {
  Ref set(PyObject_CallNoArgs(torch_api.local_include_set));
  uint64_t keys;
  if (!bits_of_key_set(set.get(), keys)) {
    PyErr_Clear();
    return false;
  }
  return (keys & ~torch_api.harmless_keys) == 0 && is(PyObject_CallNoArgs(torch_api.profiler_enabled), Py_False);
}

// From a Python argument to a C++ one: false where the operator must take the call. Tensors arrive as optional, since an empty one costs
// an allocation.
bool convert(PyObject* arg, int64_t& value) {
  if (!PyLong_CheckExact(arg)) return false;
  value = PyLong_AsLongLong(arg);
  return value != -1 || !PyErr_Occurred();
}

bool convert(PyObject* arg, double& value) {
  if (!PyFloat_CheckExact(arg) && !PyLong_CheckExact(arg)) return false;
  value = PyFloat_AsDouble(arg);
  return value != -1 || !PyErr_Occurred();
}

bool convert(PyObject* arg, bool& value) {
  value = arg == Py_True;
  return value || arg == Py_False;
}

bool convert(PyObject* arg, ScalarType& value) {
  for (int i = 0; i < 4; i++) {
    if (arg == torch_api.dtypes[i]) {
      value = kDtypes[i];
      return true;
    }
  }
  return false;
}

bool convert(PyObject* arg, std::optional<Tensor>& value) {
  if (!is_plain(arg)) return false;
  const AtenTensorHandle handle = handle_of(arg);
  if (!handle) return false;
  value.emplace(handle);
  return value->is_cpu();
}

// `Tensor?` in the schema.
struct MaybeTensor {
  std::optional<Tensor> value;
};
bool convert(PyObject* arg, MaybeTensor& value) { return arg == Py_None || convert(arg, value.value); }

template <typename T> struct Held { using type = T; };
template <> struct Held<Tensor> { using type = std::optional<Tensor>; };
template <> struct Held<std::optional<Tensor>> { using type = MaybeTensor; };

template <typename T> const T& passed(const T& held) { return held; }
inline const Tensor& passed(const std::optional<Tensor>& held) { return *held; }
inline const std::optional<Tensor>& passed(const MaybeTensor& held) { return held.value; }

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

PyObject* to_python(const Tensor& t) {
  if (!torch_api.tensor_from_handle_steals) return tensor_of(t.get());
  AtenTensorHandle handle;
  if (aoti_torch_new_tensor_handle(t.get(), &handle) == AOTI_TORCH_SUCCESS) return tensor_of(handle);
  PyErr_SetString(PyExc_RuntimeError, "fused_norm: torch gave no handle of a result");
  return nullptr;
}

PyObject* to_python(const std::optional<Tensor>& t) {
  if (t) return to_python(*t);
  Py_INCREF(Py_None);
  return Py_None;
}

template <typename... R, size_t... I>
PyObject* to_python(const std::tuple<R...>& results, std::index_sequence<I...>) {
  Ref tuple(PyTuple_New(sizeof...(R)));
  const auto put = [&](Py_ssize_t i, PyObject* item) { return item && PyTuple_SetItem(tuple.get(), i, item) == 0; };
  return tuple && (put(I, to_python(std::get<I>(results))) && ...) ? tuple.release() : nullptr;
}

// Runs f on these arguments and returns its results as a tuple; null with an exception set if that failed, without one if the operator must
// take the call.
template <typename... R, typename... A, size_t... I>
PyObject* run_directly(std::tuple<R...> (*f)(A...), PyObject* const* args, std::index_sequence<I...>) {
  if (!dispatcher_is_idle()) return nullptr;
  std::tuple<typename Held<std::decay_t<A>>::type...> held;
  if (!(convert(args[I], std::get<I>(held)) && ...)) {
    PyErr_Clear();
    return nullptr;
  }
  std::optional<std::tuple<R...>> results;
  try {
    WithoutGil unlocked;
    results.emplace(f(passed(std::get<I>(held))...));
  } catch (const std::exception&) {
    return nullptr;  // the operator fails in the same way, and says so in torch's words
  }
  return to_python(*results, std::index_sequence_for<R...>{});
}

// torch.ops.fused_norm.<name>.default._op: the operator without the Python frame that an OpOverload puts around it.
PyObject* find_operator(const char* name) {
  Ref torch(PyImport_ImportModule("torch"));
  Ref ops(torch ? look_up(torch.get(), "ops.fused_norm") : nullptr);
  Ref packet(ops ? PyObject_GetAttrString(ops.get(), name) : nullptr);
  return packet ? look_up(packet.get(), "default._op") : nullptr;
}

// libtorch's stable ABI knows one exception alone, so that an operator of ours without memory for its results raises RuntimeError. Callers catch
// torch.OutOfMemoryError, a kind of it: where the text says so, make it that, with the first as its cause.
void recognise_out_of_memory() {
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  // A kind of RuntimeError is known for what it is.
  Ref text(type == PyExc_RuntimeError ? PyObject_Str(value) : nullptr), wanted(PyUnicode_FromString("CUDA out of memory"));
  if (text && wanted && PyUnicode_Contains(text.get(), wanted.get()) == 1) {
    Ref torch(PyImport_ImportModule("torch")), known(torch ? PyObject_GetAttrString(torch.get(), "OutOfMemoryError") : nullptr);
    PyObject* const error = known ? PyObject_CallFunctionObjArgs(known.get(), text.get(), nullptr) : nullptr;
    if (error) {
      if (traceback) PyException_SetTraceback(value, traceback);
      PyException_SetCause(error, value);  // takes it over
      Py_DECREF(type);
      Py_XDECREF(traceback);
      return PyErr_Restore(known.release(), error, nullptr);
    }
  }
  PyErr_Clear();
  PyErr_Restore(type, value, traceback);
}

// `op`, filled by the first call that needs it, is the caller's own; all under the GIL.
template <typename... R, typename... A>
PyObject* call(const char* name, PyObject*& op, std::tuple<R...> (*f)(A...), PyObject* const* args, Py_ssize_t count) {
  if (torch_api.ready && count == (Py_ssize_t)sizeof...(A)) {
    PyObject* const result = run_directly(f, args, std::index_sequence_for<A...>{});
    if (result || PyErr_Occurred()) return result;
  }
  if (!op) {
    PyObject* const found = find_operator(name);
    if (!found) return nullptr;
    if (op) {
      Py_DECREF(found);  // finding it may have let another thread in, which was first
    } else {
      op = found;
    }
  }
  Ref tuple(PyTuple_New(count));
  if (!tuple) return nullptr;
  for (Py_ssize_t i = 0; i < count; i++) {
    Py_INCREF(args[i]);
    PyTuple_SetItem(tuple.get(), i, args[i]);
  }
  PyObject* const result = PyObject_Call(op, tuple.get(), nullptr);
  if (!result) recognise_out_of_memory();
  return result;
}

PyObject* norm_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject* op = nullptr;
  PyObject* all[9];
  if (count == 8) {  // the last has a default
    std::copy_n(args, 8, all);
    all[8] = Py_False;
    args = all;
    count = 9;
  }
  return call("norm_forward", op, &fused_norm::norm_forward, args, count);
}

PyObject* norm_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject* op = nullptr;
  return call("norm_backward", op, &fused_norm::norm_backward, args, count);
}

PyObject* norm_double_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject* op = nullptr;
  return call("norm_double_backward", op, &fused_norm::norm_double_backward, args, count);
}

// ------------------------------------------------------------------------------------------------------------ An ordinary call's check

// t's metadata; false where torch has none to give, or no elements in memory behind it: freed storage, or a ZeroTensor. (torch's table asks
// for the data as if to write: a lazy clone becomes a copy.)
bool view(PyObject* t, DLTensor& out) {
  if (torch_api.dltensor(t, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  return out.data != nullptr;
}

bool is_low_precision(const DLTensor& t) { return t.bits == 16; }  // given that kernels_take it

bool kernels_take(const DLTensor& t) {
  if (t.lanes != 1) return false;
  return t.code == kDLFloat ? t.bits == 16 || t.bits == 32 || t.bits == 64 : t.code == kDLBfloat && t.bits == 16;
}

bool same_dtype(const DLTensor& a, const DLTensor& b) { return a.code == b.code && a.bits == b.bits; }

bool is_resolved(PyObject* t) { return is(PyObject_CallFunctionObjArgs(torch_api.is_neg, t, nullptr), Py_False); }

// Weight or bias: of shape `sizes`, and as it lies in memory.
bool is_ordinary_param(PyObject* p, const DLTensor& x, const int64_t* sizes, int64_t dim, DLTensor& out) {
  if (!is_plain(p) || !view(p, out) || out.device_type != x.device_type || out.device_id != x.device_id || out.ndim != dim) return false;
  if (!kernels_take(out) || !(same_dtype(out, x) || (is_low_precision(x) && out.code == kDLFloat && out.bits == 32))) return false;
  int64_t expected = 1;
  for (int64_t i = dim; i-- > 0; expected *= sizes[i]) {
    if (out.shape[i] != sizes[i] || (sizes[i] != 1 && out.strides[i] != expected)) return false;
  }
  return is_resolved(p);
}

// The number of elements in a row, or 0. fused_norm/functional.py holds the rules; this knows only the calls that pass all of them.
int64_t row_length(PyObject* x, PyObject* shape, PyObject* weight, PyObject* bias) {
  if (!is_plain(x)) return 0;
  const bool is_list = PyList_CheckExact(shape);
  if (!is_list && !PyTuple_CheckExact(shape) && Py_TYPE(shape) != torch_api.size) return 0;
  const int64_t dim = is_list ? PyList_Size(shape) : PyTuple_Size(shape);
  if (dim < 1) return 0;
  // A torch function mode, such as a default device, takes the call's place. Under torch.func and on these devices and layouts torch has no
  // metadata to give, and would say so by an exception of a millisecond or two.
  if (!is(PyObject_CallNoArgs(torch_api.function_mode_enabled), Py_False) || !is(PyObject_CallNoArgs(torch_api.peek_interpreter), Py_None))
    return 0;
  if (!attribute_is(x, torch_api.name_is_cpu, Py_True) && !attribute_is(x, torch_api.name_is_cuda, Py_True)) return 0;
  DLTensor tx, tw, tb;
  if (!attribute_is(x, torch_api.name_is_nested, Py_False) || !view(x, tx) || !kernels_take(tx) || dim > tx.ndim) return 0;
  for (int32_t i = 0; i < tx.ndim; i++) {
    if (tx.shape[i] == 0) return 0;
  }
  const int64_t* const sizes = tx.shape + (tx.ndim - dim);
  int64_t n = 1;
  for (int64_t i = 0; i < dim; i++) {
    PyObject* const item = is_list ? PyList_GetItem(shape, i) : PyTuple_GetItem(shape, i);
    int64_t size;
    if (!item || !convert(item, size) || size != sizes[i]) return 0;
    n *= size;
  }
  if (weight != Py_None && !is_ordinary_param(weight, tx, sizes, dim, tw)) return 0;
  if (bias != Py_None && !is_ordinary_param(bias, tx, sizes, dim, tb)) return 0;
  if (weight != Py_None && bias != Py_None && !same_dtype(tw, tb)) return 0;
  return is_resolved(x) ? n : 0;
}

PyObject* plain_row_length(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "plain_row_length takes 4 arguments, %zd given", count);
  const int64_t n = torch_api.ready ? row_length(args[0], args[1], args[2], args[3]) : 0;
  PyErr_Clear();
  return PyLong_FromLongLong(n);
}

// ---------------------------------------------------------------------------------------------------------------------- Instruction set

PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString(fused_norm::kernels().name); }

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  const char* names[3];
  const int count = fused_norm::capabilities(names);
  PyObject* result = PyTuple_New(count);
  for (int i = 0; result && i < count; i++) {
    PyObject* name = PyUnicode_FromString(names[i]);
    if (!name || PyTuple_SetItem(result, i, name) < 0) Py_CLEAR(result);
  }
  return result;
}

PyObject* set_cpu_capability(PyObject*, PyObject* arg) {
  PyObject* bytes = PyUnicode_AsUTF8String(arg);
  if (!bytes) return nullptr;
  const bool found = fused_norm::set_capability(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!found) return PyErr_Format(PyExc_ValueError, "this machine has no CPU capability %R", arg);
  Py_RETURN_NONE;
}

PyObject* set_past_cache_bytes(PyObject*, PyObject* arg) {
  const long long bytes = PyLong_AsLongLong(arg);
  if (bytes == -1 && PyErr_Occurred()) return nullptr;
  const long long before = std::exchange(fused_norm::past_cache_bytes, bytes);
  return PyLong_FromLongLong(before);
}

// --------------------------------------------------------------------------------------------------------------------------- The module

template <typename F>
PyCFunction fastcall(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"norm_forward", fastcall(norm_forward), METH_FASTCALL, "The operator fused_norm::norm_forward, past the dispatcher where nothing is lost."},
    {"norm_backward", fastcall(norm_backward), METH_FASTCALL, "The operator fused_norm::norm_backward, likewise."},
    {"norm_double_backward", fastcall(norm_double_backward), METH_FASTCALL, "The operator fused_norm::norm_double_backward, likewise."},
    {"plain_row_length", fastcall(plain_row_length), METH_FASTCALL,
     "plain_row_length(x, normalized_shape, weight, bias): the elements in a row of an ordinary call, whose arguments need no further check or"
     " conversion; 0 for any other."},
    {"cpu_capability", cpu_capability, METH_NOARGS, "The instruction set in use: default, avx2 or avx512."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, "Those this machine can run, best last."},
    {"set_cpu_capability", set_cpu_capability, METH_O, "Use this one from now on."},
    {"set_past_cache_bytes", set_past_cache_bytes, METH_O, "From how many bytes on results are written past the caches; gives what it was."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "fused_norm's native CPU kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  Ref torch(PyImport_ImportModule("torch"));
  torch_api.ready = torch && fill(torch_api, torch.get());
  PyErr_Clear();
  return PyModule_Create(&definition);
}
