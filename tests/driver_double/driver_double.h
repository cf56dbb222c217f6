// A CUDA driver for tests: the entries of csrc/device/cuda_driver.h over host memory, with faults on purpose.
//
// "Device" memory is host memory, so a copy is a memmove, done by the thread of its stream. The legacy
// default stream, and others that torch computes on, are the calling thread, as compute is on the CPU: what
// waits on them waits in the call. A pageable source is read by the call, which then waits for what its
// stream has before it, and a copy into pageable memory ends in the call; but where the device reads all
// memory ("hmm", "ats"), they are as any other. A call that waits for an idle device holds the driver: other
// threads' calls wait for it. Every entry counts its calls and can be made to fail; nothing
// here links to the code under test.
//
// Threads: every control may be called from any thread, but not in a forked child, which has no driver.
// Ownership: the library is loaded once a process; double_reset() between tests.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Forgets faults, holds, counts and the lost context; kind "discrete", version 13000, one device. Live
// objects stay: double_live() tells of what a test leaked.
void double_reset();

// What cuDeviceGetAttribute tells of memory: "discrete", "hmm", "ats" (Grace Hopper) or "integrated". 0 if
// unknown.
int double_set_kind(const char* kind);
// What cuDeviceGetAttribute says of this one (CU_DEVICE_ATTRIBUTE_*) of every device, whatever the kind.
void double_set_attribute(int attribute, int value);
void double_set_version(int version);      // of cuDriverGetVersion: 12040 is CUDA 12.4
void double_set_device_count(int count);   // at most 8
void double_set_host_numa_node(int node);  // next to every device; -1, as at first: the driver does not say
void double_set_free_bytes(size_t bytes);  // what cuMemGetInfo tells, whatever is allocated; 6 GiB at first
void double_set_proc_address(int level);  // 2: cuGetProcAddress_v2 works, 1: only the one of 11.3, 0: neither
void double_hide(const char* symbol);  // cuGetProcAddress does not know it (dlsym still does); "" shows all

// The nth call of the entry from now on (1: the next) returns `code` and does nothing; with `lasting`, so do
// all later ones. nth 0 disarms. Returns 0 when there is no such entry.
int double_fail(const char* entry, size_t nth, int code, int lasting);

// The nth copy of the direction ("to_host", "to_device") that is accepted from now on fails while it runs, as
// a real one does: nothing is copied, the context is lost, and every later call that needs a context returns
// `code`. Calls that give something back do so all the same; pushing and popping the context still work.
int double_fail_copy(const char* direction, size_t nth, int code);

// Copies of the direction are accepted but do not run until release. Returns 0 when there is no such
// direction.
int double_hold(const char* direction);
int double_release(const char* direction);

// From now on, until 0, a thread of the process captures a CUDA graph in the global mode, torch's own: calls
// that a capture does not see are refused in every thread whose mode is not the relaxed one, and a wait for
// the whole context in every thread.
void double_set_capturing(int capturing);

size_t double_calls(const char* entry);  // since double_reset()

// What is alive now: "contexts" (retains not released), "streams", "events", "registrations",
// "registered_bytes", "modules", "managed" (allocations), "managed_bytes", "pending_copies",
// "pushed_contexts" of the calling thread, and since double_reset() "plain_batches" (which did not ask to
// leave the multiprocessors to compute). SIZE_MAX if unknown.
size_t double_live(const char* what);

// How often a rule of the real driver was broken since double_reset(), and the first case in words ("" if
// none): a call without a current context, use of a destroyed stream or event or of one of another context, a
// copy from or to host memory that is only partly in one registration, registering overlapping ranges or what
// is no memory, unregistering what is not registered or what a queued copy uses, a stream that is not
// non-blocking, freeing what is not allocated or what a queued copy uses, a batch in the legacy stream, a
// batch or a kernel whose copies share bytes, a kernel that uses host memory which is not registered, a call
// during a capture that the capture refuses.
size_t double_misuses();
const char* double_first_misuse();

// A late double does as little as a card may have done: a copy starts when the host has given nothing to any
// stream for a millisecond, so that it probably waits for it, or for 50 ms; or when a stream that torch
// computes on waits for it.
void double_set_late(int late);

// Whether accesses are watched for races from now on (order.h); what was seen so far is forgotten. Copies are
// seen by themselves, what torch computes is told, with the stream: 0 is the default one.
void double_watch(int on);
// A new one, non-blocking, for torch to compute on: what it waits for is waited for in the call, as in the
// default one. Never destroyed, as torch's own.
uintptr_t double_compute_stream();
struct double_span {
  uintptr_t begin;
  size_t bytes;
  int use;  // 0: reads, 1: writes, 2: allocates, 3: frees
};
void double_compute(uintptr_t stream, const char* what, const double_span* spans, size_t count);
// Of a block that was allocated on `stream`, when what `used_on` have so far is over (Tensor.record_stream).
void double_free(uintptr_t stream, const uintptr_t* used_on, size_t used_count, const char* what,
                 const double_span* span);
size_t double_record(uintptr_t stream);               // where it is; a number that is never used twice
void double_wait(uintptr_t stream, size_t recorded);  // its later work comes behind that
void double_host_waits(size_t recorded);              // until that is over
void double_host_waits_for(uintptr_t stream);         // until all that it was given is over
void double_synchronize();                            // the host waits for every stream
size_t double_races();
const char* double_race_texts();  // a line each
}
