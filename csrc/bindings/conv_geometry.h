// Python's `Geometry.native()`, a tuple of eight, arrives as the ConvGeometry of the same fields.
#pragma once
#include "bindings/caster.h"
#include "conv_problem.h"

namespace pybind11::detail {

template <>
struct type_caster<vtok::ConvGeometry> {
  PYBIND11_TYPE_CASTER(
      vtok::ConvGeometry,
      const_name("tuple[tuple[int, int, int], tuple[int, int, int], int, "
                 "tuple[int, int, int, int, int, int], int, int, tuple[int, int, int], bool]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 8) return false;
    const auto fields = reinterpret_borrow<tuple>(source);
    return numbers(fields[0], value.stride) && numbers(fields[1], value.dilation) &&
           number(fields[2], &value.groups) && numbers(fields[3], value.pad) &&
           mode(fields[4], &value.time_mode) && mode(fields[5], &value.spatial_mode) &&
           numbers(fields[6], value.upsample) && number(fields[7], &value.upsample_first_frame_once);
  }

 private:
  template <class T>
  static bool number(handle from, T* to) {
    make_caster<T> caster;
    if (!caster.load(from, true)) return false;
    *to = cast_op<T>(caster);
    return true;
  }
  template <class T, size_t N>
  static bool numbers(handle from, T (&to)[N]) {
    if (!PyTuple_Check(from.ptr()) || PyTuple_GET_SIZE(from.ptr()) != Py_ssize_t(N)) return false;
    for (size_t i = 0; i < N; ++i)
      if (!number(PyTuple_GET_ITEM(from.ptr(), Py_ssize_t(i)), &to[i])) return false;
    return true;
  }
  static bool mode(handle from, vtok::PadMode* to) {
    int code;
    if (!number(from, &code)) return false;
    *to = static_cast<vtok::PadMode>(code);
    return true;
  }
};

}  // namespace pybind11::detail
