#include "base/ticket.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "base/fork_guard.h"

namespace offload {

struct Ticket::State {
  explicit State(std::shared_ptr<TicketMark> its_mark) : mark(std::move(its_mark)) {}

  const ForkGuard owner;
  const std::shared_ptr<TicketMark> mark;
  std::atomic<bool> ended{false};

  std::mutex mutex;
  std::condition_variable_any changed;
  // guarded by mutex until ended is true, immutable afterwards
  std::exception_ptr error;
  // guarded by mutex
  std::vector<std::function<void(const std::exception_ptr&)>> callbacks;

  bool has_ended() const noexcept { return ended.load(std::memory_order_acquire); }
};

Ticket Ticket::pending(std::shared_ptr<TicketMark> mark) {
  return Ticket(std::make_shared<State>(std::move(mark)));
}

TicketMark* Ticket::mark() const noexcept { return state_ ? state_->mark.get() : nullptr; }

bool Ticket::done() const noexcept { return !state_ || state_->has_ended(); }

bool Ticket::wait(int64_t timeout_ns) const {
  if (!wait_ended(timeout_ns)) return false;
  if (auto failure = error()) std::rethrow_exception(failure);
  return true;
}

bool Ticket::wait_ended(int64_t timeout_ns) const {
  if (done()) return true;
  state_->owner.require_owner("a pending transfer or update");
  std::unique_lock lock(state_->mutex);
  auto ended = [&] { return state_->has_ended(); };
  if (timeout_ns >= 0) return state_->changed.wait_for(lock, std::chrono::nanoseconds(timeout_ns), ended);
  state_->changed.wait(lock, ended);
  return true;
}

bool Ticket::wait_ended(std::stop_token stop) const {
  if (done()) return true;
  state_->owner.require_owner("a pending transfer or update");
  std::unique_lock lock(state_->mutex);
  return state_->changed.wait(lock, stop, [&] { return state_->has_ended(); });
}

std::exception_ptr Ticket::error() const noexcept {
  return state_ && state_->has_ended() ? state_->error : nullptr;
}

void Ticket::on_end(std::function<void(const std::exception_ptr& error)> callback) const {
  if (!done()) {
    std::lock_guard lock(state_->mutex);
    if (!state_->has_ended()) {
      state_->callbacks.push_back(std::move(callback));
      return;
    }
  }
  callback(error());
}

void Ticket::complete() const noexcept { fail(nullptr); }

void Ticket::fail(std::exception_ptr error) const noexcept {
  if (!state_) return;
  decltype(state_->callbacks) callbacks;
  {
    std::lock_guard lock(state_->mutex);
    if (state_->has_ended()) return;  // the first end counts
    state_->error = std::move(error);
    state_->ended.store(true, std::memory_order_release);
    callbacks.swap(state_->callbacks);
  }
  state_->changed.notify_all();
  for (auto& callback : callbacks) callback(state_->error);
}

}  // namespace offload
