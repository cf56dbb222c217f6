#include "base/fork_guard.h"

#include <pthread.h>

#include <atomic>
#include <string>

#include "base/error.h"

namespace offload {
namespace {

// Counts the forks between the first process and this one. A process id would not do: ids are reused.
std::atomic<uint64_t> fork_generation{0};

uint64_t current_generation() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { fork_generation.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
  return fork_generation.load(std::memory_order_relaxed);
}

}  // namespace

ForkGuard::ForkGuard() : generation_(current_generation()) {}

bool ForkGuard::forked() const noexcept {
  return generation_ != fork_generation.load(std::memory_order_relaxed);
}

void ForkGuard::require_owner(const char* what) const {
  if (!forked()) return;
  throw Error(ErrorKind::kState, std::string(what) +
                                     " belongs to the parent process and does not work in a forked child; "
                                     "wrap the model in the process that trains it");
}

}  // namespace offload
