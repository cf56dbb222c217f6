// A ticket is the promise that some asynchronous work has finished or has failed.
//
// Ownership: a shared handle; the state lives until the last copy is gone.
// Threads: every member may be called from any thread. In a forked child the work of the parent never
//          ends, so waiting for a ticket that was pending at the fork throws kState.
// Invariants: a ticket ends once, as done or as failed; a default-constructed ticket is done.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stop_token>

namespace offload {

// What a device knows about the work of a ticket, so that its streams can wait for it without the host.
class TicketMark {
 public:
  virtual ~TicketMark() = default;
};

class Ticket {
 public:
  // Already done: what callers hold before any work was submitted.
  Ticket() = default;

  // Not done until complete() or fail(). The mark must not hold the ticket: the ticket holds it.
  static Ticket pending(std::shared_ptr<TicketMark> mark = nullptr);

  // Null for work that only the host can wait for.
  TicketMark* mark() const noexcept;

  // True once the work ended, well or badly. Never blocks.
  bool done() const noexcept;

  // Blocks until the work ended; rethrows its error. A negative timeout waits for ever; returns
  // false when the timeout passed first.
  bool wait(int64_t timeout_ns = -1) const;

  // As wait, but says nothing about how the work ended; the second also returns when `stop` is requested.
  bool wait_ended(int64_t timeout_ns = -1) const;
  bool wait_ended(std::stop_token stop) const;

  // The error of failed work; null while pending or when the work went well.
  std::exception_ptr error() const noexcept;

  // Runs `callback` once with error(): on the thread that ends the work, or here when it has ended.
  // The callback must neither block nor throw. It may submit what follows, so whoever ends a ticket holds no
  // lock that a submission takes.
  void on_end(std::function<void(const std::exception_ptr& error)> callback) const;

  void complete() const noexcept;
  void fail(std::exception_ptr error) const noexcept;

 private:
  struct State;
  explicit Ticket(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

}  // namespace offload
