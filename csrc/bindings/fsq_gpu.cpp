// Only in a module built for GPUs (VTOK_FAST_CUDA_ARCHS). `stream` is the handle of a CUDA stream.
#ifdef VTOK_CUDA
#include "cuda/fsq/fsq.h"

#include "bindings/caster.h"

void vtok::bind_fsq_gpu(pybind11::module_& m) {
  m.def("fsq_sm80_quantize", [](Tensor z, Tensor codes, Tensor indices, Tensor thresholds,
                                std::vector<int64_t> levels, int dim, uint64_t stream) {
    launch([&] {
      return cuda::fsq_quantize(z, codes, indices, thresholds, levels, dim, reinterpret_cast<void*>(stream));
    });
  });
  m.def("fsq_sm80_decode", [](Tensor indices, Tensor codes, std::vector<int64_t> levels, int dim,
                              uint64_t stream) {
    launch([&] { return cuda::fsq_decode(indices, codes, levels, dim, reinterpret_cast<void*>(stream)); });
  });
  m.def("fsq_sm80_backward", [](Tensor grad, Tensor z, Tensor grad_z, std::vector<float> shifts,
                                std::vector<float> slopes, int dim, uint64_t stream) {
    launch([&] {
      return cuda::fsq_backward(grad, z, grad_z, shifts, slopes, dim, reinterpret_cast<void*>(stream));
    });
  });
}
#endif
