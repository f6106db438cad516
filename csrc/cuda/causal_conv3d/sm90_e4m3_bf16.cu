// The sm90 convolution's tiles for operands of e4m3 and an output of bfloat16.
#include "cuda/causal_conv3d/sm90_kernel.cuh"

namespace vtok::cuda {
Sm90Variants sm90_variants_e4m3_bf16() { return sm90_variants_of<ptx::E4m3, __nv_bfloat16>(); }
}  // namespace vtok::cuda
