// The entries that need a context: memory, streams and events.
#include <memory>
#include <string>
#include <utility>

#include "driver_double/state.h"

using namespace driver_double;

namespace {

constexpr uintptr_t kFirstContext = 0xC0000;  // of ordinal 0; the others follow

Event* event_of(const char* entry, void* handle) {
  State& all = state();
  const auto found = all.events.find(reinterpret_cast<uintptr_t>(handle));
  if (found != all.events.end()) return &found->second;
  all.misuse(std::string(entry) + " of an event that was destroyed");
  return nullptr;
}

}  // namespace

std::shared_ptr<Stream> driver_double::stream_of(const char* entry, void* handle) {
  State& all = state();
  const auto found = all.streams.find(reinterpret_cast<uintptr_t>(handle));
  if (found != all.streams.end() && found->second->ordinal == pushed().back()) return found->second;
  all.misuse(std::string(entry) + " of a stream that was destroyed or is of another context");
  return nullptr;
}

extern "C" {

// --- contexts --------------------------------------------------------------------------------------------

int cuDevicePrimaryCtxRetain(void** context, int device) {
  Call call("cuDevicePrimaryCtxRetain", Needs::kDriver);
  if (call.refused()) return call.code();
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  if (state().lost != 0) return state().lost;
  ++state().retains[device];
  *context = reinterpret_cast<void*>(kFirstContext + static_cast<uintptr_t>(device));
  return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  Call call("cuDevicePrimaryCtxRelease_v2", Needs::kDriver);
  if (call.refused()) return call.code();
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  size_t& count = state().retains[device];
  if (count == 0) {
    state().misuse("cuDevicePrimaryCtxRelease_v2 of a context that nobody retains");
    return kInvalidContext;
  }
  --count;
  return state().lost;
}

// A lost context can still be pushed and popped: that concerns the thread alone.
int cuCtxPushCurrent_v2(void* context) {
  Call call("cuCtxPushCurrent_v2", Needs::kDriver);
  if (call.refused()) return call.code();
  const uintptr_t ordinal = reinterpret_cast<uintptr_t>(context) - kFirstContext;
  if (ordinal >= kDevicesAtMost || state().retains[static_cast<int>(ordinal)] == 0) {
    state().misuse("cuCtxPushCurrent_v2 of a context that nobody retains");
    return kInvalidContext;
  }
  pushed().push_back(static_cast<int>(ordinal));
  return kSuccess;
}

int cuCtxPopCurrent_v2(void** context) {
  Call call("cuCtxPopCurrent_v2", Needs::kDriver);
  if (call.refused()) return call.code();
  if (pushed().empty()) {
    state().misuse("cuCtxPopCurrent_v2 without a current context");
    return kInvalidContext;
  }
  if (context != nullptr) {
    *context = reinterpret_cast<void*>(kFirstContext + static_cast<uintptr_t>(pushed().back()));
  }
  pushed().pop_back();
  return kSuccess;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  Call call("cuCtxGetStreamPriorityRange", Needs::kContext);
  if (call.refused()) return call.code();
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  Call call("cuThreadExchangeStreamCaptureMode", Needs::kDriver);
  if (call.refused()) return call.code();
  if (*mode < 0 || *mode > 2) return kInvalidValue;
  std::swap(*mode, capture_mode());
  return kSuccess;
}

int cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  Call call("cuMemGetInfo_v2", Needs::kContext);
  if (call.refused()) return call.code();
  *free_bytes = state().free_bytes;
  *total_bytes = size_t{8} << 30;
  return kSuccess;
}

// --- host memory -----------------------------------------------------------------------------------------

