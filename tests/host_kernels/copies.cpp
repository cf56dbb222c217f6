#include "cuda_on_host.h"
// The kernels use what stands above.
#include "../../kernels/prelude.inl"
// And this.
#include "../../kernels/copies.cu"

LAUNCHER(copy_spans, false)
