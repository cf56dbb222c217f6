#include "device/cuda_context.h"

namespace offload {
namespace {

// A thread that waits sleeps, for its core belongs to the optimizer; without timing, record and wait are
// cheaper.
constexpr unsigned kBlockingSync = 0x1;   // CU_EVENT_BLOCKING_SYNC
constexpr unsigned kDisableTiming = 0x2;  // CU_EVENT_DISABLE_TIMING
constexpr unsigned kAtLeast = 0x0;        // CU_STREAM_WAIT_VALUE_GEQ, which is cyclic

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
    for (const Events& events : events_) {
      for (CudaEventHandle event : events.free) static_cast<void>(driver_.EventDestroy(event));
    }
    copy_kernel_.reset();
    CudaContext popped = nullptr;
    static_cast<void>(driver_.CtxPopCurrent(&popped));
  }
  static_cast<void>(driver_.DevicePrimaryCtxRelease(ordinal_));
}

CopiesTogether CudaPrimaryContext::copies_together() const noexcept {
  if (sends_batches_) return CopiesTogether::kInOneCall;
  return sends_by_kernel_ ? CopiesTogether::kByKernel : CopiesTogether::kOneByOne;
}

void CudaPrimaryContext::load_copy_kernel(std::span<const std::byte> cubin) {
  std::lock_guard lock(mutex_);
  if (copy_kernel_ != nullptr) throw Error(ErrorKind::kState, "this CudaDevice has its kernel for copies");
  Current current(*this);
  const OutsideCaptures exempt(driver_);
  copy_kernel_ = std::make_unique<CudaCopyKernel>(driver_, cubin);
  sends_by_kernel_ = true;
}

std::string CudaPrimaryContext::why_no_word(const uint32_t* word) const {
  try {
    Current current(*this);
    CudaStreamHandle stream = nullptr;
    driver_.check(driver_.StreamCreateWithPriority(&stream, kNonBlocking, 0), "cuStreamCreateWithPriority");
    const CudaResult code = wait_for_word(stream, word, *word);
    driver_.check(driver_.StreamDestroy(stream), "cuStreamDestroy");
    driver_.check(code, "cuStreamWaitValue32");
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

CudaResult CudaPrimaryContext::wait_for_word(CudaStreamHandle stream, const uint32_t* word,
                                             uint32_t value) const noexcept {
  return driver_.StreamWaitValue32(stream, reinterpret_cast<CudaAddress>(word), value, kAtLeast);
}

std::shared_ptr<CudaEvent> CudaPrimaryContext::acquire_event(bool timed) {
  CudaEventHandle handle = nullptr;
  {
    std::lock_guard lock(mutex_);
    Events& events = events_[timed];
    if (!events.free.empty()) {
      handle = events.free.back();
      events.free.pop_back();
    } else {
      events.free.reserve(++events.count);  // so that recycle() never has to allocate
    }
  }
  const unsigned flags = kBlockingSync | (timed ? 0 : kDisableTiming);
  if (handle == nullptr) driver_.check(driver_.EventCreate(&handle, flags), "cuEventCreate");
  return std::make_shared<CudaEvent>(shared_from_this(), handle, timed);
}

void CudaPrimaryContext::recycle(CudaEventHandle event, bool timed) noexcept {
  if (owner_.forked()) return;  // the lock may be held for ever
  std::lock_guard lock(mutex_);
  events_[timed].free.push_back(event);
}

void CudaEvent::record(CudaStreamHandle stream) const {
  const CudaDriver& driver = context_->driver();
  driver.check(driver.EventRecord(handle_, stream), "cuEventRecord");
}

CudaResult CudaEvent::synchronize() const { return context_->driver().EventSynchronize(handle_); }

int64_t CudaEvent::ns_since(const CudaEvent& earlier) const noexcept {
  float milliseconds = 0;
  if (context_->driver().EventElapsedTime(&milliseconds, earlier.handle_, handle_) != 0) return 0;
  return static_cast<int64_t>(static_cast<double>(milliseconds) * 1e6);
}

void CudaEvent::hold_back(CudaStreamHandle stream) const {
  const CudaDriver& driver = context_->driver();
  driver.check(driver.StreamWaitEvent(stream, handle_, 0), "cuStreamWaitEvent");
}

}  // namespace offload
