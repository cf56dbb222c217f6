#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "driver_double/driver_double.h"
#include "driver_double/state.h"

using namespace driver_double;

namespace {

std::unique_lock<std::mutex> locked() { return std::unique_lock(state().mutex); }

Lane* lane_of(const char* direction) {
  if (std::strcmp(direction, "to_host") == 0) return &state().lanes[kToHost];
  if (std::strcmp(direction, "to_device") == 0) return &state().lanes[kToDevice];
  return nullptr;
}

int set_held(const char* direction, bool held) {
  const auto lock = locked();
  Lane* lane = lane_of(direction);
  if (lane == nullptr) return 0;
  lane->held = held;
  state().changed.notify_all();
  return 1;
}

// A forked child has neither streams nor, perhaps, the mutex.
bool is_watched() { return state().ordered_by == getpid(); }

void compute(uintptr_t stream, const char* what, const double_span* spans, size_t count,
             const std::vector<uintptr_t>& used_on) {
  if (!is_watched()) return;
  std::vector<Span> used;
  for (size_t i = 0; i < count; ++i)
    used.push_back({spans[i].begin, spans[i].bytes, static_cast<Use>(spans[i].use)});
  auto lock = locked();
  state().active_at = std::chrono::steady_clock::now();
  if (state().order.operate(stream, what, used, used_on)) settle(lock);
}

// One that was recorded before the watch began orders nothing.
Position recorded_position(size_t recorded) {
  const auto found = state().positions.find(recorded);
  return found == state().positions.end() ? Position{} : found->second;
}

}  // namespace

extern "C" {

void double_reset() {
  const auto lock = locked();
  state().forget();
}

int double_set_kind(const char* kind) {
  const auto lock = locked();
  const std::string wanted = kind;
  if (wanted != "discrete" && wanted != "hmm" && wanted != "ats" && wanted != "integrated") return 0;
  state().kind = wanted;
  return 1;
}

void double_set_attribute(int attribute, int value) {
  const auto lock = locked();
  state().attributes.insert_or_assign(attribute, value);
}

void double_set_version(int version) {
  const auto lock = locked();
  state().version = version;
}

void double_set_device_count(int count) {
  const auto lock = locked();
  state().device_count = std::clamp(count, 0, kDevicesAtMost);
}

void double_set_host_numa_node(int node) {
  const auto lock = locked();
  state().host_numa_node = node;
}

void double_set_free_bytes(size_t bytes) {
  const auto lock = locked();
  state().free_bytes = bytes;
}

void double_set_proc_address(int level) {
  const auto lock = locked();
  state().proc_address_level = level;
}

void double_hide(const char* symbol) {
  const auto lock = locked();
  if (*symbol == '\0') {
    state().hidden.clear();
  } else {
    state().hidden.emplace_back(symbol);
  }
}

int double_fail(const char* entry, size_t nth, int code, int lasting) {
  const auto lock = locked();
  const auto found = state().entries.find(entry);
  if (found == state().entries.end()) return 0;
  found->second.until_failure = nth;
  found->second.code = code;
  found->second.lasting = lasting != 0;
  return 1;
}

int double_fail_copy(const char* direction, size_t nth, int code) {
  const auto lock = locked();
  Lane* lane = lane_of(direction);
  if (lane == nullptr) return 0;
  lane->until_failure = nth;
  lane->code = code;
  return 1;
}

int double_hold(const char* direction) { return set_held(direction, true); }
int double_release(const char* direction) { return set_held(direction, false); }

void double_set_capturing(int capturing) {
  const auto lock = locked();
  state().capturing = capturing != 0;
}

size_t double_calls(const char* entry) {
  const auto lock = locked();
  const auto found = state().entries.find(entry);
  return found == state().entries.end() ? SIZE_MAX : found->second.calls;
}

size_t double_live(const char* what) {
  const auto lock = locked();
  const State& all = state();
  const std::string wanted = what;
  size_t sum = 0;
  if (wanted == "contexts") {
    for (const auto& [ordinal, count] : all.retains) sum += count;
    return sum;
  }
  if (wanted == "registered_bytes") {
    for (const auto& [start, registration] : all.registrations) sum += registration->bytes;
    return sum;
  }
  if (wanted == "managed_bytes") {
    for (const auto& [address, bytes] : all.managed) sum += bytes;
    return sum;
  }
  if (wanted == "plain_batches") return all.plain_batches;
  if (wanted == "modules") return all.modules.size();
  if (wanted == "managed") return all.managed.size();
  if (wanted == "streams") {
    return static_cast<size_t>(
        std::ranges::count_if(all.streams, [](const auto& entry) { return !entry.second->computes; }));
  }
  if (wanted == "events") return all.events.size();
  if (wanted == "registrations") return all.registrations.size();
  if (wanted == "pending_copies") return all.lanes[kToHost].pending + all.lanes[kToDevice].pending;
  if (wanted == "pushed_contexts") return pushed().size();
  return SIZE_MAX;
}

void double_set_late(int late) {
  const auto lock = locked();
  state().late = late != 0;
}

void double_watch(int on) {
  const auto lock = locked();
  state().ordered_by = on != 0 ? getpid() : 0;
  state().order.set_on(on != 0);
  state().positions.clear();
}

uintptr_t double_compute_stream() {
  const auto lock = locked();
  return start_stream(/*ordinal=*/0, /*computes=*/true);
}

void double_compute(uintptr_t stream, const char* what, const double_span* spans, size_t count) {
  compute(stream, what, spans, count, {});
}

void double_free(uintptr_t stream, const uintptr_t* used_on, size_t used_count, const char* what,
                 const double_span* span) {
  compute(stream, what, span, 1, {used_on, used_on + used_count});
}

size_t double_record(uintptr_t stream) {
  if (!is_watched()) return 0;
  const auto lock = locked();
  state().positions.emplace(state().next_position, state().order.position(stream));
  return state().next_position++;
}

void double_wait(uintptr_t stream, size_t recorded) {
  if (!is_watched()) return;
  const auto lock = locked();
  state().order.wait(stream, recorded_position(recorded));
}

void double_host_waits(size_t recorded) {
  if (!is_watched()) return;
  const auto lock = locked();
  state().order.host_waits(recorded_position(recorded));
}

void double_host_waits_for(uintptr_t stream) {
  if (!is_watched()) return;
  const auto lock = locked();
  state().order.host_waits(stream);
}

void double_synchronize() {
  if (!is_watched()) return;
  auto lock = locked();
  drain(lock);
}

size_t double_races() {
  const auto lock = locked();
  return state().order.race_count();
}

const char* double_race_texts() {
  const auto lock = locked();
  return state().order.races().c_str();
}

size_t double_misuses() {
  const auto lock = locked();
  return state().misuses;
}

const char* double_first_misuse() {
  const auto lock = locked();
  return state().first_misuse.c_str();
}

}  // extern "C"
