// What the double keeps: handles, queues, registrations, and the faults that are armed.
//
// Threads: everything is guarded by State::mutex, but the flags that say otherwise; each stream of copies is
//          one detached thread, which outlives its handle until its queue is empty, as the real one does.
// Ownership: handles are numbers that are never used twice, so a destroyed one is always recognised. The
//            state is never freed: threads of streams may run until the process ends.
// Invariants: no operation is queued while the context is lost, and no copy runs when it becomes so.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "driver_double/order.h"

namespace driver_double {

// As in cuda.h.
enum Code : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
  kContextIsDestroyed = 709,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
};

constexpr int kDevicesAtMost = 8;

enum Direction { kToHost, kToDevice };

// The end of something queued; shared by the queue and by who waits for it.
struct Completion {
  bool done = false;
  std::chrono::steady_clock::time_point done_at = {};
  bool wanted = false;  // compute waits for it: a late double runs it now
};

struct Registration {
  size_t bytes = 0;
  size_t copies = 0;  // queued or running over it, and waits for a word of it
};

struct Operation {
  enum Kind { kCopy, kRecord, kWait, kWaitWord } kind;
  std::shared_ptr<Completion> completion;  // of this operation; of the event for kWait

  // of kWaitWord, with its registration
  uint32_t* word = nullptr;
  uint32_t value = 0;

  // of copies
  Direction direction = kToHost;
  void* destination = nullptr;
  const void* source = nullptr;
  size_t bytes = 0;
  std::vector<unsigned char> staged = {};           // of a pageable source, which is read by the call itself
  std::shared_ptr<Registration> registration = {};  // null: pageable
  int failure = 0;  // what the context is lost with when this copy runs; 0: it works
  std::chrono::steady_clock::time_point queued_at = {};
};

struct Stream {
  int ordinal = 0;
  bool computes = false;  // torch's own: what it is given ends in the call, and it has no thread
  bool destroyed = false;
  const Operation* running = nullptr;  // has left the queue
  std::deque<Operation> queue;
};

struct Event {
  int ordinal = 0;
  bool timed = false;
  std::shared_ptr<Completion> latest;  // null: never recorded
  Position position = {};              // that it was recorded at
};

// What the driver was told of a page of unified memory; locations are ordinals, -1 the host, -2 none.
struct Page {
  int preferred_location = -2;
  int last_prefetch = -2;
  std::set<int> accessed_by;
  bool read_mostly = false;
};

struct Entry {
  size_t calls = 0;
  size_t until_failure = 0;  // 0: not armed
  int code = 0;
  bool lasting = false;
};

struct Lane {
  bool held = false;
  size_t pending = 0;
  size_t until_failure = 0;  // 0: not armed
  int code = 0;
};

struct State {
  // The process that initialised the driver; read before the mutex, which a fork may have left locked.
  std::atomic<pid_t> initialized_by{0};
  std::atomic<bool> deinitialized{false};

  std::mutex mutex;
  std::condition_variable changed;  // of anything below that somebody waits for
  // guarded by mutex
  std::map<std::string, Entry> entries;
  Lane lanes[2];  // by Direction

  int version = 0;
  int device_count = 0;
  int proc_address_level = 0;
  std::string kind;
  int host_numa_node = -1;        // of every device
  std::map<int, int> attributes;  // set by a test
  std::vector<std::string> hidden;

  std::map<int, size_t> retains;  // by ordinal
  uintptr_t next_handle = 0x10000;
  std::map<uintptr_t, std::shared_ptr<Stream>> streams;
  std::map<uintptr_t, Event> events;
  std::map<uintptr_t, std::shared_ptr<Registration>> registrations;  // by address
  std::vector<std::weak_ptr<Stream>> queues;                         // destroyed streams too
  std::set<uintptr_t> modules;

  size_t free_bytes = 0;                // of every device
  std::map<uintptr_t, size_t> managed;  // bytes by address
  std::map<uintptr_t, Page> pages;      // by address

