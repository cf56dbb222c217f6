// The compute device "cuda", through the driver API.
//
// Ownership: retains the device's primary context, which torch uses, too; streams keep what they need of it.
// Threads: every member may be called from any thread. In a forked child every call throws kState, and
//          destructors leak.
// Stream order: see cuda_stream.h, [Note: who issues a copy].
// Units: bytes. `index` counts the devices that the driver shows, as torch's does (CUDA_VISIBLE_DEVICES,
//        MIG).
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "device/cuda_context.h"
#include "device/cuda_memory_facts.h"
#include "device/device.h"
#include "device/pinned_ranges.h"

namespace offload {

struct CudaDeviceOptions {
  int index = 0;
  std::string driver_path;           // empty: see CudaDriver::load
  int64_t drain_ns = 5'000'000'000;  // how long a dying stream waits for a device on which nothing ends
  bool takes_batches = true;         // false: as if the driver had no cuMemcpyBatchAsync
};

struct CudaFacts {
  std::string name;
  std::string uuid;  // as torch prints it, without a prefix
  int index = 0;
  CudaMemoryKind memory_kind = CudaMemoryKind::kDiscrete;
  int compute_capability_major = 0;
  int compute_capability_minor = 0;
  int multiprocessor_count = 0;
  int copy_engine_count = 0;
  size_t total_bytes = 0;
  size_t free_bytes = 0;   // now
  int driver_version = 0;  // 12040 is CUDA 12.4
  bool can_pin = false;
  size_t pageable_copy_count = 0;  // copies so far that went through memory which is not registered
};

class CudaDevice final : public Device {
 public:
  // Throws kDevice when there is no driver, it is too old, or the device is not there.
  explicit CudaDevice(const CudaDeviceOptions& options = {});
  ~CudaDevice() override;

  const char* kind() const noexcept override { return "cuda"; }
  std::unique_ptr<Stream> create_stream(const std::string& name) override;
  Ticket submit_copies(Stream& stream, Direction direction, std::span<const CopySpan> copies) override;
  CopiesTogether copies_together() const noexcept override { return context_->copies_together(); }
  void wait_ticket(Stream& stream, const Ticket& ticket) override;
  std::string why_no_word(const uint32_t* word) override;
  void wait_compute(Stream& stream, uintptr_t compute_stream) override;
  bool compute_wait(uintptr_t compute_stream, const Ticket& ticket, int64_t timeout_ns = -1) override;
  void pin(void* address, size_t bytes) override;
  void unpin(void* address, size_t bytes) noexcept override;

  // Small copies go by this kernel where the driver takes no batches: kernels/copies.cu, compiled for the
  // device. Throws kDevice when the driver refuses it, or kernels do not reach registered memory at the
  // host's addresses; kState when there is one.
  void load_copy_kernel(std::span<const std::byte> cubin);

  CudaFacts facts() const;
  size_t pinned_bytes() const;

 private:
  int attribute(int attribute) const { return device_attribute(driver_, ordinal_, attribute); }
  bool can_pin() const;

  const CudaDriver& driver_;
  const int index_;
  const int64_t drain_ns_;
  const CudaOrdinal ordinal_;
  const std::shared_ptr<CudaPrimaryContext> context_;
  PinnedRanges pinned_;
  std::atomic<size_t> pageable_copy_count_{0};
};

}  // namespace offload