int cuMemHostRegister_v2(void* address, size_t bytes, unsigned flags) {
  Call call("cuMemHostRegister_v2", Needs::kContext);
  if (call.refused()) return call.code();
  constexpr unsigned kReadOnly = 0x08;
  constexpr unsigned kLegalFlags = 0x07 | kReadOnly;  // portable, mapped, I/O memory
  if (address == nullptr || bytes == 0 || (flags & ~kLegalFlags) != 0) return kInvalidValue;
  constexpr int kSupported = 99, kReadOnlySupported = 113;  // CU_DEVICE_ATTRIBUTE_*_HOST_REGISTER_SUPPORTED
  const bool is_supported = attribute_of_devices(kSupported) != 0;
  if (!is_supported || ((flags & kReadOnly) != 0 && attribute_of_devices(kReadOnlySupported) == 0)) {
    return kNotSupported;
  }
  State& all = state();
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (!is_mapped(begin, bytes)) {
    all.misuse("registering memory that is not there");
    return kInvalidValue;
  }
  for (const auto& [start, registration] : all.registrations) {
    if (begin < start + registration->bytes && start < begin + bytes) {
      all.misuse("registering memory that is registered already");
      return kAlreadyRegistered;
    }
  }
  all.order.forget(begin, bytes);
  all.registrations.emplace(begin, std::make_shared<Registration>(Registration{.bytes = bytes}));
  return kSuccess;
}

int cuMemHostUnregister(void* address) {
  Call call("cuMemHostUnregister", Needs::kGiveBack);
  if (call.refused()) return call.code();
  State& all = state();
  const auto found = all.registrations.find(reinterpret_cast<uintptr_t>(address));
  if (found == all.registrations.end()) {
    all.misuse("unregistering memory that is not registered");
    return kNotRegistered;
  }
  if (found->second->copies > 0) all.misuse("unregistering memory that a queued copy uses");
  all.order.forget(found->first, found->second->bytes);
  all.registrations.erase(found);
  return all.lost;
}

// --- streams and events ----------------------------------------------------------------------------------

int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
  Call call("cuStreamCreateWithPriority", Needs::kContext);
  if (call.refused()) return call.code();
  if (flags > 1) return kInvalidValue;
  if (flags != 1) state().misuse("a stream that is not non-blocking");
  *stream = reinterpret_cast<void*>(start_stream(pushed().back()));
  return kSuccess;
}

int cuStreamDestroy_v2(void* handle) {
  Call call("cuStreamDestroy_v2", Needs::kGiveBack);
  if (call.refused()) return call.code();
  const std::shared_ptr<Stream> stream = stream_of("cuStreamDestroy_v2", handle);
  if (!stream) return kInvalidHandle;
  stream->destroyed = true;
  state().streams.erase(reinterpret_cast<uintptr_t>(handle));
  state().changed.notify_all();
  return state().lost;
}

int cuStreamWaitEvent(void* stream_handle, void* event_handle, unsigned flags) {
  Call call("cuStreamWaitEvent", Needs::kContext);
  if (call.refused()) return call.code();
  if (flags != 0) return kInvalidValue;  // CU_EVENT_WAIT_EXTERNAL is for captures alone
  std::shared_ptr<Stream> stream;
  if (stream_handle != nullptr && !(stream = stream_of("cuStreamWaitEvent", stream_handle))) {
    return kInvalidHandle;
  }
  const Event* event = event_of("cuStreamWaitEvent", event_handle);
  if (event == nullptr) return kInvalidHandle;
  if (!event->latest) return kSuccess;
  state().order.wait(reinterpret_cast<uintptr_t>(stream_handle), event->position);
  if (event->latest->done) return kSuccess;
  if (ends_in_call(stream)) event->latest->wanted = true;
  note_work();
  if (ends_in_call(stream)) return wait_done(call.lock(), std::shared_ptr<Completion>(event->latest));
  stream->queue.push_back(Operation{.kind = Operation::kWait, .completion = event->latest});
  state().changed.notify_all();
  return kSuccess;
}

int cuStreamWaitValue32_v2(void* stream_handle, unsigned long long address, uint32_t value, unsigned flags) {
  Call call("cuStreamWaitValue32_v2", Needs::kContext);
  if (call.refused()) return call.code();
  const std::shared_ptr<Stream> stream = stream_of("cuStreamWaitValue32_v2", stream_handle);
  if (!stream) return kInvalidHandle;
  constexpr unsigned kAtLeast = 0;
  if (flags != kAtLeast || address % sizeof(uint32_t) != 0) return kInvalidValue;
  auto* const word = reinterpret_cast<uint32_t*>(address);
  bool partly = false;
  std::shared_ptr<Registration> registration = registration_of(word, sizeof(*word), partly);
  if (!registration) {
    state().misuse("a wait for a word of memory that is not registered");
    return kInvalidValue;
  }
  ++registration->copies;
  stream->queue.push_back(Operation{.kind = Operation::kWaitWord,
                                    .completion = std::make_shared<Completion>(),
                                    .word = word,
                                    .value = value,
                                    .registration = std::move(registration)});
  note_work();
  return kSuccess;
}

