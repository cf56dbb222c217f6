// The entries that need a context: memory, streams, events and copies.
#include <memory>
#include <string>
#include <utility>

#include "driver_double/state.h"

using namespace driver_double;

namespace {

constexpr uintptr_t kFirstContext = 0xC0000;  // of ordinal 0; the others follow

struct CopyAttributes {  // CUmemcpyAttributes
  int source_access_order;
  int source_hint[2];
  int destination_hint[2];
  unsigned flags;
};

// The live stream of a handle in the current context; null otherwise, which is a misuse.
std::shared_ptr<Stream> stream_of(const char* entry, void* handle) {
  State& all = state();
  const auto found = all.streams.find(reinterpret_cast<uintptr_t>(handle));
  if (found != all.streams.end() && found->second->ordinal == pushed().back()) return found->second;
  all.misuse(std::string(entry) + " of a stream that was destroyed or is of another context");
  return nullptr;
}

Event* event_of(const char* entry, void* handle) {
  State& all = state();
  const auto found = all.events.find(reinterpret_cast<uintptr_t>(handle));
  if (found != all.events.end()) return &found->second;
  all.misuse(std::string(entry) + " of an event that was destroyed");
  return nullptr;
}

Operation copy_operation(Direction direction, void* destination, const void* source, size_t bytes) {
  return Operation{.kind = Operation::kCopy,
                   .completion = std::make_shared<Completion>(),
                   .direction = direction,
                   .destination = destination,
                   .source = source,
                   .bytes = bytes,
                   .staged = {},
                   .registration = nullptr,
                   .failure = 0,
                   .queued_at = std::chrono::steady_clock::now()};
}

// Whether what the stream is given ends in the call: it is one that torch computes on, the default one or
// not.
bool ends_in_call(const std::shared_ptr<Stream>& stream) { return !stream || stream->computes; }

// Whether a copy of the batch writes what another one of it reads or writes.
bool overlap(const std::vector<Operation>& batch) {
  const auto meets = [](const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(a), other = reinterpret_cast<uintptr_t>(b);
    return begin < other + b_bytes && other < begin + a_bytes;
  };
  for (size_t i = 0; i < batch.size(); ++i) {
    for (size_t j = 0; j < batch.size(); ++j) {
      if (i == j) continue;
      const Operation &one = batch[i], &other = batch[j];
      if (meets(one.destination, one.bytes, other.destination, other.bytes) ||
          meets(one.destination, one.bytes, other.source, other.bytes)) {
        return true;
      }
    }
  }
  return false;
}

// What a copy does with memory as part of `stream`. Pageable memory of the host is left to the call, which
// reads the source itself or does not return before the copy has ended; where it does not, who uses it is not
// seen.
void note_copy(uintptr_t stream, const Operation& copy) {
  const auto destination = reinterpret_cast<uintptr_t>(copy.destination);
  const auto source = reinterpret_cast<uintptr_t>(copy.source);
  const bool of_host = copy.registration != nullptr;
  std::vector<Span> spans;
  if (of_host || copy.direction == kToDevice) spans.push_back({destination, copy.bytes, Use::kWrite});
  if (of_host || copy.direction == kToHost) spans.push_back({source, copy.bytes, Use::kRead});
  state().order.operate(stream, copy.direction == kToHost ? "a copy to_host" : "a copy to_device", spans);
}

// The end of what the stream has been given so far.
std::shared_ptr<Completion> mark_end(Stream& stream) {
  auto end = std::make_shared<Completion>();
  stream.queue.push_back(Operation{.kind = Operation::kRecord, .completion = end});
  return end;
}

int copy(const char* entry, Direction direction, void* destination, const void* source, size_t bytes,
         void* stream_handle) {
  Call call(entry, Needs::kContext);
  if (call.refused()) return call.code();
  std::shared_ptr<Stream> stream;
  if (stream_handle != nullptr && !(stream = stream_of(entry, stream_handle))) return kInvalidHandle;
  Operation copy = copy_operation(direction, destination, source, bytes);
  const std::shared_ptr<Completion> completion = copy.completion;
  if (const int code = check_copy(copy); code != kSuccess) return code;
  arm_copy(copy);
  const auto handle = reinterpret_cast<uintptr_t>(stream_handle);
  if (ends_in_call(stream)) {
    note_copy(handle, copy);
    run_copy(call.lock(), copy);
    return state().lost;
  }
  const bool waits = bytes > 0 && !copy.registration && !reads_pageable();
  const std::shared_ptr<Completion> before = waits && direction == kToDevice ? mark_end(*stream) : completion;
  const Position position = state().order.position(handle);
  note_copy(handle, copy);
  const Position end = state().order.position(handle);
  stream->queue.push_back(std::move(copy));
  note_work();
  // "For transfers between device memory and pageable host memory, the function might be synchronous with
  // respect to host. [...] The driver may synchronize with the stream" (API synchronization behavior). It is
  // where pageable memory goes through the driver's own; a source has been read by then.
  if (!waits) return kSuccess;
  const int code = wait_done(call.lock(), before);
  state().order.host_waits(direction == kToDevice ? position : end);
  return code;
}

}  // namespace

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

