// Finds two accesses to the same bytes that nothing orders, though every copy of a double runs in good time.
//
// Actors are the host and each stream: the legacy default one, others that torch computes on, and those of
// copies. Each has a clock: how far it knows every other one to be over. All streams but the default one are
// non-blocking, as torch's own are, so that it is in order with none of them by itself. An operation begins
// after what its stream and the host know when it is submitted; records, waits and calls in which the host
// waits hand that on (vector clocks). So nothing depends on when work really runs, but for what the host has
// seen by then.
//
// Threads: none of its own; whoever calls holds State::mutex. All threads of the host are one actor: how they
// tell each other is not seen, and an order between them must not be missed. What is missed is a race with a
// thread that has not been told what another one saw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace driver_double {

// What happens to bytes. torch's allocator keeps blocks by the stream that they were allocated on, and hands
// them on in its order: memory that is allocated may still be used by what that stream did before with it, so
// that this is as a write of the stream. What is freed may be given to the stream's next allocation, whatever
// its size: what used it must be over for the stream by then. Another stream's allocation never gets it,
// though the double's memory may be the same.
enum class Use { kRead, kWrite, kAllocate, kFree };

struct Span {
  uintptr_t begin;
  size_t bytes;
  Use use;
};

// How much of each actor's work is over at some point, by actor.
struct Position {
  std::vector<uint64_t> over;
  uint64_t run = 0;  // forget() makes those of before mean nothing
};

class Order {
 public:
  static constexpr uintptr_t kDefault = 0;  // the legacy default stream

  void set_on(bool on);
  bool on() const { return on_; }
  // All accesses so far are over, for everybody; the races are forgotten.
  void forget();

  // `stream` is given an operation that uses these bytes. What `used_on` has so far counts as over: a block
  // that was recorded on streams is not used again before that (Tensor.record_stream). Returns whether
  // nothing orders one of the uses with an earlier one, which of memory that is freed is no race yet.
  bool operate(uintptr_t stream, const std::string& what, const std::vector<Span>& spans,
               const std::vector<uintptr_t>& used_on = {});
  Position position(uintptr_t stream);                    // behind what it was given so far
  void wait(uintptr_t stream, const Position& position);  // its later work comes behind that
  void host_waits(const Position& position);
  void host_waits(uintptr_t stream) { host_waits(position(stream)); }
  void host_waits_for_all();
  // What is no memory of the host's or of a device any more, and was waited for or belongs to nobody.
  void forget(uintptr_t begin, size_t bytes);

  size_t race_count() const { return race_count_; }
  const std::string& races() const { return races_; }  // the first ones, a line each

 private:
  struct Access {
    size_t actor = 0;
    uint64_t time = 0;  // 0: none
    const std::string* what = nullptr;
    uintptr_t begin = 0;
    size_t bytes = 0;
    Use use = Use::kRead;
  };
  // Bytes with one history: the last write, and the reads since, one an actor.
  struct Piece {
    uintptr_t end = 0;
    Access write;
    std::vector<Access> reads;
  };

  // Memory that a stream got back, and the uses of it that were not over for the stream.
  struct Freed {
    Access by;
    std::vector<Access> uses;
  };

  static constexpr size_t kHost = 0;

  size_t actor_of(uintptr_t stream);
  // `over`: what `access` comes behind. Returns as operate() does.
  bool apply(const Access& access, const std::vector<uint64_t>& over);
  void reuse(size_t actor);  // an allocation may get what the stream got back
  void split_at(uintptr_t address);
  void report(const Access& earlier, const Access& later);
  std::string text(const Access& access) const;

  bool on_ = false;
  uint64_t run_ = 1;
  std::map<uintptr_t, size_t> actors_;         // by stream
  std::vector<std::string> names_;             // by actor
  std::vector<std::vector<uint64_t>> clocks_;  // by actor
  std::map<uintptr_t, Piece> pieces_;          // by address; they do not overlap
  std::vector<std::vector<Freed>> freed_;      // by actor
  std::set<std::string> texts_;                // what accesses point to
  size_t race_count_ = 0;
  std::string races_;
};

}  // namespace driver_double
