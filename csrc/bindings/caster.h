// What every bindings file shares: a torch tensor arrives as (data_ptr, dtype code, shape, strides) or None,
// and a Status leaves as an exception.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>

#include "status.h"
#include "tensor.h"

namespace pybind11::detail {

template <>
struct type_caster<vtok::Tensor> {
  PYBIND11_TYPE_CASTER(vtok::Tensor, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    PyObject** item = &PyTuple_GET_ITEM(source.ptr(), 0);
    value.data = PyLong_AsVoidPtr(item[0]);
    value.dtype = static_cast<vtok::DType>(PyLong_AsLong(item[1]));
    if (!PyTuple_Check(item[2]) || !PyTuple_Check(item[3])) return false;
    value.rank = static_cast<int>(PyTuple_GET_SIZE(item[2]));
    if (value.rank > vtok::kMaxRank || PyTuple_GET_SIZE(item[3]) != value.rank) return false;
    for (int i = 0; i < value.rank; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(item[2], i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(item[3], i));
    }
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail

namespace vtok {

inline void raise_if_error(const Status& status) {
  switch (status.code) {
    case Code::ok: return;
    case Code::invalid: throw pybind11::value_error(status.message);
    case Code::unsupported: PyErr_SetString(PyExc_NotImplementedError, status.message.c_str()); break;
    case Code::out_of_memory: PyErr_SetString(PyExc_MemoryError, status.message.c_str()); break;
    case Code::internal: PyErr_SetString(PyExc_RuntimeError, status.message.c_str()); break;
  }
  throw pybind11::error_already_set();
}

// Counts the launchers that run: the instance of the kernels must not change under one.
struct InFlight {
  static inline std::atomic<int> count{0};
  InFlight() { ++count; }
  ~InFlight() { --count; }
};

// Runs a launcher without the interpreter lock and raises what it reports.
template <class F>
void launch(F&& launcher) {
  Status status;
  {
    const InFlight running;
    pybind11::gil_scoped_release release;
    status = launcher();
  }
  raise_if_error(status);
}

void bind_causal_conv3d(pybind11::module_& m);
void bind_norm_act(pybind11::module_& m);
void bind_fsq(pybind11::module_& m);
void bind_token_packing(pybind11::module_& m);
void bind_watch(pybind11::module_& m);

// Only in a module built for GPUs (VTOK_FAST_CUDA_ARCHS).
void bind_cuda(pybind11::module_& m);
void bind_causal_conv3d_cuda(pybind11::module_& m);
void bind_fsq_gpu(pybind11::module_& m);

}  // namespace vtok
