// What a swap asks before each call, in one pass: whether a module and its parts are what they were when they
// were last read. vtok_fast/swap/watch.py describes the nodes that it is given, and does the same in Python.
#include "bindings/caster.h"

namespace {

enum How { kAny = 0, kIs = 1, kType = 2, kEmpty = 3, kList = 4 };

struct Watch {
  PyObject_HEAD
  PyObject* nodes;     // holds everything that is compared with
  PyObject* hooks;     // dictionaries that must be empty
  PyObject* dtype_of;  // the descriptor of Tensor.dtype
};

// Borrowed items of a tuple.
PyObject* at(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }

bool same_list(PyObject* list, PyObject* seen) {
  if (!PyList_CheckExact(list) || PyList_GET_SIZE(list) != PyTuple_GET_SIZE(seen)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(seen); ++i)
    if (PyList_GET_ITEM(list, i) != at(seen, i)) return false;
  return true;
}

bool same_value(PyObject* value, long how, PyObject* seen) {
  switch (how) {
    case kAny: return true;
    case kIs: return value == seen;
    case kType: return reinterpret_cast<PyObject*>(Py_TYPE(value)) == seen;
    case kEmpty: return PyDict_Check(value) && PyDict_GET_SIZE(value) == 0;
    case kList: return same_list(value, seen);
  }
  return false;
}

// The values of a dictionary against (key, how, seen) in their order.
bool same_values(PyObject* dict, PyObject* entries) {
  if (PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(entries)) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    PyObject* entry = at(entries, i);
    if (key != at(entry, 0) || !same_value(value, PyLong_AsLong(at(entry, 1)), at(entry, 2))) return false;
  }
  return true;
}

bool same_class(PyObject* kind, PyObject* attributes) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(attributes); ++i) {
    PyObject* pair = at(attributes, i);
    if (_PyType_Lookup(reinterpret_cast<PyTypeObject*>(kind), at(pair, 0)) != at(pair, 1)) return false;
  }
  return true;
}

// Whether the weights are of the classes that they were; whether of this dtype is added to `fits`.
bool same_weights(PyObject* dict, PyObject* kinds, PyObject* dtype, PyObject* dtype_of, bool& fits) {
  if (PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(kinds)) return false;
  Py_ssize_t position = 0;
  PyObject *key, *weight;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &weight); ++i) {
    PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(weight));
    if (kind != at(kinds, i)) return false;
    if (weight == Py_None || !fits) continue;
    PyObject* found = Py_TYPE(dtype_of)->tp_descr_get(dtype_of, weight, kind);
    if (!found) return false;
    fits = found == dtype;
    Py_DECREF(found);
  }
  return true;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = dict ? PyDict_GetItemWithError(dict, key) : nullptr;
  return found && PyDict_Check(found) ? found : nullptr;
}

struct Names {
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
};

// A node: (class or None, its attributes, values of the instance, classes of the weights, children).
bool same(Watch* watch, PyObject* module, PyObject* node, PyObject* dtype, bool& fits) {
  static const Names names;
  PyObject* dict = PyObject_GenericGetDict(module, nullptr);
  if (!dict) return false;
  PyObject* kind = at(node, 0);
  bool equal = true;
  if (kind != Py_None) {
    PyObject* weights = item(dict, names.parameters);
    equal = reinterpret_cast<PyObject*>(Py_TYPE(module)) == kind && same_class(kind, at(node, 1)) &&
            same_values(dict, at(node, 2)) && weights &&
            same_weights(weights, at(node, 3), dtype, watch->dtype_of, fits);
  }
  PyObject* children = at(node, 4);
  const Py_ssize_t count = PyTuple_GET_SIZE(children);
  PyObject* modules = equal && count ? item(dict, names.modules) : nullptr;
  equal = equal && (!count || modules);
  for (Py_ssize_t i = 0; equal && i < count; ++i) {
    PyObject* child = at(children, i);
    PyObject* part = PyDict_GetItemWithError(modules, at(child, 0));
    equal = part && (at(child, 1) == Py_None ? part == Py_None : same(watch, part, at(child, 1), dtype, fits));
  }
  if (equal && count && kind != Py_None) equal = PyDict_GET_SIZE(modules) == PyLong_AsLong(at(node, 5));
  Py_DECREF(dict);
  return equal;
}

PyObject* watch_same(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Watch* watch = reinterpret_cast<Watch*>(self);
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "same: expected a module and a dtype or None");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watch->hooks); ++i)
    if (PyDict_GET_SIZE(at(watch->hooks, i))) Py_RETURN_FALSE;
  bool fits = true;
  const bool equal = same(watch, args[0], watch->nodes, args[1], fits);
  if (PyErr_Occurred()) PyErr_Clear();
  if (!equal) Py_RETURN_FALSE;
  if (fits) Py_RETURN_TRUE;
  Py_RETURN_NONE;
}

int watch_init(PyObject* self, PyObject* args, PyObject*) {
  Watch* watch = reinterpret_cast<Watch*>(self);
  PyObject *nodes, *hooks, *dtype_of;
  if (!PyArg_ParseTuple(args, "O!O!O", &PyTuple_Type, &nodes, &PyTuple_Type, &hooks, &dtype_of)) return -1;
  if (!Py_TYPE(dtype_of)->tp_descr_get) {
    PyErr_SetString(PyExc_TypeError, "Watch: the dtype's descriptor has no __get__");
    return -1;
  }
  Py_INCREF(nodes), Py_INCREF(hooks), Py_INCREF(dtype_of);
  Py_XDECREF(watch->nodes), Py_XDECREF(watch->hooks), Py_XDECREF(watch->dtype_of);
  watch->nodes = nodes, watch->hooks = hooks, watch->dtype_of = dtype_of;
  return 0;
}

void watch_dealloc(PyObject* self) {
  Watch* watch = reinterpret_cast<Watch*>(self);
  Py_XDECREF(watch->nodes), Py_XDECREF(watch->hooks), Py_XDECREF(watch->dtype_of);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef kMethods[] = {
    {"same", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(watch_same)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyType_Slot kSlots[] = {{Py_tp_init, reinterpret_cast<void*>(watch_init)},
                        {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
                        {Py_tp_dealloc, reinterpret_cast<void*>(watch_dealloc)},
                        {Py_tp_methods, kMethods},
                        {0, nullptr}};
PyType_Spec kSpec = {"vtok_fast._C.Watch", sizeof(Watch), 0, Py_TPFLAGS_DEFAULT, kSlots};

}  // namespace

void vtok::bind_watch(pybind11::module_& m) {
  m.attr("Watch") = pybind11::reinterpret_steal<pybind11::object>(PyType_FromSpec(&kSpec));
}
