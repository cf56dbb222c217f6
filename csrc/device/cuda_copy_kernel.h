// Many small copies in one launch: for drivers that take no batches (before CUDA 12.8).
//
// [Note: copies by a kernel] What a small copy costs is its submission, about 2 us of the thread that makes
// it; a launch is one submission, whatever the number of copies. The kernel (kernels/copies.cu) reads and
// writes registered host memory at the host's own addresses, so nothing is gathered in a slab: its one
// argument is a table of at most 64 spans, by value, and four blocks of 256 threads work through each. Larger
// copies are left to the copy engines, as the multiprocessors are compute's.
//
// Ownership: owns the module that it loads. The context outlives it, and is current at every call.
// Threads: immutable once loaded; launch() may be called from any thread.
// Stream order: a launch is work of its stream, as a copy is.
// Units: bytes.
#pragma once

#include <cstddef>
#include <span>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace offload {

class CudaCopyKernel {
 public:
  // `cubin`: of kernels/copies.cu, for this device. Throws kDevice when the driver refuses it.
  CudaCopyKernel(const CudaDriver& driver, std::span<const std::byte> cubin);
  ~CudaCopyKernel();
  CudaCopyKernel(const CudaCopyKernel&) = delete;
  CudaCopyKernel& operator=(const CudaCopyKernel&) = delete;

  // The link takes about as long for so many bytes as the driver for a submission.
  static bool takes(const CopySpan& copy) noexcept { return copy.bytes <= kLargestBytes; }

  // Copies that share no byte, each of which it takes. Another code than 0: any of them may have been sent.
  CudaResult launch(std::span<const CopySpan> copies, CudaStreamHandle stream) const noexcept;

 private:
  static constexpr size_t kLargestBytes = size_t{64} << 10;

  const CudaDriver& driver_;
  CudaModule module_ = nullptr;
  CudaFunction function_ = nullptr;
};

}  // namespace offload