// --- copies ----------------------------------------------------------------------------------------------

int cuMemcpyHtoDAsync_v2(unsigned long long destination, const void* source, size_t bytes, void* stream) {
  return copy("cuMemcpyHtoDAsync_v2", kToDevice, reinterpret_cast<void*>(destination), source, bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void* destination, unsigned long long source, size_t bytes, void* stream) {
  return copy("cuMemcpyDtoHAsync_v2", kToHost, destination, reinterpret_cast<const void*>(source), bytes,
              stream);
}

// The one of 12.8, with an index of what failed. Takes the copies in the order that a caller expects least,
// and those alone whose host memory is registered.
int cuMemcpyBatchAsync(unsigned long long* destinations, unsigned long long* sources, size_t* sizes,
                       size_t count, CopyAttributes* attributes, size_t* first_of_attributes,
                       size_t attribute_count, size_t* failed_index, void* stream_handle) {
  Call call("cuMemcpyBatchAsync", Needs::kContext);
  if (call.refused()) return call.code();
  State& all = state();
  *failed_index = SIZE_MAX;
  if (stream_handle == nullptr) {
    all.misuse("a batch in the legacy stream");
    return kInvalidValue;
  }
  const std::shared_ptr<Stream> stream = stream_of("cuMemcpyBatchAsync", stream_handle);
  if (!stream) return kInvalidHandle;
  constexpr int kStreamOrder = 1;
  constexpr unsigned kOverlap = 1;
  if (count == 0 || attribute_count != 1 || first_of_attributes[0] != 0 ||
      attributes[0].source_access_order != kStreamOrder || attributes[0].flags > kOverlap) {
    return kInvalidValue;
  }
  std::vector<Operation> batch;
  for (size_t i = 0; i < count; ++i) {
    bool partly = false;
    auto* const destination = reinterpret_cast<void*>(destinations[i]);
    const auto* const source = reinterpret_cast<const void*>(sources[i]);
    const bool from_host = registration_of(source, sizes[i], partly) != nullptr;
    batch.push_back(copy_operation(from_host ? kToDevice : kToHost, destination, source, sizes[i]));
    if (sizes[i] == 0 || check_copy(batch.back()) != kSuccess || !batch.back().registration) {
      *failed_index = i;
      return kInvalidValue;
    }
  }
  if (attributes[0].flags != kOverlap) ++all.plain_batches;
  if (overlap(batch)) all.misuse("copies of a batch that share bytes");
  for (auto operation = batch.rbegin(); operation != batch.rend(); ++operation) {
    arm_copy(*operation);
    note_copy(reinterpret_cast<uintptr_t>(stream_handle), *operation);
    if (ends_in_call(stream)) {
      run_copy(call.lock(), *operation);
    } else {
      stream->queue.push_back(std::move(*operation));
    }
  }
  note_work();
  return kSuccess;
}

}  // extern "C"
