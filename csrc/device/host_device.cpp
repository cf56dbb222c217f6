#include "device/host_device.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/thread.h"
#include "base/trace_ring.h"

namespace offload {

struct HostLink {
  HostLink(const char* link_name, double rate) : name(link_name), bytes_per_s(checked(rate)) {}

  double checked(double rate) const {
    if (!(rate >= 0) || std::isinf(rate)) {
      throw Error(ErrorKind::kInvalidArgument, name + "_bytes_per_s is " + std::to_string(rate) +
                                                   "; give a finite rate, or 0 for no limit");
    }
    return rate;
  }

  const std::string name;
  std::atomic<size_t> pending_count{0};

  std::mutex mutex;
  std::condition_variable_any released;
  // guarded by mutex
  double bytes_per_s;
  bool held = false;
  size_t armed_nth = 0;             // of fail_copy, for the message
  size_t copies_until_failure = 0;  // 0: none is armed
  int64_t released_ns = INT64_MIN;  // a held copy starts no earlier
  int64_t free_ns = INT64_MIN;      // the copies before it occupy the link until then
};

namespace {

// A copy of so many bytes takes about as long as waking the thread of a stream.
constexpr size_t kAtOnceBytes = size_t{32} << 10;

// When copies end at a rate of next to nothing: what is added to it still fits 63 bits.
constexpr int64_t kNeverNs = INT64_MAX / 2;

using Links = std::array<std::shared_ptr<HostLink>, 2>;

// When a copy has the link, on the device's clock.
struct Occupation {
  int64_t begin_ns;
  int64_t end_ns;
};

// The end of a ticket that a copy waits for: when it was, however late the stream's thread gets to it.
struct Cause {
  Ticket ended = Ticket::pending();  // follows the ticket
  int64_t ns = INT64_MIN;            // once `ended` is done
};

struct Copy {
  Direction direction;
  std::vector<CopySpan> spans;
  int64_t submitted_ns;
  size_t failing_nth;                         // 0: this copy is meant to work
  TraceLabel label;                           // of the submitter
  std::vector<std::shared_ptr<Cause>> after;  // the waits submitted before it
  Ticket ticket;

  size_t total_bytes() const {
    size_t sum = 0;
    for (const CopySpan& span : spans) sum += span.bytes;
    return sum;
  }
};

// What the thread of a stream works on; outlives the stream only in a forked child.
class StreamWorker {
 public:
  StreamWorker(std::string name, std::shared_ptr<Clock> clock, Links links)
      : name_(std::move(name)), clock_(std::move(clock)), links_(std::move(links)) {}

  // Copies run in order, so a wait that the next copy observes holds back all later ones.
  void wait_ticket(const Ticket& ticket) {
    auto cause = std::make_shared<Cause>();
    const bool was_done = ticket.done();
    ticket.on_end([clock = clock_, cause, was_done](const std::exception_ptr& error) {
      if (!was_done) cause->ns = clock->now_ns();
      cause->ended.fail(error);
    });
    std::lock_guard lock(mutex_);
    waits_.push_back(std::move(cause));
  }

  // A small copy that nothing is before, and nothing holds back, has ended at the return.
  void submit(Copy copy) {
    {
      std::lock_guard lock(mutex_);
      copy.after = std::exchange(waits_, {});  // those of a copy that is refused here are nobody else's
      if (!thread_.joinable()) {
        thread_ = start_thread("offload-" + name_, [this](std::stop_token stop) { run(stop); });
      }
      link_of(copy).pending_count.fetch_add(1, std::memory_order_relaxed);
      if (!may_run_at_once(copy)) {
        queue_.push_back(std::move(copy));
        submitted_.notify_one();
        return;
      }
      is_running_ = true;
    }
    move_bytes(copy, std::nullopt, {});
    finish(copy, nullptr);
    std::lock_guard lock(mutex_);
    is_running_ = false;
    if (!queue_.empty()) submitted_.notify_one();
  }

 private:
  void run(std::stop_token stop) {
    while (std::optional<Copy> copy = next(stop)) {
      run_copy(*copy, stop);
      std::lock_guard lock(mutex_);
      is_running_ = false;
    }
  }

  HostLink& link_of(const Copy& copy) const { return *links_[static_cast<size_t>(copy.direction)]; }

  // With mutex_ held.
  bool may_run_at_once(const Copy& copy) const {
    if (is_running_ || !queue_.empty() || !copy.after.empty()) return false;
    if (copy.failing_nth > 0 || copy.total_bytes() > kAtOnceBytes) return false;
    HostLink& link = link_of(copy);
    std::lock_guard lock(link.mutex);
    return !link.held && link.bytes_per_s == 0;
  }

