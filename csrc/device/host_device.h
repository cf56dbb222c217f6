// The compute device "cpu": its streams are threads with real queues, so that everything above it runs,
// and is tested, without an accelerator. It carries the test controls of the engine.
//
// Ownership: streams keep what they share with the device alive; a stream's thread starts at its first
//            submission and is joined when the stream dies.
// Threads: every member may be called from any thread. In a forked child every call that needs a stream
//          throws kState, and streams die without joining.
// Stream order: a dying stream finishes what was submitted without regard to hold() and bandwidth; copies
//               whose ticket is still pending then fail, so that destruction never hangs. A small copy on
//               an idle stream, with nothing to wait for, runs in its submission: waking the stream's thread
//               would take longer.
// Units: bytes, bytes/s (0 means unlimited).
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>

#include "base/clock.h"
#include "base/fork_guard.h"
#include "device/device.h"

namespace offload {

struct HostDeviceOptions {
  std::shared_ptr<Clock> clock;  // null: the real one
  double to_host_bytes_per_s = 0;
  double to_device_bytes_per_s = 0;
};

struct HostLink;  // one direction between "device" and host memory

class HostDevice final : public Device {
 public:
  explicit HostDevice(HostDeviceOptions options = {});
  ~HostDevice() override;

  const char* kind() const noexcept override { return "cpu"; }
  std::unique_ptr<Stream> create_stream(const std::string& name) override;
  Ticket submit_copies(Stream& stream, Direction direction, std::span<const CopySpan> copies) override;
  CopiesTogether copies_together() const noexcept override { return CopiesTogether::kInOneCall; }
  void wait_ticket(Stream& stream, const Ticket& ticket) override;
  void wait_compute(Stream& stream, uintptr_t compute_stream) override;
  bool compute_wait(uintptr_t compute_stream, const Ticket& ticket, int64_t timeout_ns = -1) override;
  void pin(void* address, size_t bytes) override;
  void unpin(void* address, size_t bytes) noexcept override;

  // Copies of the direction queue up but do not run until release().
  void hold(Direction direction);
  void release(Direction direction);

  // Copies that start from now on take bytes / bytes_per_s; 0 means no limit. Throws kInvalidArgument for a
  // rate that is negative or not finite.
  void limit(Direction direction, double bytes_per_s);

  // The nth submission in the direction (or the nth pin) from now on fails, 1 being the next; 0 disarms.
  void fail_copy(Direction direction, size_t nth);
  void fail_pin(size_t nth);

  size_t pending_count(Direction direction) const;  // submissions that have not ended
  size_t pinned_bytes() const;

 private:
  HostLink& link(Direction direction) const;  // throws kState in a forked child

  const ForkGuard owner_;
  std::shared_ptr<Clock> clock_;
  std::array<std::shared_ptr<HostLink>, 2> links_;  // by Direction

  mutable std::mutex pin_mutex_;
  // guarded by pin_mutex_
  size_t pinned_bytes_ = 0;
  size_t pins_until_failure_ = 0;  // 0: none is armed
};

}  // namespace offload
