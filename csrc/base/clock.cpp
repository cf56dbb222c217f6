#include "base/clock.h"

#include <chrono>

namespace offload {

int64_t monotonic_now_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t SteadyClock::now_ns() const { return monotonic_now_ns(); }

void SteadyClock::sleep_until(int64_t deadline_ns, std::stop_token stop) {
  // Nothing but the deadline or the stop ends this wait, so it needs no shared state.
  std::mutex mutex;
  std::condition_variable_any never_notified;
  std::unique_lock lock(mutex);
  never_notified.wait_for(lock, stop, std::chrono::nanoseconds(deadline_ns - now_ns()), [] { return false; });
}

int64_t ManualClock::now_ns() const {
  std::lock_guard lock(mutex_);
  return now_ns_;
}

void ManualClock::sleep_until(int64_t deadline_ns, std::stop_token stop) {
  std::unique_lock lock(mutex_);
  const auto mine = deadlines_ns_.insert(deadline_ns);
  moved_.wait(lock, stop, [&] { return now_ns_ >= deadline_ns; });
  deadlines_ns_.erase(mine);
}

std::vector<int64_t> ManualClock::deadlines_ns() const {
  std::lock_guard lock(mutex_);
  return {deadlines_ns_.begin(), deadlines_ns_.end()};
}

void ManualClock::advance(int64_t delta_ns) {
  {
    std::lock_guard lock(mutex_);
    now_ns_ += delta_ns;
  }
  moved_.notify_all();
}

}  // namespace offload
