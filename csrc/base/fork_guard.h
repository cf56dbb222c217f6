// Tells the process that made an object from a child that fork() made of that process.
//
// Threads: immutable, so any thread may ask.
// Invariants: in a child the parent's threads do not exist and its locks may be held for ever, so an
//             object with threads refuses calls there and leaks its state instead of joining.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace offload {

class ForkGuard {
 public:
  ForkGuard();  // the calling process is the owner

  bool forked() const noexcept;

  // Throws kState when called in a child of the owner; `what` is the subject of the sentence.
  void require_owner(const char* what) const;

 private:
  uint64_t generation_;
};

// A T, with a ForkGuard `owner`, for each process that asks: a forked child makes its own, for the parent's
// threads may hold locks of theirs for ever. Neither is ever freed: who uses it may outlive static
// destruction. Without a lock of its own, for the same reason.
template <typename T>
class OnePerProcess {
 public:
  T& get() {
    T* seen = current_.load(std::memory_order_acquire);
    while (seen == nullptr || seen->owner.forked()) {
      auto made = std::make_unique<T>();
      if (current_.compare_exchange_strong(seen, made.get(), std::memory_order_acq_rel))
        return *made.release();
    }
    return *seen;
  }

 private:
  std::atomic<T*> current_{nullptr};
};

}  // namespace offload