  // Null once the stop is requested and the queue is empty.
  std::optional<Copy> next(std::stop_token stop) {
    std::unique_lock lock(mutex_);
    if (!submitted_.wait(lock, stop, [&] { return !is_running_ && !queue_.empty(); })) return std::nullopt;
    Copy copy = std::move(queue_.front());
    queue_.pop_front();
    is_running_ = true;
    return copy;
  }

  void run_copy(const Copy& copy, std::stop_token stop) {
    HostLink& link = link_of(copy);
    std::exception_ptr error = wait_causes(copy.after, stop);
    const std::optional<Occupation> paced = occupy(link, copy, error != nullptr, stop);
    if (!error && copy.failing_nth > 0) {
      error = std::make_exception_ptr(
          Error(ErrorKind::kDevice, "copy " + std::to_string(copy.failing_nth) + " of lane " + link.name +
                                        " (" + std::to_string(copy.total_bytes()) +
                                        " bytes) failed: asked for by fail_copy"));
    }
    if (!error) move_bytes(copy, paced, stop);
    finish(copy, error);
  }

  void move_bytes(const Copy& copy, const std::optional<Occupation>& paced, std::stop_token stop) {
    const bool traced = trace_is_on();
    const int64_t begin_ns = paced ? paced->begin_ns : traced ? clock_->now_ns() : 0;
    // The bytes move when the time has passed: a source changed too early, or a destination read too
    // early, shows.
    if (paced) clock_->sleep_until(paced->end_ns, stop);
    // memmove, for on this device both sides may be the same memory.
    for (const CopySpan& span : copy.spans) {
      if (span.bytes > 0) std::memmove(span.destination, span.source, span.bytes);
    }
    // Before the ticket: who waited for the copy finds its record.
    if (traced) {
      const auto lane = copy.direction == Direction::kToHost ? TraceLane::kToHost : TraceLane::kToDevice;
      record_trace(lane, begin_ns, clock_->now_ns(), copy.total_bytes(), copy.label);
    }
  }

  void finish(const Copy& copy, const std::exception_ptr& error) {
    // Before the ticket: who waited for the ticket sees the copy gone.
    link_of(copy).pending_count.fetch_sub(1, std::memory_order_relaxed);
    copy.ticket.fail(error);
  }

  // Returns the first error of the causes, null when all went well.
  std::exception_ptr wait_causes(const std::vector<std::shared_ptr<Cause>>& causes, std::stop_token stop) {
    std::exception_ptr error;
    for (const std::shared_ptr<Cause>& cause : causes) {
      if (!cause->ended.wait_ended(stop)) {
        return std::make_exception_ptr(
            Error(ErrorKind::kDevice, "the copy was cancelled: its stream " + name_ +
                                          " was destroyed before the work it waits for ended"));
      }
      earliest_ns_ = std::max(earliest_ns_, cause->ns);
      if (!error) error = cause->ended.error();
    }
    return error;
  }

  // Waits while the link is held; returns when the copy has it, nothing where it has no rate to keep.
  std::optional<Occupation> occupy(HostLink& link, const Copy& copy, bool failed, std::stop_token stop) {
    std::unique_lock lock(link.mutex);
    link.released.wait(lock, stop, [&] { return !link.held; });
    if (link.bytes_per_s == 0 || failed || copy.failing_nth > 0) return std::nullopt;
    // From the times of the causes and not from now: a manual clock gives the same end however late
    // this thread gets here.
    const int64_t start_ns = std::max({copy.submitted_ns, link.released_ns, link.free_ns, earliest_ns_});
    const double duration_ns = std::ceil(static_cast<double>(copy.total_bytes()) / link.bytes_per_s * 1e9);
    const bool ends = duration_ns < static_cast<double>(kNeverNs - start_ns);
    link.free_ns = ends ? start_ns + static_cast<int64_t>(duration_ns) : kNeverNs;
    return Occupation{start_ns, link.free_ns};
  }

  const std::string name_;
  const std::shared_ptr<Clock> clock_;
  const Links links_;

  // used by the stream's thread alone
  int64_t earliest_ns_ = INT64_MIN;  // a ticket that was waited for ended then

  std::mutex mutex_;
  std::condition_variable_any submitted_;
  // guarded by mutex_
  std::vector<std::shared_ptr<Cause>> waits_;  // for the next copy
  std::deque<Copy> queue_;
  bool is_running_ = false;  // a copy is, in the stream's thread or in one that submits

  std::jthread thread_;  // last: its destructor requests the stop and joins while the rest still lives
};

class HostStream final : public Stream {
 public:
  explicit HostStream(std::unique_ptr<StreamWorker> worker) : worker_(std::move(worker)) {}

  ~HostStream() override {
    // Leaked on purpose in a forked child: there is no thread to join, and its locks may be held.
    if (owner_.forked()) static_cast<void>(worker_.release());
  }

