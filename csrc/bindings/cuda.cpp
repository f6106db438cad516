// What belongs to no kernel, in a module built for GPUs: VTOK_CUDA is the list of architectures, such as
// "80,90a".
#ifdef VTOK_CUDA
#include "cuda/device.h"

#include <sstream>

#include "bindings/caster.h"

void vtok::bind_cuda(pybind11::module_& m) {
  pybind11::list archs;
  std::istringstream list(VTOK_CUDA);
  for (std::string arch; std::getline(list, arch, ',');) archs.append(arch);
  m.attr("cuda_archs") = pybind11::tuple(archs);
  m.def(
      "cuda_problem", [] { return cuda::problem(); },
      "Why no GPU can be used here, as the CUDA runtime says; empty where one can.");
}
#endif
