// Two ordered lanes between device and host memory.
//
// Ownership: owns one persistent stream per direction; shares the device.
// Threads: every member may be called from any thread. In a forked child submissions throw kState.
// Stream order: submissions of one direction run in their order; the two lanes are independent. Each
//               starts after what the named compute stream had been given at the call.
// Units: bytes. Callers keep source and destination alive until the ticket ended.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>

#include "base/fork_guard.h"
#include "base/ticket.h"
#include "device/device.h"

namespace offload {

struct TransferStats {
  uint64_t to_host_bytes = 0;
  uint64_t to_device_bytes = 0;
  uint64_t to_host_count = 0;
  uint64_t to_device_count = 0;
};

class TransferQueue {
 public:
  explicit TransferQueue(std::shared_ptr<Device> device);

  // Copies that share no byte: see Device::submit_copies. `after`: they also wait for this ticket (default:
  // none).
  Ticket submit(Direction direction, std::span<const CopySpan> copies, uintptr_t compute_stream,
                const Ticket& after = {});
  Ticket submit(Direction direction, void* destination, const void* source, size_t bytes,
                uintptr_t compute_stream, const Ticket& after = {});

  // As submit, but ordered after `after` alone: for copies whose destination no compute stream touches.
  Ticket submit_after(Direction direction, std::span<const CopySpan> copies, const Ticket& after);

  // Later copies of the lane start only after everything given to the compute stream so far.
  void wait_compute(Direction direction, uintptr_t compute_stream);

  // The compute stream waits, not the host (on the CPU device they are the same: see
  // Device::compute_wait for the timeout and the result).
  bool wait_on_stream(uintptr_t compute_stream, const Ticket& ticket, int64_t timeout_ns = -1);

  // As at destruction: what was submitted ends or fails, for good. Later submissions throw kState. Nothing in
  // a forked child.
  void end();

  TransferStats stats() const noexcept;  // what was submitted
  const std::shared_ptr<Device>& device() const noexcept { return device_; }

 private:
  struct Lane {
    std::mutex mutex;                // held while a copy is submitted with its waits: they are one unit
    std::unique_ptr<Stream> stream;  // guarded by mutex; null after end()
    std::atomic<uint64_t> bytes{0};
    std::atomic<uint64_t> count{0};
  };

  static Stream& stream_of(Lane& target);
  Ticket submit_locked(Lane& target, Direction direction, std::span<const CopySpan> copies,
                       const Ticket& after);
  Lane& lane(Direction direction);  // throws kState in a forked child

  const ForkGuard owner_;
  std::shared_ptr<Device> device_;  // before the lanes: their streams die first
  Lane to_host_;
  Lane to_device_;
};

}  // namespace offload