  StreamWorker& worker() {
    owner_.require_owner("the stream of a HostDevice");
    return *worker_;
  }

 private:
  const ForkGuard owner_;
  std::unique_ptr<StreamWorker> worker_;
};

// Counts an armed fault down; true when this is the one that fails.
bool consume_fault(size_t& until_failure) { return until_failure > 0 && --until_failure == 0; }

}  // namespace

HostDevice::HostDevice(HostDeviceOptions options)
    : clock_(options.clock ? std::move(options.clock) : std::make_shared<SteadyClock>()),
      links_{std::make_shared<HostLink>("to_host", options.to_host_bytes_per_s),
             std::make_shared<HostLink>("to_device", options.to_device_bytes_per_s)} {}

HostDevice::~HostDevice() = default;

HostLink& HostDevice::link(Direction direction) const {
  owner_.require_owner("this HostDevice");
  return *links_[static_cast<size_t>(direction)];
}

std::unique_ptr<Stream> HostDevice::create_stream(const std::string& name) {
  return std::make_unique<HostStream>(std::make_unique<StreamWorker>(name, clock_, links_));
}

Ticket HostDevice::submit_copies(Stream& stream, Direction direction, std::span<const CopySpan> copies) {
  HostLink& target = link(direction);
  Copy copy{.direction = direction,
            .spans = {copies.begin(), copies.end()},
            .submitted_ns = clock_->now_ns(),
            .failing_nth = 0,
            .label = trace_label(),
            .after = {},
            .ticket = Ticket::pending()};
  {
    std::lock_guard lock(target.mutex);
    if (consume_fault(target.copies_until_failure)) copy.failing_nth = target.armed_nth;
  }
  Ticket ticket = copy.ticket;
  static_cast<HostStream&>(stream).worker().submit(std::move(copy));
  return ticket;
}

void HostDevice::wait_ticket(Stream& stream, const Ticket& ticket) {
  if (ticket.done() && !ticket.error()) return;
  static_cast<HostStream&>(stream).worker().wait_ticket(ticket);
}

void HostDevice::wait_compute(Stream&, uintptr_t) {
  // Compute on this device is synchronous with the caller: it ended before this call.
}

bool HostDevice::compute_wait(uintptr_t, const Ticket& ticket, int64_t timeout_ns) {
  if (!trace_is_on() || ticket.done()) return ticket.wait(timeout_ns);
  const int64_t begin_ns = clock_->now_ns();
  const bool ended = ticket.wait_ended(timeout_ns);
  record_trace(TraceLane::kWait, begin_ns, clock_->now_ns(), 0, {.name = trace_label().name, .kind = 1});
  if (ended) ticket.wait();  // rethrows its error
  return ended;
}

void HostDevice::pin(void* address, size_t bytes) {
  owner_.require_owner("this HostDevice");
  std::lock_guard lock(pin_mutex_);
  if (consume_fault(pins_until_failure_)) {
    throw Error(ErrorKind::kDevice, "cannot pin " + std::to_string(bytes) + " bytes at address " +
                                        std::to_string(reinterpret_cast<uintptr_t>(address)) +
                                        ": asked for by fail_pin");
  }
  pinned_bytes_ += bytes;
}

void HostDevice::unpin(void*, size_t bytes) noexcept {
  if (owner_.forked()) return;  // the lock may be held for ever, and the pages are the parent's
  std::lock_guard lock(pin_mutex_);
  pinned_bytes_ -= bytes;
}

void HostDevice::hold(Direction direction) {
  HostLink& target = link(direction);
  std::lock_guard lock(target.mutex);
  target.held = true;
}

void HostDevice::release(Direction direction) {
  HostLink& target = link(direction);
  {
    std::lock_guard lock(target.mutex);
    if (!target.held) return;
    target.held = false;
    target.released_ns = clock_->now_ns();
  }
  target.released.notify_all();
}

void HostDevice::limit(Direction direction, double bytes_per_s) {
  HostLink& target = link(direction);
  const double rate = target.checked(bytes_per_s);
  std::lock_guard lock(target.mutex);
  target.bytes_per_s = rate;
}

void HostDevice::fail_copy(Direction direction, size_t nth) {
  HostLink& target = link(direction);
  std::lock_guard lock(target.mutex);
  target.armed_nth = nth;
  target.copies_until_failure = nth;
}

void HostDevice::fail_pin(size_t nth) {
  owner_.require_owner("this HostDevice");
  std::lock_guard lock(pin_mutex_);
  pins_until_failure_ = nth;
}

size_t HostDevice::pending_count(Direction direction) const {
  return link(direction).pending_count.load(std::memory_order_relaxed);
}

size_t HostDevice::pinned_bytes() const {
  owner_.require_owner("this HostDevice");
  std::lock_guard lock(pin_mutex_);
  return pinned_bytes_;
}

}  // namespace offload
