#include "cuda_on_host.h"
// The kernels use what stands above.
#include "../../kernels/prelude.inl"
// And this.
#include "../../kernels/update.cu"

LAUNCHER(adamw, false)
LAUNCHER(adamw_bf16, false)
LAUNCHER(adamw_int8, true)
LAUNCHER(lion, false)
LAUNCHER(lion_bf16, false)
LAUNCHER(lion_int8, true)
LAUNCHER(adagrad, false)
