// What each file of this folder adds to the module; nothing here but conversion and checks.
//
// Ownership: Python objects hold the native ones by shared_ptr; none keeps an address that Python may free.
// Threads: called with the GIL, which is released in every call that can take longer than a microsecond.
#pragma once

#include <pybind11/pybind11.h>

namespace offload::bindings {

void bind_errors(pybind11::module_& module);
void bind_device(pybind11::module_& module);     // Ticket, clocks, HostDevice, TransferQueue
void bind_cuda(pybind11::module_& module);       // CudaDevice
void bind_memory(pybind11::module_& module);     // HostPool, HostBuffer
void bind_storage(pybind11::module_& module);    // BlockFile
void bind_optimizer(pybind11::module_& module);  // optimizers over spans, instruction sets
void bind_pipeline(pybind11::module_& module);   // StepPipeline
void bind_trace(pybind11::module_& module);      // the records of what the core did
void bind_unified(pybind11::module_& module);    // UnifiedMemory, UnifiedBlock, torch's allocator

}  // namespace offload::bindings
