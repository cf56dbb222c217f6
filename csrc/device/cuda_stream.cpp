#include "device/cuda_stream.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <iterator>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/thread.h"
#include "base/trace_ring.h"

namespace offload {
namespace {

constexpr int kInStreamOrder = 0x1;  // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
constexpr unsigned kOverlap = 0x1;   // CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE

// One thing that a copy starts after: a position of a compute stream, or else a ticket.
struct Wait {
  std::shared_ptr<CudaEvent> position;
  Ticket ticket;
};

struct Copy {
  Direction direction;
  std::vector<CopySpan> parts;
  bool pinned;  // its host sides
  std::vector<Wait> waits;
  Ticket ticket;
  std::shared_ptr<CudaCopyMark> mark;
  TraceLabel label;  // of the submitter
  // set when it is issued
  std::shared_ptr<CudaEvent> begun;  // the stream has come to its bytes; null: nobody asks when
  std::shared_ptr<CudaEvent> event;
  bool sent = false;            // its bytes may be on their way
  bool recorded = false;        // the event, behind them
  std::vector<Ticket> awaited;  // of work whose word the stream waits for: they keep the word
  std::exception_ptr error;

  std::string text() const {
    size_t bytes = 0;
    for (const CopySpan& part : parts) bytes += part.bytes;
    return "a copy of " + std::to_string(bytes) + " bytes " +
           (direction == Direction::kToHost ? "to_host" : "to_device");
  }
};

}  // namespace

CudaCopyMark* CudaCopyMark::of(const Ticket& ticket, const CudaPrimaryContext* context) noexcept {
  auto* mark = dynamic_cast<CudaCopyMark*>(ticket.mark());
  return mark != nullptr && mark->context_ == context ? mark : nullptr;
}

std::shared_ptr<CudaEvent> CudaCopyMark::event() const {
  std::lock_guard lock(mutex_);
  return event_;
}

void CudaCopyMark::set_issued(std::shared_ptr<CudaEvent> event) {
  {
    std::lock_guard lock(mutex_);
    event_ = std::move(event);
  }
  issued_.complete();
}

void CudaCopyMark::set_ended() { set_issued(nullptr); }

// What a stream shares with its threads.
class CudaStream::Worker : public std::enable_shared_from_this<Worker> {
 public:
  Worker(std::shared_ptr<CudaPrimaryContext> context, std::string name)
      : context_(std::move(context)), driver_(context_->driver()), name_(std::move(name)) {
    CudaPrimaryContext::Current current(*context_);
    int least = 0, greatest = 0;
    driver_.check(driver_.CtxGetStreamPriorityRange(&least, &greatest), "cuCtxGetStreamPriorityRange");
    driver_.check(driver_.StreamCreateWithPriority(&handle_, kNonBlocking, greatest),
                  "cuStreamCreateWithPriority");
  }

  const ForkGuard& owner() const noexcept { return context_->owner(); }
  void wait_ticket(const Ticket& ticket);
  void wait_compute(CudaStreamHandle compute_stream);
  Ticket submit(Copy copy);
  void finish(int64_t drain_ns);

 private:
  void start_threads(bool needs_issuer);
  void run_issuer(std::stop_token stop);
  void run_ender(std::stop_token stop);

  const Ticket& gate(const Wait& wait, const Copy& copy) const noexcept;
  void issue(Copy& copy) noexcept;
  void arm(const Wait& wait, Copy& copy);
  void send(const Copy& copy);
  bool sent_as_batch(const Copy& copy);
  bool small_sent_by_kernel(const Copy& copy);
  bool saw_end(Copy& copy) noexcept;
  void end(Copy& copy) noexcept;
  void trace(const Copy& copy) const noexcept;
  void abandon(std::unique_lock<std::mutex> lock);

  const std::shared_ptr<CudaPrimaryContext> context_;
  const CudaDriver& driver_;
  const std::string name_;
  CudaStreamHandle handle_ = nullptr;

  // used by whoever issues: the issuer while a copy is deferred, else the holder of mutex_
  std::deque<Wait> owed_;  // of copies issued so far; a wait that the driver refused is owed to the next copy

  std::mutex mutex_;
  std::condition_variable_any changed_;
  // guarded by mutex_; a copy leaves its queue when it is over with it, and nobody else touches the first
  std::vector<Wait> waits_;     // for the next copy
  std::deque<Copy> deferred_;   // not yet issued
  std::deque<Copy> in_flight_;  // not yet ended

