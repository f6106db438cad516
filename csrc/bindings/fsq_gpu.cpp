// Only in a module built for GPUs (VTOK_FAST_CUDA_ARCHS). `queue` is a device and a stream.
#ifdef VTOK_CUDA
#include "cuda/device.h"
#include "cuda/fsq/fsq.h"

#include "bindings/caster.h"

void vtok::bind_fsq_gpu(pybind11::module_& m) {
  m.def("fsq_sm80_quantize", [](Tensor z, Tensor codes, Tensor indices, Tensor thresholds,
                                std::vector<int64_t> levels, int dim, cuda::Queue queue) {
    launch([&] {
      VTOK_RETURN_IF_ERROR(cuda::use(queue));
      return cuda::fsq_quantize(z, codes, indices, thresholds, levels, dim, cuda::stream_of(queue));
    });
  });
  m.def("fsq_sm80_decode",
        [](Tensor indices, Tensor codes, std::vector<int64_t> levels, int dim, cuda::Queue queue) {
          launch([&] {
            VTOK_RETURN_IF_ERROR(cuda::use(queue));
            return cuda::fsq_decode(indices, codes, levels, dim, cuda::stream_of(queue));
          });
        });
  m.def("fsq_sm80_backward", [](Tensor grad, Tensor z, Tensor grad_z, std::vector<float> shifts,
                                std::vector<float> slopes, int dim, cuda::Queue queue) {
    launch([&] {
      VTOK_RETURN_IF_ERROR(cuda::use(queue));
      return cuda::fsq_backward(grad, z, grad_z, shifts, slopes, dim, cuda::stream_of(queue));
    });
  });
}
#endif
