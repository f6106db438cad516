// What a swap asks before each call, in one pass: whether a module and its parts are what they were when they
// were last read. vtok_fast/swap/watch.py describes the nodes that it is given, and does the same in Python.
#include <algorithm>
#include <memory>
#include <vector>

#include "bindings/caster.h"

namespace {

enum class How : long { any = 0, is = 1, type = 2, empty = 3, list = 4, parameters, modules };

struct Entry {
  PyObject* key;
  PyObject* seen;
  How how;
  mutable Py_ssize_t place;  // where PyDict_Next found it
};

struct Function {
  PyTypeObject* kind;
  PyObject* name;
  PyObject* function;
  bool operator==(const Function& o) const { return kind == o.kind && name == o.name; }
};

// Everything is borrowed from the tuples that a Watch holds.
struct Node {
  PyTypeObject* kind = nullptr;  // null: only the children are looked at
  std::vector<Entry> entries;    // all, in their order
  mutable bool placed = false;
  std::vector<PyTypeObject*> weights;
  struct Child {
    PyObject* name;
    std::unique_ptr<Node> node;  // null: there is none
  };
  std::vector<Child> children;
  Py_ssize_t count = 0;  // of all children
};

struct Plan {
  Node root;
  std::vector<Function> functions;  // of all classes
  std::vector<PyObject*> hooks;     // dictionaries that must be empty
  descrgetfunc get_dtype = nullptr;
};

struct Watch {
  PyObject_HEAD PyObject* held;  // (nodes, hooks)
  PyObject* dtype_of;            // the descriptor of Tensor.dtype
  Plan* plan;
};

struct Names {
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
};

const Names& names() {
  static const Names all;
  return all;
}

PyObject* at(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }

// ---- reading what Python saw

Node read_node(PyObject* tuple, Plan& plan) {
  Node node;
  if (at(tuple, 0) != Py_None) {
    node.kind = reinterpret_cast<PyTypeObject*>(at(tuple, 0));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(at(tuple, 1)); ++i) {
      PyObject* pair = at(at(tuple, 1), i);
      const Function function{node.kind, at(pair, 0), at(pair, 1)};
      auto& all = plan.functions;
      if (std::find(all.begin(), all.end(), function) == all.end()) all.push_back(function);
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(at(tuple, 2)); ++i) {
      PyObject* entry = at(at(tuple, 2), i);
      How how = static_cast<How>(PyLong_AsLong(at(entry, 1)));
      if (at(entry, 0) == names().parameters) how = How::parameters;
      if (at(entry, 0) == names().modules) how = How::modules;
      node.entries.push_back({at(entry, 0), at(entry, 2), how, 0});
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(at(tuple, 3)); ++i)
      node.weights.push_back(reinterpret_cast<PyTypeObject*>(at(at(tuple, 3), i)));
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(at(tuple, 4)); ++i) {
    PyObject* child = at(at(tuple, 4), i);
    std::unique_ptr<Node> below;
    if (at(child, 1) != Py_None) below = std::make_unique<Node>(read_node(at(child, 1), plan));
    node.children.push_back({at(child, 0), std::move(below)});
  }
  node.count = PyLong_AsSsize_t(at(tuple, 5));
  return node;
}

// ---- comparing with it

bool same_list(PyObject* list, PyObject* seen) {
  if (!PyList_CheckExact(list) || PyList_GET_SIZE(list) != PyTuple_GET_SIZE(seen)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(seen); ++i)
    if (PyList_GET_ITEM(list, i) != at(seen, i)) return false;
  return true;
}

class Comparison {
 public:
  Comparison(const Watch* watch, PyObject* dtype) : watch_(watch), dtype_(dtype) {}

  bool fits = true;  // whether all weights are of the dtype

  bool same(PyObject* module, const Node& node) {
    PyObject* dict = PyObject_GenericGetDict(module, nullptr);
    if (!dict) return false;
    const bool equal = same(module, dict, node);
    Py_DECREF(dict);
    return equal;
  }

 private:
  bool same(PyObject* module, PyObject* dict, const Node& node) {
    PyObject *modules = nullptr, *parameters = nullptr;
    if (node.kind) {
      if (Py_TYPE(module) != node.kind || PyDict_GET_SIZE(dict) != Py_ssize_t(node.entries.size()))
        return false;
      // At the places of the last time; all of them, where the dictionary is another one.
      if (!node.placed || !read_values(dict, node, false)) node.placed = read_values(dict, node, true);
      if (!node.placed || !equal_) return false;
      parameters = parameters_, modules = modules_;
      if (!parameters || !PyDict_Check(parameters) || !same_weights(parameters, node.weights)) return false;
    } else {
      modules = PyDict_GetItemWithError(dict, names().modules);
    }
    if (node.children.empty()) return true;
    if (!modules || !PyDict_Check(modules) || (node.kind && PyDict_GET_SIZE(modules) != node.count))
      return false;
    for (const auto& child : node.children) {
      PyObject* part = PyDict_GetItemWithError(modules, child.name);
      if (!part || (child.node ? !same(part, *child.node) : part != Py_None)) return false;
    }
    return true;
  }

