// The sm90 convolution's tiles in bfloat16. Dtypes are files of their own, so that they compile side by
// side.
#include "cuda/causal_conv3d/sm90_kernel.cuh"

namespace vtok::cuda {
Sm90Variants sm90_variants_bf16() { return sm90_variants_of<__nv_bfloat16, __nv_bfloat16>(); }
}  // namespace vtok::cuda
