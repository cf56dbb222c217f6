#include "cuda_on_host.h"
// The kernels use what stands above.
#include "../../kernels/prelude.inl"
// And this.
#include "../../kernels/activations.cu"

LAUNCHER(encode_int8, true)
LAUNCHER(encode_fp8, true)
LAUNCHER(decode_int8, false)
LAUNCHER(decode_fp8, false)
