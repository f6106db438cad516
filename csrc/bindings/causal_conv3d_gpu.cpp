// Only in a module built for GPUs (VTOK_FAST_CUDA_ARCHS).
#ifdef VTOK_CUDA
#include "cuda/causal_conv3d/call.h"
#include "cuda/causal_conv3d/sm90_wgrad.h"

#include "bindings/conv_geometry.h"

namespace vtok {

// A launcher of call.h as it is, without the interpreter lock and with its Status raised.
template <class... P>
auto released(Status (*launcher)(P...)) {
  return [launcher](P... arguments) { launch([&] { return launcher(arguments...); }); };
}

void bind_causal_conv3d_cuda(pybind11::module_& m) {
  m.def("causal_conv3d_sm80", released(cuda::causal_conv3d_sm80_call));
  m.def("causal_conv3d_sm80_backward", released(cuda::causal_conv3d_sm80_backward_call));
#ifdef VTOK_SM90
  m.def("causal_conv3d_sm90", released(cuda::causal_conv3d_sm90_call));
  m.def("causal_conv3d_sm90_e4m3", released(cuda::causal_conv3d_sm90_e4m3_call));
  m.def("causal_conv3d_sm90_dgrad", released(cuda::causal_conv3d_sm90_dgrad_call));
  m.def("causal_conv3d_sm90_wgrad", released(cuda::causal_conv3d_sm90_wgrad_call));
#endif
}

}  // namespace vtok
#endif
