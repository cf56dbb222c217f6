// How a call from Python blocks, and how an object whose destructor blocks is owned by Python.
//
// Threads: the GIL is the outermost lock: it is released before any wait, so that whoever ends the wait may
//          take it.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

namespace offload::bindings {

// The GIL is free within the scope.
//
// A daemon thread that comes back while the interpreter ends does not get it: Python before 3.14 ends the
// thread by unwinding its stack, which pybind11's own gil_scoped_release answers with std::terminate. As in
// Python 3.14 such a thread stops here until the process is gone.
class GilReleased {
 public:
  GilReleased() : thread_(PyEval_SaveThread()) {}
  ~GilReleased() {
    try {
      PyEval_RestoreThread(thread_);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* const thread_;
};

// Ctrl-C is noticed within one slice; shorter ones would only burn time.
constexpr int64_t kWaitSliceNs = 50'000'000;

// Calls wait(slice_ns) without the GIL until it returns true, which is the result, or until the timeout
// passed (negative: never). Raises what a signal handler raises, KeyboardInterrupt for Ctrl-C.
template <typename Wait>
bool wait_interruptibly(Wait wait, int64_t timeout_ns = -1) {
  for (;;) {
    const int64_t slice_ns = timeout_ns < 0 ? kWaitSliceNs : std::min(kWaitSliceNs, timeout_ns);
    {
      GilReleased released;
      if (wait(slice_ns)) return true;
    }
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    if (timeout_ns >= 0 && (timeout_ns -= slice_ns) == 0) return false;
  }
}

// Deletes what blocks as it ends: without the GIL, which need not be held here. The last owner may itself be
// destroyed without it, as a TransferQueue by its pipeline, and a tensor dies on any thread, also when the
// interpreter is gone: then every thread is said to hold the GIL, and none has a state.
template <typename T>
void delete_without_gil(T* object) {
  if (PyGILState_Check() != 0 && pybind11::detail::get_thread_state_unchecked() != nullptr) {
    GilReleased released;
    delete object;
  } else {
    delete object;
  }
}

// A T for a std::shared_ptr holder whose destructor runs without the GIL: it joins threads.
template <typename T, typename... Args>
std::shared_ptr<T> make_joining(Args&&... args) {
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), &delete_without_gil<T>);
}

// `owner` for Python, which lets go of it without the GIL: it may be the last one of what blocks as it ends.
template <typename T>
std::shared_ptr<T> let_go_without_gil(std::shared_ptr<T> owner) {
  if (!owner) return owner;
  T* const object = owner.get();
  auto* const kept = new std::shared_ptr<T>(std::move(owner));
  return std::shared_ptr<T>(object, [kept](T*) { delete_without_gil(kept); });
}

}  // namespace offload::bindings
