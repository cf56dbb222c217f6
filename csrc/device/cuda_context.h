// The primary context of one CUDA device, as torch uses it, and the events that live in it; and a scope for
// what must not touch a capture.
//
// Ownership: retains the context and owns every event and the kernel for small copies; held by devices,
//            streams and events, and given back with the last of them. Leaked in a forked child, where the
//            driver no longer works.
// Threads: every member may be called from any thread.
// Invariants: a context is current on a thread only within a Current. Events are never destroyed before the
//             context: a free one serves again. An event may be recorded again as soon as the waits for it
//             have been submitted: CUDA binds a wait to the record before it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/fork_guard.h"
#include "device/cuda_copy_kernel.h"
#include "device/cuda_driver.h"
#include "device/device.h"

namespace offload {

class CudaEvent;

constexpr unsigned kNonBlocking = 0x1;  // CU_STREAM_NON_BLOCKING: torch computes on the legacy stream

// The calls that this thread makes within the scope are part of no CUDA graph. While any thread of the
// process captures one in torch's own mode, the driver otherwise refuses every other thread what the capture
// cannot see, as waiting for an event and registering memory, and the capture is lost.
class OutsideCaptures {
 public:
  explicit OutsideCaptures(const CudaDriver& driver) noexcept : driver_(driver), is_exempt_(exchange()) {}
  ~OutsideCaptures() {
    if (is_exempt_) static_cast<void>(exchange());
  }
  OutsideCaptures(const OutsideCaptures&) = delete;
  OutsideCaptures& operator=(const OutsideCaptures&) = delete;

 private:
  // Refused only where nothing works.
  bool exchange() noexcept { return driver_.ThreadExchangeStreamCaptureMode(&other_mode_) == 0; }

  const CudaDriver& driver_;
  int other_mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED; within the scope: what the thread had
  const bool is_exempt_;
};

class CudaPrimaryContext : public std::enable_shared_from_this<CudaPrimaryContext> {
 public:
  // Makes the context current on the calling thread for as long as it lives.
  class Current {
   public:
    explicit Current(const CudaPrimaryContext& context);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const CudaDriver& driver_;
  };

  CudaPrimaryContext(const CudaDriver& driver, CudaOrdinal ordinal);
  ~CudaPrimaryContext();
  CudaPrimaryContext(const CudaPrimaryContext&) = delete;
  CudaPrimaryContext& operator=(const CudaPrimaryContext&) = delete;

  const CudaDriver& driver() const noexcept { return driver_; }
  const ForkGuard& owner() const noexcept { return owner_; }

  // How several copies go in one submission: the best that is there and was not refused yet.
  CopiesTogether copies_together() const noexcept;
  void refuse_batches() noexcept { sends_batches_ = false; }
  void refuse_copy_kernel() noexcept { sends_by_kernel_ = false; }

  // Later work of the stream starts only when the word has come to the value. The context must be current.
  CudaResult wait_for_word(CudaStreamHandle stream, const uint32_t* word, uint32_t value) const noexcept;
  // Tries it on a stream of its own, for the value that the word has. Empty: the driver takes it.
  std::string why_no_word(const uint32_t* word) const;

  // Throws kDevice when the driver refuses it, kState after the first call that worked.
  void load_copy_kernel(std::span<const std::byte> cubin);
  const CudaCopyKernel& copy_kernel() const noexcept { return *copy_kernel_; }  // where copies go by it

  // A new event, or one that nobody holds any more. The context must be current. Only a timed one tells when
  // it happened; it is dearer to record.
  std::shared_ptr<CudaEvent> acquire_event(bool timed = false);

 private:
  friend class CudaEvent;
  void recycle(CudaEventHandle event, bool timed) noexcept;

  struct Events {
    std::vector<CudaEventHandle> free;
    size_t count = 0;  // free or held
  };

  const ForkGuard owner_;
  const CudaDriver& driver_;
  const CudaOrdinal ordinal_;
  CudaContext handle_ = nullptr;
  std::atomic<bool> sends_batches_;
  std::atomic<bool> sends_by_kernel_{false};

  std::mutex mutex_;
  // guarded by mutex_
  Events events_[2];                             // without and with time
  std::unique_ptr<CudaCopyKernel> copy_kernel_;  // for good once it is there; read without the mutex then
};

class CudaEvent {
 public:
  CudaEvent(std::shared_ptr<CudaPrimaryContext> context, CudaEventHandle handle, bool timed)
      : context_(std::move(context)), handle_(handle), timed_(timed) {}
  ~CudaEvent() { context_->recycle(handle_, timed_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  // The context must be current.
  void record(CudaStreamHandle stream) const;     // the event is the end of what the stream was given so far
  void hold_back(CudaStreamHandle stream) const;  // later work of the stream starts only after the event
  CudaResult synchronize() const;                 // blocks until the event has happened
  // Between two timed events that have happened; 0 when the driver does not say.
  int64_t ns_since(const CudaEvent& earlier) const noexcept;

 private:
  const std::shared_ptr<CudaPrimaryContext> context_;
  const CudaEventHandle handle_;
  const bool timed_;
};

}  // namespace offload
