#include "driver_double/state.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

namespace driver_double {
namespace {

constexpr int kRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

// A late copy starts when the host has given nothing to any stream for so long, or when it has waited so
// long.
constexpr std::chrono::microseconds kQuiet{1000};
constexpr std::chrono::milliseconds kLatest{50};

// How often a stream looks at a word.
constexpr std::chrono::microseconds kLook{50};

// What a capture does not see, and may be invalidated by: cuda.h names allocation alone, and
// at::cuda::CUDAStreamCaptureModeGuard of torch stands around the questions after events. A thread in the
// relaxed mode may do it all the same, but for what "necessarily conflicts with stream capture": a wait for
// the whole context, the stream that is captured included.
bool is_refused_in_capture(const std::string& entry) {
  static const std::set<std::string> unsafe = {
      "cuEventQuery",        "cuEventSynchronize", "cuMemHostRegister_v2",
      "cuMemHostUnregister", "cuMemFree_v2",       "cuMemAllocManaged",
  };
  return entry == "cuCtxSynchronize" || (capture_mode() != kRelaxed && unsafe.contains(entry));
}

// A real driver answers so from its exit on.
struct ExitMark {
  ~ExitMark() { state().deinitialized = true; }
} exit_mark;

void finish(Operation& operation) {
  if (operation.kind == Operation::kWait) return;  // it is the event's
  if (operation.kind == Operation::kWaitWord) --operation.registration->copies;
  operation.completion->done = true;
  operation.completion->done_at = std::chrono::steady_clock::now();
  if (operation.kind != Operation::kCopy) return;
  --state().lanes[operation.direction].pending;
  if (operation.registration) --operation.registration->copies;
}

// Nothing that was queued runs any more, and whoever waits is told.
void lose(std::unique_lock<std::mutex>& lock, int code) {
  State& all = state();
  all.losing = true;
  // Memory may be freed once the loss is seen.
  all.changed.wait(lock, [&] { return all.running == 0; });
  all.losing = false;
  all.lost = code;
  ++all.losses;
  for (const std::weak_ptr<Stream>& entry : all.queues) {
    const std::shared_ptr<Stream> stream = entry.lock();
    if (!stream) continue;
    for (Operation& operation : stream->queue) finish(operation);
    stream->queue.clear();
  }
  all.order.host_waits_for_all();
  all.changed.notify_all();
}

// What is queued now is late enough.
void hurry() {
  for (const std::weak_ptr<Stream>& queue : state().queues) {
    const std::shared_ptr<Stream> stream = queue.lock();
    if (stream && stream->running != nullptr) stream->running->completion->wanted = true;
    if (stream && !stream->queue.empty()) stream->queue.back().completion->wanted = true;
  }
  state().changed.notify_all();
}

bool is_wanted(const Stream& stream) {
  const auto wanted = [](const Operation& operation) {
    return operation.kind != Operation::kWait && operation.completion->wanted;
  };
  return wanted(*stream.running) || std::ranges::any_of(stream.queue, wanted);
}

void await_turn(std::unique_lock<std::mutex>& lock, const Stream& stream) {
  State& all = state();
  const size_t losses = all.losses;
  while (all.late && all.losses == losses && !is_wanted(stream)) {
    const auto turn = std::min(all.active_at + kQuiet, stream.running->queued_at + kLatest);
    if (std::chrono::steady_clock::now() >= turn) return;
    all.changed.wait_until(lock, turn);
  }
}

// As wait_done(); who waits for this stream waits for what it waits for.
void await_other(std::unique_lock<std::mutex>& lock, const Stream& stream) {
  State& all = state();
  const size_t losses = all.losses;
  Completion& other = *stream.running->completion;
  all.changed.wait(lock, [&] {
    if (!other.wanted && is_wanted(stream)) {
      other.wanted = true;
      all.changed.notify_all();
    }
    return other.done || all.losses != losses;
  });
}

// Looks as a device does, which nobody wakes.
void await_word(std::unique_lock<std::mutex>& lock, const Operation& wait) {
  State& all = state();
  const size_t losses = all.losses;
  const auto has_come = [&] {
    const uint32_t now = std::atomic_ref(*wait.word).load(std::memory_order_acquire);
    return static_cast<int32_t>(now - wait.value) >= 0;
  };
  while (all.losses == losses && !has_come()) all.changed.wait_for(lock, kLook);
}

void run_stream(const std::shared_ptr<Stream>& stream) {
  State& all = state();
  std::unique_lock lock(all.mutex);
  while (true) {
    all.changed.wait(lock, [&] { return !stream->queue.empty() || stream->destroyed; });
    if (stream->queue.empty()) return;
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->running = &operation;
    if (operation.kind == Operation::kCopy) {
      await_turn(lock, *stream);
      run_copy(lock, operation);
    } else if (operation.kind == Operation::kWait) {
      await_other(lock, *stream);
    } else if (operation.kind == Operation::kWaitWord) {
      await_word(lock, operation);
      finish(operation);
    } else {
      finish(operation);
    }
    stream->running = nullptr;
    all.changed.notify_all();
  }
}

}  // namespace

State& state() {
  static State* const all = [] {
    auto* made = new State;
    for (const std::string& name : entry_names()) made->entries[name];
    made->forget();
    return made;
  }();
  return *all;
}

std::vector<int>& pushed() {
  thread_local std::vector<int> ordinals;
  return ordinals;
}

int& capture_mode() {
  thread_local int mode = 0;
  return mode;
}

void State::forget() {
  for (auto& [name, entry] : entries) entry = Entry{};
  for (Lane& lane : lanes) lane = Lane{.pending = lane.pending};
  version = 13000;
  device_count = 1;
  proc_address_level = 2;
  kind = "discrete";
  host_numa_node = -1;
  attributes.clear();
  hidden.clear();
  free_bytes = size_t{6} << 30;
  capturing = false;
  lost = 0;
  late = false;
  order.set_on(false);
  positions.clear();
  plain_batches = 0;
  misuses = 0;
  first_misuse.clear();
  changed.notify_all();
}

void State::misuse(const std::string& what) {
  if (misuses++ == 0) first_misuse = what;
}

Call::Call(const char* entry, Needs needs) : code_(kSuccess) {
  State& all = state();
  const pid_t owner = all.initialized_by;
  if (owner != 0 && owner != getpid()) {
    code_ = kNotInitialized;  // a forked child has no driver
  } else if (all.deinitialized) {
    code_ = kDeinitialized;
  } else {
    lock_ = std::unique_lock(all.mutex);
    all.changed.wait(lock_, [&] { return all.drains == 0; });
    code_ = admit(entry, needs);
  }
}

int Call::admit(const char* entry, Needs needs) {
  State& all = state();
  Entry& counted = all.entries.at(entry);
  ++counted.calls;
  if (counted.until_failure > 0) {
    const bool fails = counted.until_failure == 1;
    if (!fails || !counted.lasting) --counted.until_failure;
    if (fails) return counted.code;
  }
  if (needs == Needs::kNothing) return kSuccess;
  if (all.initialized_by == 0) return kNotInitialized;
  if (needs == Needs::kDriver) return kSuccess;
  if (pushed().empty()) {
    all.misuse(std::string(entry) + " without a current context");
    return kInvalidContext;
  }
  if (all.retains[pushed().back()] == 0) {
    all.misuse(std::string(entry) + " in a context that was given back");
    return kContextIsDestroyed;
  }
  if (all.capturing && is_refused_in_capture(entry)) {
    all.misuse(std::string(entry) + " while a CUDA graph is captured");
    return kCaptureUnsupported;
  }
  return needs == Needs::kContext ? all.lost : kSuccess;
}

uintptr_t start_stream(int ordinal, bool computes) {
  State& all = state();
  auto stream = std::make_shared<Stream>();
  stream->ordinal = ordinal;
  stream->computes = computes;
  if (!computes) {
    std::erase_if(all.queues, [](const std::weak_ptr<Stream>& queue) { return queue.expired(); });
    all.queues.push_back(stream);
    // Detached: a destroyed stream finishes its queue, and the process may end before a held one.
    std::thread([stream] { run_stream(stream); }).detach();
  }
  const uintptr_t handle = all.next_handle += 16;
  all.streams.emplace(handle, std::move(stream));
  return handle;
}

std::shared_ptr<Registration> registration_of(const void* address, size_t bytes, bool& partly) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  partly = false;
  for (const auto& [start, registration] : state().registrations) {
    const uintptr_t end = start + registration->bytes;
    if (begin >= start && begin + bytes <= end) return registration;
    if (begin < end && start < begin + bytes) partly = true;
  }
  return nullptr;
}

