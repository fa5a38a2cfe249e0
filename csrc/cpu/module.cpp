// The Python module fused_norm._C. Importing it registers the operators (csrc/ops.cpp); what it holds itself is the choice of instruction
// set, which is no operator.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

namespace {

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

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "The instruction set in use: default, avx2 or avx512."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, "Those this machine can run, best last."},
    {"set_cpu_capability", set_cpu_capability, METH_O, "Use this one from now on."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "fused_norm's native CPU kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
