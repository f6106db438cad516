#include <algorithm>
#include <array>
#include <optional>

#include "bindings/caster.h"
#include "cpu/causal_conv3d.h"

namespace py = pybind11;
using vtok::Tensor;
using vtok::cpu::ConvProblem;

namespace {

void fill(int* to, const std::array<int, 3>& from) { std::copy(from.begin(), from.end(), to); }

ConvProblem problem(Tensor x, Tensor weight, Tensor bias, Tensor cache, Tensor residual, Tensor out,
                    std::array<int, 3> stride, std::array<int, 3> dilation, int groups,
                    std::array<int64_t, 6> pad, int time_mode, int spatial_mode, std::array<int, 3> upsample,
                    bool upsample_first_frame_once, std::optional<float> alpha, int activation, int algorithm,
                    int threads) {
  ConvProblem p;
  p.x = x, p.weight = weight, p.bias = bias, p.cache = cache, p.residual = residual, p.out = out;
  fill(p.stride, stride), fill(p.dilation, dilation), fill(p.upsample, upsample);
  std::copy(pad.begin(), pad.end(), p.pad);
  p.groups = groups;
  p.time_mode = static_cast<vtok::cpu::PadMode>(time_mode);
  p.spatial_mode = static_cast<vtok::cpu::PadMode>(spatial_mode);
  p.upsample_first_frame_once = upsample_first_frame_once;
  p.has_alpha = alpha.has_value(), p.alpha = alpha.value_or(0);
  p.activation = static_cast<vtok::cpu::Activation>(activation);
  p.algorithm = static_cast<vtok::cpu::Algorithm>(algorithm);
  p.threads = std::clamp(threads, 1, 1024);
  return p;
}

}  // namespace

void vtok::bind_causal_conv3d(py::module_& m) {
  m.def("causal_conv3d", [](Tensor x, Tensor weight, Tensor bias, Tensor cache, Tensor residual, Tensor out,
                            std::array<int, 3> stride, std::array<int, 3> dilation, int groups,
                            std::array<int64_t, 6> pad, int time_mode, int spatial_mode,
                            std::array<int, 3> upsample, bool upsample_first_frame_once,
                            std::optional<float> alpha, int activation, int algorithm, int threads) {
    launch([&] {
      return cpu::causal_conv3d(problem(x, weight, bias, cache, residual, out, stride, dilation, groups, pad,
                                        time_mode, spatial_mode, upsample, upsample_first_frame_once, alpha,
                                        activation, algorithm, threads));
    });
  });
  // Which algorithm automatic choice takes for shapes like these; pointers are not read. "reference" where
  // ATen is faster.
  m.def(
      "causal_conv3d_choice",
      [](Tensor x, Tensor weight, Tensor out, std::array<int, 3> stride, std::array<int, 3> dilation,
         int groups, std::array<int64_t, 6> pad, int time_mode, int spatial_mode, std::array<int, 3> upsample,
         bool upsample_first_frame_once, int threads) {
        return cpu::causal_conv3d_choice(problem(x, weight, {}, {}, {}, out, stride, dilation, groups, pad,
                                                 time_mode, spatial_mode, upsample, upsample_first_frame_once,
                                                 {}, 0, 0, threads));
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