bool is_mapped(uintptr_t address, size_t bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = address / page * page;
  return msync(reinterpret_cast<void*>(begin), address + bytes - begin, MS_ASYNC) == 0;
}

bool reads_pageable() { return state().kind == "hmm" || state().kind == "ats"; }

int check_copy(Operation& copy) {
  State& all = state();
  const void* host = copy.direction == kToHost ? copy.destination : copy.source;
  if (copy.bytes > 0) {
    if (copy.destination == nullptr || copy.source == nullptr) return kInvalidValue;
    bool partly = false;
    copy.registration = registration_of(host, copy.bytes, partly);
    if (!copy.registration && partly) {
      all.misuse("a copy of " + std::to_string(copy.bytes) +
                 " bytes whose host memory lies only partly in a registration");
      return kInvalidValue;
    }
    if (!copy.registration && copy.direction == kToDevice && !reads_pageable()) {
      const auto* bytes = static_cast<const unsigned char*>(copy.source);
      copy.staged.assign(bytes, bytes + copy.bytes);
    }
  }
  return kSuccess;
}

void arm_copy(Operation& copy) {
  Lane& lane = state().lanes[copy.direction];
  if (lane.until_failure > 0 && --lane.until_failure == 0) copy.failure = lane.code;
  ++lane.pending;
  if (copy.registration) ++copy.registration->copies;
}