  std::jthread issuer_;
  std::jthread ender_;
};

void CudaStream::Worker::wait_ticket(const Ticket& ticket) {
  std::lock_guard lock(mutex_);
  waits_.push_back({nullptr, ticket});
}

void CudaStream::Worker::wait_compute(CudaStreamHandle compute_stream) {
  // Recorded now even if the copies before are deferred: later the compute stream will have gone on.
  CudaPrimaryContext::Current current(*context_);
  std::shared_ptr<CudaEvent> position = context_->acquire_event();
  position->record(compute_stream);
  std::lock_guard lock(mutex_);
  waits_.push_back({std::move(position), Ticket()});
}

Ticket CudaStream::Worker::submit(Copy copy) {
  auto mark = std::make_shared<CudaCopyMark>(context_.get());
  Ticket ticket = Ticket::pending(mark);
  copy.mark = std::move(mark);
  copy.ticket = ticket;
  {
    std::lock_guard lock(mutex_);
    copy.waits = std::exchange(waits_, {});  // those of a copy that is refused here are nobody else's
    const auto open = [&](const Wait& wait) { return gate(wait, copy).done(); };
    const bool now =
        copy.pinned && deferred_.empty() && std::all_of(copy.waits.begin(), copy.waits.end(), open);
    start_threads(!now);
    if (now) {
      issue(copy);
      in_flight_.push_back(std::move(copy));
    } else {
      deferred_.push_back(std::move(copy));
    }
  }
  changed_.notify_all();
  return ticket;
}

void CudaStream::Worker::start_threads(bool needs_issuer) {
  auto self = shared_from_this();
  if (!ender_.joinable()) {
    ender_ = start_thread("offload-" + name_, [self](std::stop_token stop) { self->run_ender(stop); });
  }
  if (needs_issuer && !issuer_.joinable()) {
    issuer_ =
        start_thread("offload-" + name_ + "-is", [self](std::stop_token stop) { self->run_issuer(stop); });
  }
}

void CudaStream::Worker::run_issuer(std::stop_token stop) {
  const OutsideCaptures exempt(driver_);
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [&] { return !deferred_.empty(); })) {
    // It stays in the queue until it is issued, so that no later copy overtakes it.
    Copy& copy = deferred_.front();
    lock.unlock();
    for (const Wait& wait : copy.waits) static_cast<void>(gate(wait, copy).wait_ended(stop));
    issue(copy);
    lock.lock();
    in_flight_.push_back(std::move(copy));
    deferred_.pop_front();
    changed_.notify_all();
  }
  ender_.request_stop();  // not before: its work comes from here
}

void CudaStream::Worker::run_ender(std::stop_token stop) {
  const OutsideCaptures exempt(driver_);
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [&] { return !in_flight_.empty(); })) {
    Copy& copy = in_flight_.front();
    lock.unlock();
    end(copy);
    lock.lock();
    in_flight_.pop_front();
    changed_.notify_all();
  }
}

// What the host must wait for before the driver can be told to wait. All of it for a pageable copy: the
// driver may read its source in the call, whatever the stream still waits for.
const Ticket& CudaStream::Worker::gate(const Wait& wait, const Copy& copy) const noexcept {
  if (!copy.pinned) return wait.ticket;
  if (const CudaCopyMark* mark = CudaCopyMark::of(wait.ticket, context_.get())) return mark->issued();
  const HostWorkMark* work = HostWorkMark::of(wait.ticket);
  return work != nullptr ? work->foreseen() : wait.ticket;
}

void CudaStream::Worker::issue(Copy& copy) noexcept {
  for (Wait& wait : copy.waits) owed_.push_back(std::move(wait));
  copy.waits.clear();
  try {
    CudaPrimaryContext::Current current(*context_);
    // Also when a ticket has failed: the copies behind this one run, and rely on the other waits.
    while (!owed_.empty()) {
      arm(owed_.front(), copy);
      owed_.pop_front();
    }
    if (copy.error) return;
    const bool traced = trace_is_on();
    copy.event = context_->acquire_event(traced);  // before the bytes: without it nobody sees their end
    if (traced) {
      copy.begun = context_->acquire_event(traced);
      copy.begun->record(handle_);
    }
    copy.sent = true;
    send(copy);
    copy.event->record(handle_);
    copy.recorded = true;
    copy.mark->set_issued(copy.event);
  } catch (...) {
    copy.error = std::current_exception();
  }
}

