// One ordered queue of copies on a CUDA device.
//
// Ownership: owns the driver's stream and two threads, which start at first need.
// Threads: every member may be called from any thread. In a forked child a stream dies without joining.
// Stream order: copies start and their tickets end in submission order, the failed ones included. A dying
//               stream finishes what was submitted; a copy whose ticket is still pending fails. When nothing
//               ends for `drain_ns` (a hung device), the rest fails and the stream leaks on purpose.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device/cuda_context.h"
#include "device/device.h"

namespace offload {

// [Note: who issues a copy]
// A copy is issued, that is given to the driver, on the calling thread, unless it must not be yet: it is
// behind work that only the host can wait for (a ticket without a mark, one whose copy is itself not issued,
// or work of the host that is not foreseen), or its host memory is pageable, where the driver would block the
// caller. Such a copy is deferred to the stream's issuer thread, and so is every copy behind it. A stream
// waits on host memory for foreseen work alone, which an error, Ctrl-C or exit does not stop. A second
// thread, the ender, sleeps in the driver until the oldest issued copy is over and ends its ticket. They are
// two because neither wait can be woken for the sake of the other.
class CudaStream final : public Stream {
 public:
  CudaStream(std::shared_ptr<CudaPrimaryContext> context, std::string name, int64_t drain_ns);
  ~CudaStream() override;

  void wait_ticket(const Ticket& ticket);
  void wait_compute(CudaStreamHandle compute_stream);

  // One submission of copies that share no byte; each lies in one registration. `pinned`: the host sides.
  Ticket submit(Direction direction, std::vector<CopySpan> parts, bool pinned);

 private:
  class Worker;
  std::shared_ptr<Worker> worker_;  // shared with its threads
  const int64_t drain_ns_;
};

// What the copies of a device know: when they were issued, and the event behind them.
class CudaCopyMark final : public TicketMark {
 public:
  explicit CudaCopyMark(const CudaPrimaryContext* context) : context_(context) {}

  // The mark of a ticket if it is one of this context, else null.
  static CudaCopyMark* of(const Ticket& ticket, const CudaPrimaryContext* context) noexcept;

  // Ends when the copy has been issued, or has ended without.
  const Ticket& issued() const noexcept { return issued_; }

  // Null before the copy was issued, and again once its ticket has ended.
  std::shared_ptr<CudaEvent> event() const;

  void set_issued(std::shared_ptr<CudaEvent> event);
  void set_ended();  // the ticket has: gives the event back

 private:
  const CudaPrimaryContext* const context_;
  const Ticket issued_ = Ticket::pending();

  mutable std::mutex mutex_;
  // guarded by mutex_
  std::shared_ptr<CudaEvent> event_;
};

}  // namespace offload