  size_t drains = 0;  // calls that wait for an idle device, and hold the driver meanwhile

  bool capturing = false;  // a thread that makes no other calls captures a CUDA graph, in the global mode

  int lost = 0;  // what every call returns since the context was lost
  size_t losses = 0;
  bool losing = false;  // no further copy starts
  size_t running = 0;   // copies that move bytes now

  bool late = false;                                     // double_set_late()
  std::chrono::steady_clock::time_point active_at = {};  // when the host last gave work to a stream
  Order order;
  std::atomic<pid_t> ordered_by{0};      // the process that set it on; read before the mutex
  std::map<size_t, Position> positions;  // of torch's events, by numbers that are never used twice
  size_t next_position = 1;

  size_t plain_batches = 0;
  size_t misuses = 0;
  std::string first_misuse;

  void forget();  // what double_reset() does
  void misuse(const std::string& what);
};

State& state();

// Every exported symbol of the driver: the entries that are counted and can fail.
std::vector<std::string> entry_names();

// The contexts pushed by this thread, as ordinals.
std::vector<int>& pushed();

// CU_STREAM_CAPTURE_MODE_* of this thread.
int& capture_mode();

enum class Needs {
  kNothing,   // not even cuInit
  kDriver,    // cuInit
  kContext,   // a current context that is not lost
  kGiveBack,  // a current context; what a lost one returns comes after the work is done
};

// What each entry does first: counts, fails as armed, checks what it needs. Holds the mutex while it lives.
class Call {
 public:
  Call(const char* entry, Needs needs);
  bool refused() const { return code_ != kSuccess; }
  int code() const { return code_; }
  std::unique_lock<std::mutex>& lock() { return lock_; }

 private:
  int admit(const char* entry, Needs needs);

  std::unique_lock<std::mutex> lock_;
  int code_;
};

// --- streams: called with the mutex held ---------------------------------------------------------------

uintptr_t start_stream(int ordinal, bool computes = false);

// The registration that holds the whole range, null if none does. `partly`: one holds a part of it, which no
// copy may do; two adjacent ones do not make one.
std::shared_ptr<Registration> registration_of(const void* address, size_t bytes, bool& partly);

// What the driver says of an attribute (CU_DEVICE_ATTRIBUTE_*); kUnknown for one that it has not.
constexpr int kUnknown = INT_MIN;
int attribute_of_devices(int attribute);

bool reads_pageable();                            // the device reads any memory of the host
bool is_mapped(uintptr_t address, size_t bytes);  // memory of the process

// Fills in what a copy needs to run. Returns 0 or what a refused copy returns.
int check_copy(Operation& copy);
void arm_copy(Operation& copy);  // from here on it is pending
void run_copy(std::unique_lock<std::mutex>& lock, Operation& copy);

// Waits until `completion` is done. Returns 0, or what the context was lost with.
int wait_done(std::unique_lock<std::mutex>& lock, const std::shared_ptr<Completion>& completion);

void note_work();  // the host has given a stream some

bool is_stream(void* handle);  // a live one
// The live stream of a handle in the current context; null otherwise, which is a misuse of the entry.
std::shared_ptr<Stream> stream_of(const char* entry, void* handle);
// Whether what the stream is given ends in the call: it is one that torch computes on, the default one (null)
// or not.
inline bool ends_in_call(const std::shared_ptr<Stream>& stream) { return !stream || stream->computes; }
bool has_queued_work();
bool is_copied(uintptr_t address, size_t bytes);  // by a copy that is queued or running
// Waits until no stream has any; a late double does it now. Other threads' calls wait for that. Returns 0, or
// what the context was lost with.
int drain(std::unique_lock<std::mutex>& lock);
// The same after unordered uses, for a second at most and told to nobody: what is written to memory that is
// used by others, or freed, must not end the process before the race is told.
void settle(std::unique_lock<std::mutex>& lock);

}  // namespace driver_double
