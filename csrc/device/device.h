// The compute device as the engine sees it: streams, copies and page locking.
//
// Ownership: streams belong to the device that created them and must die before it.
// Threads: a stream takes submissions from any thread, in the order of the calls.
// Stream order: work of one stream runs in submission order; streams are ordered against each other
//               and against the compute stream only by the wait_* and compute_* calls below.
// Units: bytes and raw addresses; a compute stream is torch's own handle (0 on the CPU).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/ticket.h"

namespace offload {

enum class Direction { kToHost, kToDevice };

struct CopySpan {
  void* destination;
  const void* source;
  size_t bytes;
};

// What small copies of one submission cost: one call of the driver, one launch, or a call each.
enum class CopiesTogether { kInOneCall, kByKernel, kOneByOne };

class Stream {
 public:
  virtual ~Stream() = default;
};

// [Note: streams that wait for the host]
// A copy may start after an update that a thread of ours still computes, with nobody on the host waiting for
// it: the stream waits for a word of page-locked memory, which that thread sets. CUDA does not see such an
// order. A thread that frees device memory or loads a kernel holds the driver until the device is idle, and
// the device is not while a stream waits: whatever needs the driver before it sets the word would hang with
// it, for good. So two rules: a stream waits only for work that is foreseen, where nothing is left but
// arithmetic on the host: no call of the driver, no wait for a device, a disk, another thread's lock or
// Python. And the word is set however the work ends. Until work is foreseen, the host waits.
class HostWorkMark : public TicketMark {
 public:
  // The mark of a ticket if it is of such work, else null.
  static const HostWorkMark* of(const Ticket& ticket) noexcept {
    return dynamic_cast<const HostWorkMark*>(ticket.mark());
  }

  // Ends when the work is foreseen, or has ended without.
  virtual const Ticket& foreseen() const noexcept = 0;

  // The work is over when this, counting up and wrapping round, has come to that value. There as long as the
  // mark is, and page-locked.
  virtual const uint32_t* word() const noexcept = 0;
  virtual uint32_t value() const noexcept = 0;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const char* kind() const noexcept = 0;  // "cpu" or "cuda"

  virtual std::unique_ptr<Stream> create_stream(const std::string& name) = 0;

  // Enqueues copies that share no byte and may run in any order among themselves. The one ticket ends when
  // all bytes are in place or a copy has failed; then any of them may have run.
  virtual Ticket submit_copies(Stream& stream, Direction direction, std::span<const CopySpan> copies) = 0;

  virtual CopiesTogether copies_together() const noexcept = 0;

  Ticket submit_copy(Stream& stream, Direction direction, void* destination, const void* source,
                     size_t bytes) {
    const CopySpan copy{destination, source, bytes};
    return submit_copies(stream, direction, {&copy, 1});
  }

  // Later work of `stream` starts only after `ticket` ended. When the ticket failed, the next copy of the
  // stream fails with the same error; the copies after that one run. Of a HostWorkMark the stream may know
  // only that it ended, and not how.
  virtual void wait_ticket(Stream& stream, const Ticket& ticket) = 0;

  // Why streams of this device do not wait for this word of pinned memory; empty: they do.
  virtual std::string why_no_word(const uint32_t* /*word*/) { return "its streams are threads of the host"; }

  // Later work of `stream` starts only after everything given to the compute stream so far.
  virtual void wait_compute(Stream& stream, uintptr_t compute_stream) = 0;

  // Later work of the compute stream starts only after `ticket`. On the CPU device the compute stream
  // is the calling thread, so this blocks it, and rethrows the error of a failed ticket. A negative
  // timeout waits for ever; returns false when the timeout passed before the wait was arranged.
  virtual bool compute_wait(uintptr_t compute_stream, const Ticket& ticket, int64_t timeout_ns = -1) = 0;

  // Locks pages so that the device can copy them directly. Throws Error(kDevice) when refused.
  virtual void pin(void* address, size_t bytes) = 0;
  virtual void unpin(void* address, size_t bytes) noexcept = 0;
};

}  // namespace offload
