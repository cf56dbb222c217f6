// Time as the host device sees it: the real one, or one that a test moves by hand.
//
// Threads: every member may be called from any thread.
// Units: nanoseconds since an arbitrary origin.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>
#include <stop_token>
#include <vector>

namespace offload {

// CLOCK_MONOTONIC: what SteadyClock shows.
int64_t monotonic_now_ns() noexcept;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t now_ns() const = 0;

  // Returns at the deadline, or at once when `stop` is requested.
  virtual void sleep_until(int64_t deadline_ns, std::stop_token stop) = 0;
};

class SteadyClock final : public Clock {
 public:
  int64_t now_ns() const override;
  void sleep_until(int64_t deadline_ns, std::stop_token stop) override;
};

// Stands still until advance(); sleepers wake when the hand has passed their deadline.
class ManualClock final : public Clock {
 public:
  int64_t now_ns() const override;
  void sleep_until(int64_t deadline_ns, std::stop_token stop) override;
  void advance(int64_t delta_ns);

  // What the sleepers wait for, the earliest first: a test moves the hand when all that can sleep does.
  std::vector<int64_t> deadlines_ns() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable_any moved_;
  // guarded by mutex_
  int64_t now_ns_ = 0;
  std::multiset<int64_t> deadlines_ns_;
};

}  // namespace offload