void run_copy(std::unique_lock<std::mutex>& lock, Operation& copy) {
  State& all = state();
  const size_t losses = all.losses;
  const Lane& lane = all.lanes[copy.direction];
  all.changed.wait(lock, [&] { return all.losses != losses || (!lane.held && !all.losing); });
  if (all.losses == losses) {
    if (copy.failure != 0) {
      lose(lock, copy.failure);
    } else if (copy.bytes > 0) {
      ++all.running;
      lock.unlock();
      // memmove, for "device" and host memory may be the same.
      std::memmove(copy.destination, copy.staged.empty() ? copy.source : copy.staged.data(), copy.bytes);
      lock.lock();
      --all.running;
    }
  }
  finish(copy);
  all.changed.notify_all();
}

void note_work() {
  state().active_at = std::chrono::steady_clock::now();
  state().changed.notify_all();
}

bool is_stream(void* handle) { return state().streams.contains(reinterpret_cast<uintptr_t>(handle)); }

bool has_queued_work() {
  return std::ranges::any_of(state().queues, [](const std::weak_ptr<Stream>& queue) {
    const std::shared_ptr<Stream> stream = queue.lock();
    return stream && (stream->running != nullptr || !stream->queue.empty());
  });
}

bool is_copied(uintptr_t address, size_t bytes) {
  const auto overlaps = [&](const void* memory, size_t length) {
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    return begin < address + bytes && address < begin + length;
  };
  const auto uses = [&](const Operation& operation) {
    return operation.kind == Operation::kCopy &&
           (overlaps(operation.destination, operation.bytes) ||
            (operation.staged.empty() && overlaps(operation.source, operation.bytes)));
  };
  return std::ranges::any_of(state().queues, [&](const std::weak_ptr<Stream>& queue) {
    const std::shared_ptr<Stream> stream = queue.lock();
    return stream && ((stream->running != nullptr && uses(*stream->running)) ||
                      std::ranges::any_of(stream->queue, uses));
  });
}

int drain(std::unique_lock<std::mutex>& lock) {
  State& all = state();
  const size_t losses = all.losses;
  hurry();
  ++all.drains;
  all.changed.wait(lock, [&] { return !has_queued_work() || all.losses != losses; });
  --all.drains;
  all.changed.notify_all();
  all.order.host_waits_for_all();
  return all.lost;
}

void settle(std::unique_lock<std::mutex>& lock) {
  hurry();
  state().changed.wait_for(lock, std::chrono::seconds(1), [] { return !has_queued_work(); });
}

int wait_done(std::unique_lock<std::mutex>& lock, const std::shared_ptr<Completion>& completion) {
  State& all = state();
  const size_t losses = all.losses;
  all.changed.wait(lock, [&] { return completion->done || all.losses != losses; });
  return all.lost;
}

}  // namespace driver_double
