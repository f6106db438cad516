#include "cpu/fsq.h"

#include "bindings/caster.h"

void vtok::bind_fsq(pybind11::module_& m) {
  m.def("fsq_quantize", [](Tensor z, Tensor codes, Tensor indices, Tensor thresholds,
                           std::vector<int64_t> levels, int dim, int threads) {
    launch([&] { return cpu::fsq_quantize(z, codes, indices, thresholds, levels, dim, threads); });
  });
}
