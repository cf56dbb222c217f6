#include "device/cuda_device.h"

#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/trace_ring.h"
#include "device/cuda_stream.h"

namespace offload {
namespace {

// CU_DEVICE_ATTRIBUTE_*
constexpr int kMultiprocessorCount = 16;
constexpr int kAsyncEngineCount = 40;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kHostRegisterSupported = 99;

constexpr unsigned kPortable = 0x1;   // CU_MEMHOSTREGISTER_PORTABLE: registered for every context
constexpr unsigned kDeviceMap = 0x2;  // CU_MEMHOSTREGISTER_DEVICEMAP: kernels reach it, too

constexpr CudaResult kAlreadyRegistered = 712;  // CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED

constexpr const char* kPinRemedy =
    "Copies of this memory are pageable, which is slower. Raise the limit on locked memory (`ulimit -l "
    "unlimited`, `docker run --ulimit memlock=-1`, LimitMEMLOCK=infinity in a service); WSL pins about half "
    "of its memory at most, so raise `memory` in .wslconfig; or lower host_budget";
constexpr const char* kAlreadyPinnedRemedy =
    "Another library has registered these pages; leave them to it, or unregister them there";

std::string uuid_text(const CudaUuid& uuid) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kDigits[uuid.bytes[i] >> 4];
    text += kDigits[uuid.bytes[i] & 0xF];
  }
  return text;
}

CudaStreamHandle compute_handle(uintptr_t compute_stream) {
  return reinterpret_cast<CudaStreamHandle>(compute_stream);
}

}  // namespace

CudaDevice::CudaDevice(const CudaDeviceOptions& options)
    : driver_(CudaDriver::load(options.driver_path)),
      index_(options.index),
      drain_ns_(options.drain_ns),
      ordinal_(find_cuda_device(driver_, options.index)),
      context_(std::make_shared<CudaPrimaryContext>(driver_, ordinal_)) {
  if (!options.takes_batches) context_->refuse_batches();
}

CudaDevice::~CudaDevice() {
  if (context_->owner().forked()) return;
  for (const uintptr_t start : pinned_.starts()) unpin(reinterpret_cast<void*>(start), 0);
}

std::unique_ptr<Stream> CudaDevice::create_stream(const std::string& name) {
  context_->owner().require_owner("this CudaDevice");
  return std::make_unique<CudaStream>(context_, name, drain_ns_);
}

Ticket CudaDevice::submit_copies(Stream& stream, Direction direction, std::span<const CopySpan> copies) {
  context_->owner().require_owner("this CudaDevice");
  std::vector<CopySpan> parts;
  parts.reserve(copies.size());
  bool pinned = true;
  for (CopySpan copy : copies) {
    const void* host = direction == Direction::kToHost ? copy.destination : copy.source;
    const PinnedRanges::Cut cut = pinned_.cut(reinterpret_cast<uintptr_t>(host), copy.bytes);
    if (!cut.pinned) pageable_copy_count_.fetch_add(1, std::memory_order_relaxed);
    pinned &= cut.pinned;
    for (const size_t bytes : cut.parts_bytes) {
      parts.push_back({copy.destination, copy.source, bytes});
      copy.destination = static_cast<char*>(copy.destination) + bytes;
      copy.source = static_cast<const char*>(copy.source) + bytes;
    }
  }
  return static_cast<CudaStream&>(stream).submit(direction, std::move(parts), pinned);
}

void CudaDevice::wait_ticket(Stream& stream, const Ticket& ticket) {
  context_->owner().require_owner("this CudaDevice");
  if (ticket.done() && !ticket.error()) return;
  static_cast<CudaStream&>(stream).wait_ticket(ticket);
}

std::string CudaDevice::why_no_word(const uint32_t* word) {
  context_->owner().require_owner("this CudaDevice");
  if (!pinned_.cut(reinterpret_cast<uintptr_t>(word), sizeof(*word)).pinned) {
    return "host memory is not page-locked";
  }
  if (!read_memory_facts(driver_, ordinal_).reads_page_locked_memory) {
    return "this device does not reach registered memory at the host's addresses";
  }
  return context_->why_no_word(word);
}

void CudaDevice::wait_compute(Stream& stream, uintptr_t compute_stream) {
  context_->owner().require_owner("this CudaDevice");
  static_cast<CudaStream&>(stream).wait_compute(compute_handle(compute_stream));
}

