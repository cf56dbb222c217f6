// Tells the process that made an object from a child that fork() made of that process.
//
// Threads: immutable, so any thread may ask.
// Invariants: in a child the parent's threads do not exist and its locks may be held for ever, so an
//             object with threads refuses calls there and leaks its state instead of joining.
#pragma once

#include <cstdint>

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

}  // namespace offload
