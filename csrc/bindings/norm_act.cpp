#include "cpu/norm_act.h"

#include "bindings/caster.h"

void vtok::bind_norm_act(pybind11::module_& m) {
  m.def("norm_act", [](Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, Tensor residual,
                       Tensor out, bool channels_last, bool centered, bool over_positions, bool per_frame,
                       int groups, float eps, bool silu, int threads) {
    launch([&] {
      return cpu::norm_act({x, weight, bias, scale, shift, residual, out, channels_last, centered,
                            over_positions, per_frame, groups, eps, silu, threads});
    });
  });
}
