// The native module vtok_fast._C. One file per op under bindings/; here only what belongs to no op.
#include "bindings/caster.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Hand-written kernels of vtok_fast, on raw pointers; called through vtok_fast.ops.";
  vtok::bind_causal_conv3d(m);
  vtok::bind_norm_act(m);
  vtok::bind_fsq(m);
  vtok::bind_token_packing(m);
  vtok::bind_watch(m);

  m.def(
      "isa", [] { return vtok::cpu::isa_name(vtok::cpu::active_isa()); },
      "The instance of the CPU kernels in use.");
  m.def("set_isa", [](const char* name) {
    if (vtok::InFlight::count > 0)
      throw std::runtime_error("isa: cannot change while another thread runs a kernel");
    if (!vtok::cpu::set_isa(name))
      throw py::value_error(std::string("isa: not available on this processor: ") + name);
  });
  m.def("supported_isas", [] {
    py::list names;
    for (auto isa :
         {vtok::cpu::Isa::portable, vtok::cpu::Isa::avx2, vtok::cpu::Isa::wide, vtok::cpu::Isa::avx512})
      if (vtok::cpu::isa_supported(isa)) names.append(vtok::cpu::isa_name(isa));
    return names;
  });
  m.def("use_openmp_runtime", &vtok::cpu::use_openmp_runtime, py::arg("path"));
  m.def("threading_runtime", &vtok::cpu::threading_runtime);
#ifdef VTOK_CUDA
  vtok::bind_cuda(m);
  vtok::bind_causal_conv3d_cuda(m);
  vtok::bind_fsq_gpu(m);
#else
  m.attr("cuda_archs") = py::tuple();
#endif
}
