#include "cpu/causal_conv3d.h"

#include "bindings/conv_geometry.h"

namespace py = pybind11;

void vtok::bind_causal_conv3d(py::module_& m) {
  m.def("causal_conv3d", [](Tensor x, Tensor weight, Tensor bias, Tensor cache, Tensor residual, Tensor out,
                            const ConvGeometry& geometry, std::optional<float> alpha, bool silu,
                            int algorithm, int threads) {
    const ConvProblem p =
        with_epilogue(conv_problem(x, weight, cache, geometry), bias, residual, out, alpha, silu, {1, 1, 1});
    launch([&] { return cpu::causal_conv3d(p, static_cast<cpu::Algorithm>(algorithm), threads); });
  });
  // Which algorithm automatic choice takes for shapes like these; pointers are not read. "reference" where
  // ATen is faster.
  m.def(
      "causal_conv3d_choice",
      [](Tensor x, Tensor weight, Tensor out, const ConvGeometry& geometry, int threads) {
        ConvProblem p = conv_problem(x, weight, {}, geometry);
        p.out = out;
        return cpu::causal_conv3d_choice(p, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("set_weight_cache", &cpu::set_weight_cache, py::arg("bytes"),
        "Bound of the cache of transformed weights.");
  m.def("clear_weight_cache", &cpu::clear_weight_cache);
  m.def("weight_cache_stats", [] {
    auto s = cpu::weight_cache_stats();
    return py::dict(py::arg("bytes") = s.bytes, py::arg("bound") = s.bound, py::arg("entries") = s.entries,
                    py::arg("hits") = s.hits, py::arg("misses") = s.misses);
  });
}