// A copy that the driver fails while it runs loses the context, and with it the copies armed behind it.
void CudaStream::Worker::arm(const Wait& wait, Copy& copy) {
  std::shared_ptr<CudaEvent> event = wait.position;
  if (const CudaCopyMark* mark = CudaCopyMark::of(wait.ticket, context_.get())) event = mark->event();
  const HostWorkMark* work = HostWorkMark::of(wait.ticket);
  if (event) {
    event->hold_back(handle_);
  } else if (!wait.ticket.done() && copy.pinned && work != nullptr && work->foreseen().done()) {
    driver_.check(context_->wait_for_word(handle_, work->word(), work->value()), "cuStreamWaitValue32");
    copy.awaited.push_back(wait.ticket);
  } else if (!wait.ticket.done()) {
    copy.error = std::make_exception_ptr(Error(
        ErrorKind::kDevice,
        "the copy was cancelled: its stream " + name_ + " was destroyed before the work it waits for ended"));
  } else if (!copy.error) {
    copy.error = wait.ticket.error();
  }
}

void CudaStream::Worker::send(const Copy& copy) {
  const bool several = copy.parts.size() > 1 && copy.pinned;
  if (several && sent_as_batch(copy)) return;
  const bool small_sent = several && small_sent_by_kernel(copy);
  for (const CopySpan& part : copy.parts) {
    if (small_sent && CudaCopyKernel::takes(part)) continue;
    const auto& [destination, source, bytes] = part;
    const CudaResult code =
        copy.direction == Direction::kToHost
            ? driver_.MemcpyDtoHAsync(destination, reinterpret_cast<CudaAddress>(source), bytes, handle_)
            : driver_.MemcpyHtoDAsync(reinterpret_cast<CudaAddress>(destination), source, bytes, handle_);
    if (code != 0) throw driver_.error(code, copy.text());
  }
}

// False when the parts are to be sent one by one. Should the driver have taken some of them before it
// refused, that writes the same bytes again.
bool CudaStream::Worker::sent_as_batch(const Copy& copy) {
  if (context_->copies_together() != CopiesTogether::kInOneCall) return false;
  std::vector<CudaAddress> destinations, sources;
  std::vector<size_t> sizes;
  for (const auto& [destination, source, bytes] : copy.parts) {
    destinations.push_back(reinterpret_cast<CudaAddress>(destination));
    sources.push_back(reinterpret_cast<CudaAddress>(source));
    sizes.push_back(bytes);
  }
  // By copy engines: small copies of a batch may go through multiprocessors otherwise, which are compute's.
  CudaCopyAttributes attributes{
      .source_access_order = kInStreamOrder, .source_hint = {}, .destination_hint = {}, .flags = kOverlap};
  size_t first = 0, failed_index = 0;
  if (driver_.MemcpyBatchAsync(destinations.data(), sources.data(), sizes.data(), sizes.size(), &attributes,
                               &first, 1, &failed_index, handle_) == 0) {
    return true;
  }
  context_->refuse_batches();
  return false;
}

// False when they are to be sent one by one, as above.
bool CudaStream::Worker::small_sent_by_kernel(const Copy& copy) {
  if (context_->copies_together() != CopiesTogether::kByKernel) return false;
  std::vector<CopySpan> small;
  std::ranges::copy_if(copy.parts, std::back_inserter(small), CudaCopyKernel::takes);
  if (small.size() < 2) return false;
  if (context_->copy_kernel().launch(small, handle_) == 0) return true;
  context_->refuse_copy_kernel();
  return false;
}

void CudaStream::Worker::end(Copy& copy) noexcept {
  // Until its end was seen, the bytes may be on their way, or the stream is yet to look at a word for a copy
  // that was not sent. That memory must not be given back: so a refusal is asked about once more. Only a lost
  // context refuses twice.
  const bool uses_memory = copy.sent || !copy.awaited.empty();
  if (uses_memory && !saw_end(copy)) static_cast<void>(saw_end(copy));
  copy.ticket.fail(std::exchange(copy.error, nullptr));
  copy.mark->set_ended();
}

