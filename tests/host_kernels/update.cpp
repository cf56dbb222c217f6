#include "cuda_on_host.h"
// The kernels use what stands above.
#include "../../kernels/update.cu"

#define LAUNCHER(kernel)                                                                               \
  extern "C" bool launch_##kernel(unsigned blocks, unsigned threads, void** arguments, size_t count) { \
    return launch(kernel, blocks, threads, arguments, count);                                          \
  }
LAUNCHER(adamw)
LAUNCHER(lion)
LAUNCHER(adagrad)
