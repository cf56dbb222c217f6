#include "cuda_on_host.h"
// The kernels use what stands above.
#include "../../kernels/float_formats.inl"
// And this.
#include "../../kernels/update.cu"

LAUNCHER(adamw, false)
LAUNCHER(lion, false)
LAUNCHER(adagrad, false)