  // Whether the keys are those of the node; equal_ is whether the values are too.
  bool read_values(PyObject* dict, const Node& node, bool all) {
    equal_ = true, parameters_ = modules_ = nullptr;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Entry& entry : node.entries) {
      if (all)
        entry.place = position;
      else if (entry.how == How::any)
        continue;
      else
        position = entry.place;
      if (!PyDict_Next(dict, &position, &key, &value) || key != entry.key) return false;
      equal_ = equal_ && same_value(value, entry);
    }
    return true;
  }

  bool same_value(PyObject* value, const Entry& entry) {
    switch (entry.how) {
      case How::any: return true;
      case How::is: return value == entry.seen;
      case How::type: return reinterpret_cast<PyObject*>(Py_TYPE(value)) == entry.seen;
      case How::empty: return PyDict_Check(value) && PyDict_GET_SIZE(value) == 0;
      case How::list: return same_list(value, entry.seen);
      case How::parameters: parameters_ = value; return true;
      case How::modules: modules_ = value; return true;
    }
    return false;
  }

  bool same_weights(PyObject* dict, const std::vector<PyTypeObject*>& kinds) {
    if (PyDict_GET_SIZE(dict) != Py_ssize_t(kinds.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key, *weight;
    for (PyTypeObject* kind : kinds) {
      if (!PyDict_Next(dict, &position, &key, &weight) || Py_TYPE(weight) != kind) return false;
      if (weight == Py_None || !fits) continue;
      PyObject* found = watch_->plan->get_dtype(watch_->dtype_of, weight, reinterpret_cast<PyObject*>(kind));
      if (!found) return false;
      fits = found == dtype_;
      Py_DECREF(found);
    }
    return true;
  }

  const Watch* watch_;
  PyObject* dtype_;
  bool equal_ = true;
  PyObject *parameters_ = nullptr, *modules_ = nullptr;
};

PyObject* watch_same(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Watch* watch = reinterpret_cast<Watch*>(self);
  if (count != 2 || !watch->plan) {
    PyErr_SetString(PyExc_TypeError, "same: expected a module and a dtype or None");
    return nullptr;
  }
  for (PyObject* hooks : watch->plan->hooks)
    if (PyDict_GET_SIZE(hooks)) Py_RETURN_FALSE;
  for (const Function& f : watch->plan->functions)
    if (_PyType_Lookup(f.kind, f.name) != f.function) Py_RETURN_FALSE;
  Comparison comparison(watch, args[1]);
  const bool equal = comparison.same(args[0], watch->plan->root);
  if (PyErr_Occurred()) PyErr_Clear();
  if (!equal) Py_RETURN_FALSE;
  if (comparison.fits) Py_RETURN_TRUE;
  Py_RETURN_NONE;
}

// ---- the class

int watch_init(PyObject* self, PyObject* args, PyObject*) {
  Watch* watch = reinterpret_cast<Watch*>(self);
  PyObject *nodes, *hooks, *dtype_of;
  if (!PyArg_ParseTuple(args, "O!O!O", &PyTuple_Type, &nodes, &PyTuple_Type, &hooks, &dtype_of)) return -1;
  if (watch->plan || !Py_TYPE(dtype_of)->tp_descr_get) {
    PyErr_SetString(PyExc_TypeError, "Watch: made already, or the dtype's descriptor has no __get__");
    return -1;
  }
  watch->held = PyTuple_Pack(2, nodes, hooks);
  if (!watch->held) return -1;
  watch->dtype_of = Py_NewRef(dtype_of);
  watch->plan = new Plan;
  watch->plan->get_dtype = Py_TYPE(dtype_of)->tp_descr_get;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(hooks); ++i) watch->plan->hooks.push_back(at(hooks, i));
  watch->plan->root = read_node(nodes, *watch->plan);
  return PyErr_Occurred() ? -1 : 0;
}

void watch_dealloc(PyObject* self) {
  Watch* watch = reinterpret_cast<Watch*>(self);
  delete watch->plan;
  Py_XDECREF(watch->held), Py_XDECREF(watch->dtype_of);
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
