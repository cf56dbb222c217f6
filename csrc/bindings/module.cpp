#include "bindings/bindings.h"

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "The native core of offload. Addresses, lengths in bytes and format codes cross as integers.";
  module.attr("version") = OFFLOAD_VERSION;
  offload::bindings::bind_errors(module);
  offload::bindings::bind_device(module);
  offload::bindings::bind_cuda(module);
  offload::bindings::bind_memory(module);
  offload::bindings::bind_storage(module);
  offload::bindings::bind_optimizer(module);
  offload::bindings::bind_pipeline(module);
  offload::bindings::bind_trace(module);
  offload::bindings::bind_unified(module);
}
