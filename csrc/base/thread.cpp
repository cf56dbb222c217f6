#include "base/thread.h"

#include <pthread.h>
#include <signal.h>

#include <system_error>
#include <utility>

#include "base/error.h"

namespace offload {
namespace {

// A thread begins with the mask of the one that starts it.
class AsyncSignalsBlocked {
 public:
  AsyncSignalsBlocked() noexcept {
    sigset_t blocked;
    sigfillset(&blocked);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &previous_);
  }
  ~AsyncSignalsBlocked() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }
  AsyncSignalsBlocked(const AsyncSignalsBlocked&) = delete;
  AsyncSignalsBlocked& operator=(const AsyncSignalsBlocked&) = delete;

 private:
  sigset_t previous_;
};

}  // namespace

std::jthread start_thread(const std::string& name, std::function<void(std::stop_token)> body) {
  const AsyncSignalsBlocked inherited;
  try {
    std::jthread thread(std::move(body));
    // Not by the thread itself: it is found by its name from here on, however late it first runs.
    pthread_setname_np(thread.native_handle(), name.substr(0, 15).c_str());
    return thread;
  } catch (const std::system_error& refusal) {
    throw Error(
        ErrorKind::kState,
        "the system refuses to start the thread " + name + ": " + refusal.code().message() +
            ". Raise the limit of threads (ulimit -u, docker run --pids-limit, TasksMax of a service), "
            "or end other processes",
        refusal.code().value());
  }
}

}  // namespace offload
