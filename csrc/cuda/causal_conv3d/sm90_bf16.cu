// The Hopper convolution's tiles in bfloat16. Dtypes are files of their own, so that they compile side by
// side.
#include "cuda/causal_conv3d/sm90_kernel.cuh"

namespace vtok::cuda {
HopperVariants hopper_variants_bf16() { return hopper_variants_of<__nv_bfloat16>(); }
}  // namespace vtok::cuda
