// The sm90 convolution's tiles in float16. Dtypes are files of their own, so that they compile side by
// side.
#include "cuda/causal_conv3d/sm90_kernel.cuh"

namespace vtok::cuda {
Sm90Variants sm90_variants_f16() { return sm90_variants_of<__half, __half>(); }
}  // namespace vtok::cuda