bool CudaDevice::compute_wait(uintptr_t compute_stream, const Ticket& ticket, int64_t timeout_ns) {
  context_->owner().require_owner("this CudaDevice");
  const CudaCopyMark* mark = CudaCopyMark::of(ticket, context_.get());
  if (ticket.done()) return ticket.wait();
  // A copy that is not issued yet is behind work of the host, which the stream must not wait for.
  const Ticket& gate = mark == nullptr ? ticket : mark->issued();
  if (!gate.done()) {
    const int64_t begin_ns = monotonic_now_ns();
    const bool ended = gate.wait_ended(timeout_ns);
    if (trace_is_on()) {
      record_trace(TraceLane::kWait, begin_ns, monotonic_now_ns(), 0,
                   {.name = trace_label().name, .kind = 1});
    }
    if (!ended) return false;
  }
  if (mark == nullptr) return ticket.wait();  // it has ended: rethrows its error
  const std::shared_ptr<CudaEvent> event = mark->event();
  if (!event) return ticket.wait();  // it has ended meanwhile: rethrows its error
  CudaPrimaryContext::Current current(*context_);
  event->hold_back(compute_handle(compute_stream));
  return true;
}

void CudaDevice::pin(void* address, size_t bytes) {
  context_->owner().require_owner("this CudaDevice");
  const std::string what = "pinning " + std::to_string(bytes) + " bytes of host memory at address " +
                           std::to_string(reinterpret_cast<uintptr_t>(address));
  if (!can_pin()) {
    throw Error(ErrorKind::kDevice, what +
                                        " failed: this device does not register host memory. Copies of it "
                                        "are pageable, which is slower");
  }
  CudaPrimaryContext::Current current(*context_);
  const OutsideCaptures exempt(driver_);
  if (const CudaResult code = driver_.MemHostRegister(address, bytes, kPortable | kDeviceMap); code != 0) {
    throw driver_.error(code, what, code == kAlreadyRegistered ? kAlreadyPinnedRemedy : kPinRemedy);
  }
  try {
    pinned_.add(reinterpret_cast<uintptr_t>(address), bytes);
  } catch (...) {  // nobody would give it back
    static_cast<void>(driver_.MemHostUnregister(address));
    throw;
  }
}

void CudaDevice::unpin(void* address, size_t) noexcept {
  if (context_->owner().forked()) return;  // the lock may be held for ever, and the pages are the parent's
  pinned_.remove(reinterpret_cast<uintptr_t>(address));
  try {
    CudaPrimaryContext::Current current(*context_);
    const OutsideCaptures exempt(driver_);
    driver_.check(driver_.MemHostUnregister(address), "cuMemHostUnregister");
  } catch (const Error&) {
    // The context is lost or the process exiting, and the registration gone with it.
  }
}

bool CudaDevice::can_pin() const { return attribute(kHostRegisterSupported) != 0; }

void CudaDevice::load_copy_kernel(std::span<const std::byte> cubin) {
  context_->owner().require_owner("this CudaDevice");
  if (!read_memory_facts(driver_, ordinal_).reads_page_locked_memory) {
    throw Error(
        ErrorKind::kDevice,
        "this device does not reach registered memory at the host's addresses, so small copies go one "
        "by one");
  }
  context_->load_copy_kernel(cubin);
}

CudaFacts CudaDevice::facts() const {
  context_->owner().require_owner("this CudaDevice");
  CudaFacts facts;
  char name[256] = "";
  driver_.check(driver_.DeviceGetName(name, sizeof(name), ordinal_), "cuDeviceGetName");
  facts.name = name;
  CudaUuid uuid{};
  driver_.check(driver_.DeviceGetUuid(&uuid, ordinal_), "cuDeviceGetUuid");
  facts.uuid = uuid_text(uuid);
  facts.index = index_;
  facts.memory_kind = read_memory_facts(driver_, ordinal_).kind;
  facts.compute_capability_major = attribute(kComputeCapabilityMajor);
  facts.compute_capability_minor = attribute(kComputeCapabilityMinor);
  facts.multiprocessor_count = attribute(kMultiprocessorCount);
  facts.copy_engine_count = attribute(kAsyncEngineCount);
  {
    CudaPrimaryContext::Current current(*context_);
    size_t total_bytes = 0;
    driver_.check(driver_.MemGetInfo(&facts.free_bytes, &total_bytes), "cuMemGetInfo");
  }
  driver_.check(driver_.DeviceTotalMem(&facts.total_bytes, ordinal_), "cuDeviceTotalMem");
  facts.driver_version = driver_.version();
  facts.can_pin = can_pin();
  facts.pageable_copy_count = pageable_copy_count_.load(std::memory_order_relaxed);
  return facts;
}

size_t CudaDevice::pinned_bytes() const {
  context_->owner().require_owner("this CudaDevice");
  return pinned_.total_bytes();
}

}  // namespace offload
