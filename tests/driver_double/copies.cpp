// The entries that copy, and the one kernel that does.
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "driver_double/state.h"

using namespace driver_double;

namespace {

constexpr char kElf[] = {'\x7f', 'E', 'L', 'F'};

struct CopyAttributes {  // CUmemcpyAttributes
  int source_access_order;
  int source_hint[2];
  int destination_hint[2];
  unsigned flags;
};

struct KernelSpan {  // as in kernels/copies.cu
  void* destination;
  const void* source;
  size_t bytes;
};

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

// Takes them in the order that a caller expects least.
void queue(Call& call, void* stream_handle, const std::shared_ptr<Stream>& stream,
           std::vector<Operation> batch) {
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
}

bool is_module(const char* entry, void* module) {
  if (state().modules.contains(reinterpret_cast<uintptr_t>(module))) return true;
  state().misuse(std::string(entry) + " of a module that was unloaded");
  return false;
}

// What a kernel does with a span. Where it meets memory of the host that is not registered, and the device
// does not read such, the context is lost.
Operation access_operation(const KernelSpan& span) {
  bool partly = false;
  const bool from_host = registration_of(span.source, span.bytes, partly) != nullptr;
  Operation access =
      copy_operation(from_host ? kToDevice : kToHost, span.destination, span.source, span.bytes);
  access.registration = registration_of(from_host ? span.source : span.destination, span.bytes, partly);
  if (!access.registration && !reads_pageable()) {
    state().misuse("a kernel that uses host memory which is not registered");
    access.failure = kIllegalAddress;
  }
  return access;
}

}  // namespace

extern "C" {

// --- copies ----------------------------------------------------------------------------------------------

int cuMemcpyHtoDAsync_v2(unsigned long long destination, const void* source, size_t bytes, void* stream) {
  return copy("cuMemcpyHtoDAsync_v2", kToDevice, reinterpret_cast<void*>(destination), source, bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void* destination, unsigned long long source, size_t bytes, void* stream) {
  return copy("cuMemcpyDtoHAsync_v2", kToHost, destination, reinterpret_cast<const void*>(source), bytes,
              stream);
}

// The one of 12.8, with an index of what failed. Takes those copies alone whose host memory is registered.
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
  queue(call, stream_handle, stream, std::move(batch));
  return kSuccess;
}

// --- kernels/copies.cu, the one kernel that it knows -----------------------------------------------------

int cuModuleLoadData(void** module, const void* image) {
  Call call("cuModuleLoadData", Needs::kContext);
  if (call.refused()) return call.code();
  if (std::memcmp(image, kElf, sizeof kElf) != 0) return kInvalidImage;
  const uintptr_t handle = state().next_handle += 16;
  state().modules.insert(handle);
  *module = reinterpret_cast<void*>(handle);
  return kSuccess;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  Call call("cuModuleGetFunction", Needs::kContext);
  if (call.refused()) return call.code();
  if (!is_module("cuModuleGetFunction", module)) return kInvalidHandle;
  if (std::strcmp(name, "copy_spans") != 0) return kNotFound;
  *function = module;
  return kSuccess;
}

int cuModuleUnload(void* module) {
  Call call("cuModuleUnload", Needs::kGiveBack);
  if (call.refused()) return call.code();
  if (!is_module("cuModuleUnload", module)) return kInvalidHandle;
  state().modules.erase(reinterpret_cast<uintptr_t>(module));
  return state().lost;
}

int cuLaunchKernel(void* function, unsigned blocks_x, unsigned blocks_y, unsigned blocks_z,
                   unsigned threads_x, unsigned threads_y, unsigned threads_z, unsigned shared_bytes,
                   void* stream_handle, void** arguments, void** extra) {
  Call call("cuLaunchKernel", Needs::kContext);
  if (call.refused()) return call.code();
  if (!is_module("cuLaunchKernel", function)) return kInvalidHandle;
  std::shared_ptr<Stream> stream;
  if (stream_handle != nullptr && !(stream = stream_of("cuLaunchKernel", stream_handle))) {
    return kInvalidHandle;
  }
  constexpr unsigned kBlocksPerSpan = 4, kThreads = 256, kSpansAtMost = 64;
  const unsigned count = blocks_x / kBlocksPerSpan;
  if (count == 0 || count > kSpansAtMost || blocks_x % kBlocksPerSpan != 0 || blocks_y * blocks_z != 1 ||
      threads_x != kThreads || threads_y * threads_z != 1 || shared_bytes != 0 || extra != nullptr) {
    return kInvalidValue;
  }
  const auto* const spans = static_cast<const KernelSpan*>(arguments[0]);
  std::vector<Operation> batch;
  for (const KernelSpan& span : std::vector(spans, spans + count)) batch.push_back(access_operation(span));
  if (overlap(batch)) state().misuse("copies of a kernel that share bytes");
  queue(call, stream_handle, stream, std::move(batch));
  return kSuccess;
}

}  // extern "C"
