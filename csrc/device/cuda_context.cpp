#include "device/cuda_context.h"

namespace offload {
namespace {

// CU_EVENT_BLOCKING_SYNC: a thread that waits sleeps, for its core belongs to the optimizer.
// CU_EVENT_DISABLE_TIMING: makes record and wait cheaper.
constexpr unsigned kEventFlags = 0x1 | 0x2;

}  // namespace

CudaPrimaryContext::Current::Current(const CudaPrimaryContext& context) : driver_(context.driver_) {
  driver_.check(driver_.CtxPushCurrent(context.handle_), "cuCtxPushCurrent");
}

CudaPrimaryContext::Current::~Current() {
  // Refused only where the context is lost or the driver gone; then no call of this thread works any more.
  CudaContext popped = nullptr;
  static_cast<void>(driver_.CtxPopCurrent(&popped));
}

CudaPrimaryContext::CudaPrimaryContext(const CudaDriver& driver, CudaOrdinal ordinal)
    : driver_(driver), ordinal_(ordinal), sends_batches_(driver.MemcpyBatchAsync != nullptr) {
  driver_.check(driver_.DevicePrimaryCtxRetain(&handle_, ordinal_), "cuDevicePrimaryCtxRetain");
}

CudaPrimaryContext::~CudaPrimaryContext() {
  if (owner_.forked()) return;
  // Refusals do not count: they mean that the context is lost or the process exiting, and with it the events.
  if (driver_.CtxPushCurrent(handle_) == 0) {
    for (CudaEventHandle event : free_events_) static_cast<void>(driver_.EventDestroy(event));
    CudaContext popped = nullptr;
    static_cast<void>(driver_.CtxPopCurrent(&popped));
  }
  static_cast<void>(driver_.DevicePrimaryCtxRelease(ordinal_));
}

std::shared_ptr<CudaEvent> CudaPrimaryContext::acquire_event() {
  CudaEventHandle handle = nullptr;
  {
    std::lock_guard lock(mutex_);
    if (!free_events_.empty()) {
      handle = free_events_.back();
      free_events_.pop_back();
    } else {
      free_events_.reserve(++event_count_);  // so that recycle() never has to allocate
    }
  }
  if (handle == nullptr) driver_.check(driver_.EventCreate(&handle, kEventFlags), "cuEventCreate");
  return std::make_shared<CudaEvent>(shared_from_this(), handle);
}

void CudaPrimaryContext::recycle(CudaEventHandle event) noexcept {
  if (owner_.forked()) return;  // the lock may be held for ever
  std::lock_guard lock(mutex_);
  free_events_.push_back(event);
}

void CudaEvent::record(CudaStreamHandle stream) const {
  const CudaDriver& driver = context_->driver();
  driver.check(driver.EventRecord(handle_, stream), "cuEventRecord");
}

CudaResult CudaEvent::synchronize() const { return context_->driver().EventSynchronize(handle_); }

void CudaEvent::hold_back(CudaStreamHandle stream) const {
  const CudaDriver& driver = context_->driver();
  driver.check(driver.StreamWaitEvent(stream, handle_, 0), "cuStreamWaitEvent");
}

}  // namespace offload