int cuEventCreate(void** event, unsigned flags) {
  Call call("cuEventCreate", Needs::kContext);
  if (call.refused()) return call.code();
  constexpr unsigned kUntimed = 2, kInterprocess = 4;
  if (flags > 7 || ((flags & kInterprocess) != 0 && (flags & kUntimed) == 0)) return kInvalidValue;
  State& all = state();
  const uintptr_t handle = all.next_handle += 16;
  all.events.emplace(handle, Event{.ordinal = pushed().back(), .timed = (flags & 2) == 0, .latest = nullptr});
  *event = reinterpret_cast<void*>(handle);
  return kSuccess;
}

int cuEventRecord(void* event_handle, void* stream_handle) {
  Call call("cuEventRecord", Needs::kContext);
  if (call.refused()) return call.code();
  std::shared_ptr<Stream> stream;
  if (stream_handle != nullptr && !(stream = stream_of("cuEventRecord", stream_handle)))
    return kInvalidHandle;
  Event* event = event_of("cuEventRecord", event_handle);
  if (event == nullptr) return kInvalidHandle;
  if (event->ordinal != pushed().back()) {
    state().misuse("cuEventRecord of an event of another context");
    return kInvalidHandle;
  }
  const bool done = ends_in_call(stream);
  event->latest =
      std::make_shared<Completion>(Completion{.done = done, .done_at = std::chrono::steady_clock::now()});
  event->position = state().order.position(reinterpret_cast<uintptr_t>(stream_handle));
  if (!done) stream->queue.push_back(Operation{.kind = Operation::kRecord, .completion = event->latest});
  note_work();
  return kSuccess;
}

int cuEventQuery(void* handle) {
  Call call("cuEventQuery", Needs::kContext);
  if (call.refused()) return call.code();
  const Event* event = event_of("cuEventQuery", handle);
  if (event == nullptr) return kInvalidHandle;
  if (event->latest && !event->latest->done) return kNotReady;
  state().order.host_waits(event->position);
  return kSuccess;
}

int cuEventSynchronize(void* handle) {
  Call call("cuEventSynchronize", Needs::kContext);
  if (call.refused()) return call.code();
  const Event* event = event_of("cuEventSynchronize", handle);
  if (event == nullptr) return kInvalidHandle;
  if (!event->latest) return kSuccess;
  const Position position = event->position;
  const int code = wait_done(call.lock(), std::shared_ptr<Completion>(event->latest));
  state().order.host_waits(position);
  return code;
}

int cuEventElapsedTime(float* milliseconds, void* begin_handle, void* end_handle) {
  Call call("cuEventElapsedTime", Needs::kContext);
  if (call.refused()) return call.code();
  const Event* begin = event_of("cuEventElapsedTime", begin_handle);
  const Event* end = event_of("cuEventElapsedTime", end_handle);
  if (begin == nullptr || end == nullptr || !begin->timed || !end->timed) return kInvalidHandle;
  for (const Event* event : {begin, end}) {
    if (!event->latest) return kInvalidHandle;
    if (!event->latest->done) return kNotReady;
  }
  *milliseconds =
      std::chrono::duration<float, std::milli>(end->latest->done_at - begin->latest->done_at).count();
  return kSuccess;
}

int cuEventDestroy_v2(void* handle) {
  Call call("cuEventDestroy_v2", Needs::kGiveBack);
  if (call.refused()) return call.code();
  if (event_of("cuEventDestroy_v2", handle) == nullptr) return kInvalidHandle;
  state().events.erase(reinterpret_cast<uintptr_t>(handle));
  return state().lost;
}

}  // extern "C"