// The stream's own time for the copy, ending when this thread saw it end: late by a wake-up.
void CudaStream::Worker::trace(const Copy& copy) const noexcept {
  const int64_t end_ns = monotonic_now_ns();
  size_t bytes = 0;
  for (const CopySpan& part : copy.parts) bytes += part.bytes;
  record_trace(copy.direction == Direction::kToHost ? TraceLane::kToHost : TraceLane::kToDevice,
               end_ns - copy.event->ns_since(*copy.begun), end_ns, bytes, copy.label);
}

// Blocks until all that was sent is over; false and the copy's error when the driver refuses to say.
bool CudaStream::Worker::saw_end(Copy& copy) noexcept {
  try {
    CudaPrimaryContext::Current current(*context_);
    if (!copy.event) copy.event = context_->acquire_event();
    if (!copy.recorded) copy.event->record(handle_);
    copy.recorded = true;
    const CudaResult code = copy.event->synchronize();
    if (code == 0) {
      if (copy.begun && trace_is_on()) trace(copy);
      return true;
    }
    throw driver_.error(code, copy.text());
  } catch (...) {
    if (!copy.error) copy.error = std::current_exception();
    return false;
  }
}

void CudaStream::Worker::finish(int64_t drain_ns) {
  issuer_.request_stop();
  if (!issuer_.joinable()) ender_.request_stop();
  std::unique_lock lock(mutex_);
  while (const size_t left = deferred_.size() + in_flight_.size()) {
    const auto moved_on = [&] { return deferred_.size() + in_flight_.size() < left; };
    if (!changed_.wait_for(lock, std::chrono::nanoseconds(drain_ns), moved_on)) {
      abandon(std::move(lock));
      return;
    }
  }
  lock.unlock();
  if (issuer_.joinable()) issuer_.join();
  if (ender_.joinable()) ender_.join();
  CudaPrimaryContext::Current current(*context_);
  driver_.check(driver_.StreamDestroy(handle_), "cuStreamDestroy");
}

// The driver hangs in a call of one of the threads. They keep this object alive, and the stream is leaked.
void CudaStream::Worker::abandon(std::unique_lock<std::mutex> lock) {
  std::vector<std::pair<Ticket, std::shared_ptr<CudaCopyMark>>> left;
  for (const auto* queue : {&in_flight_, &deferred_}) {
    for (const Copy& copy : *queue) left.emplace_back(copy.ticket, copy.mark);
  }
  lock.unlock();
  if (issuer_.joinable()) issuer_.detach();
  if (ender_.joinable()) ender_.detach();
  const auto error = std::make_exception_ptr(Error(
      ErrorKind::kDevice, "the copy was given up: stream " + name_ +
                              " was destroyed and the device does not answer. Restart the process and go "
                              "on from a checkpoint; `dmesg | grep Xid` may tell why"));
  for (const auto& [ticket, mark] : left) {
    ticket.fail(error);
    mark->set_ended();
  }
}

CudaStream::CudaStream(std::shared_ptr<CudaPrimaryContext> context, std::string name, int64_t drain_ns)
    : worker_(std::make_shared<Worker>(std::move(context), std::move(name))), drain_ns_(drain_ns) {}

CudaStream::~CudaStream() {
  if (worker_->owner().forked()) {
    // Leaked on purpose: in a child there are no threads to join, and the locks may be held.
    new std::shared_ptr<Worker>(std::move(worker_));
    return;
  }
  try {
    worker_->finish(drain_ns_);
  } catch (const std::exception&) {
    // The context is lost or the process exiting, and the driver's stream gone with it.
  }
}

void CudaStream::wait_ticket(const Ticket& ticket) { worker_->wait_ticket(ticket); }

void CudaStream::wait_compute(CudaStreamHandle compute_stream) { worker_->wait_compute(compute_stream); }

Ticket CudaStream::submit(Direction direction, std::vector<CopySpan> parts, bool pinned) {
  return worker_->submit({.direction = direction,
                          .parts = std::move(parts),
                          .pinned = pinned,
                          .waits = {},
                          .ticket = {},
                          .mark = nullptr,
                          .label = trace_label(),
                          .begun = nullptr,
                          .event = nullptr,
                          .sent = false,
                          .recorded = false,
                          .awaited = {},
                          .error = nullptr});
}

}  // namespace offload
