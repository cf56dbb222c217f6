#include "pipeline/step_pipeline.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/fork_guard.h"
#include "base/trace_ring.h"
#include "base/worker_pool.h"
#include "pipeline/job_end.h"
#include "pipeline/update_ahead.h"
#include "pipeline/weight_uploads.h"

namespace offload {
namespace {

// Below this the update is shorter than waking the workers.
constexpr size_t kInlineElements = size_t{16} << 10;

// How long a dying pipeline waits for gradients and uploads in flight. They end within milliseconds
// unless something holds them for good, and then a process must still be able to exit.
constexpr int64_t kDrainNs = 2'000'000'000;

// `master`: in its frame, where the slot has no other copy of the weight on the host.
CopySpan upload_of(const ParameterSlot& slot, size_t begin, size_t count, const void* master) {
  const size_t element_bytes = slot.weight_bytes / slot.span.count;
  const void* const source = slot.upload_source == nullptr
                                 ? master
                                 : static_cast<const char*>(slot.upload_source) + begin * element_bytes;
  return {static_cast<char*>(slot.device_weight) + begin * element_bytes, source, count * element_bytes};
}

}  // namespace

// The thread that runs the jobs, and everything it shares with the callers.
class StepPipeline::Sequencer {
 public:
  Sequencer(std::shared_ptr<TransferQueue> transfers, size_t chunk_elements,
            std::shared_ptr<StateWindow> window)
      : transfers_(std::move(transfers)),
        chunk_elements_(chunk_elements),
        window_(std::move(window)),
        uploads_(transfers_) {}

  bool forked() const noexcept { return owner_.forked(); }
  int64_t add_slot(ParameterSlot slot);
  std::vector<Ticket> submit(std::vector<StepJob> jobs, uintptr_t compute_stream, bool backwards);
  size_t backup_bytes(int64_t slot);
  Ticket speculate(StepJob job, void* backup);
  Ticket discard(const std::vector<int64_t>& slots);
  void states_written(int64_t slot);
  void count_blocked(int64_t ns) { blocked_ns_.fetch_add(static_cast<uint64_t>(ns)); }
  StepStats stats() const noexcept;
  void set_held(bool held);

 private:
  struct Slot {
    ParameterSlot parameter;
    Ticket last_job;
    uint64_t version = 0;              // of its states on disk: how often others wrote them
    std::optional<UpdateAhead> ahead;  // that no job has taken up; used by the sequencer's thread alone
  };

  enum class Task : uint8_t { kUpdate, kUpdateAhead, kDiscard };

  struct QueuedJob {
    Slot* slot;
    StepJob job;
    uint64_t number;
    Ticket ticket;
    Ticket previous;  // the slot's job before this one
    bool backwards = false;
    Task task = Task::kUpdate;
    void* backup = nullptr;
  };

  Slot& slot_of(int64_t number);
  void check_job(const StepJob& job);
  void expect_chunks(int64_t number, const Slot& slot, bool backwards);
  void run(std::stop_token stop);
  std::optional<QueuedJob> next(std::stop_token stop);
  void enqueue(QueuedJob queued);
  void forget_what_has_not_begun(const Slot& slot);
  bool saves_nothing(const QueuedJob& ahead);
  void run_job(const QueuedJob& queued, std::stop_token stop);
  void update_ahead(const QueuedJob& queued, std::stop_token stop);
  bool take_up(Slot& slot, const StepJob& job, const std::vector<Factor>& factors);
  void restore(Slot& slot) noexcept;
  void wait_ended(const Ticket& ticket, std::stop_token stop);
  void read_ahead();
  void update(const QueuedJob& queued, const std::shared_ptr<JobEnd>& end, std::stop_token stop);
  void update_from_disk(const QueuedJob& queued, const UpdateSpan& span, const std::vector<Factor>& factors,
                        const std::shared_ptr<JobEnd>& end, std::stop_token stop);
  void update_span(const UpdateSpan& span, const QueuedJob& queued, const std::vector<Factor>& factors);
  int64_t drain_remaining_ns();

  const ForkGuard owner_;
  const std::shared_ptr<TransferQueue> transfers_;
  const size_t chunk_elements_;
  const std::shared_ptr<StateWindow> window_;  // used by the sequencer's thread alone; may be null
  const std::shared_ptr<FirstError> first_error_ = std::make_shared<FirstError>();

  std::atomic<uint64_t> job_count_{0};
  std::atomic<uint64_t> update_ns_{0};
  std::atomic<uint64_t> blocked_ns_{0};
  std::atomic<uint64_t> kept_count_{0};
  std::atomic<uint64_t> discarded_count_{0};

  // used by the sequencer's thread alone
  WeightUploads uploads_;
  Ticket last_uploading_job_;  // the lane is ordered: when it ended, every upload has
  std::optional<int64_t> drain_deadline_ns_;

  std::mutex mutex_;
  std::condition_variable_any changed_;
  // guarded by mutex_
  std::deque<Slot> slots_;  // never shrinks: queued jobs point into it
  std::deque<QueuedJob> queue_;
  std::vector<ExpectedChunk> expected_;  // of queued jobs; the window does not know of them yet
  uint64_t next_number_ = 0;
  bool held_ = false;

  std::jthread thread_;  // last: its destructor requests the stop and joins while the rest still lives
};

int64_t StepPipeline::Sequencer::add_slot(ParameterSlot slot) {
  owner_.require_owner("this StepPipeline");
  check(slot, window_.get());
  if (slot.span.moment_format == MomentFormat::kInt8 && chunk_elements_ % kMomentBlock != 0) {
    throw Error(ErrorKind::kInvalidArgument,
                "slot '" + slot.name +
                    "': int8 moments need chunk_elements that are a multiple of 256, not " +
                    std::to_string(chunk_elements_));
  }
  std::lock_guard lock(mutex_);
  slots_.push_back({.parameter = std::move(slot), .last_job = Ticket(), .ahead = std::nullopt});
  return static_cast<int64_t>(slots_.size()) - 1;
}

StepPipeline::Sequencer::Slot& StepPipeline::Sequencer::slot_of(int64_t number) {
  if (number < 0 || static_cast<size_t>(number) >= slots_.size()) {
    throw Error(ErrorKind::kInvalidArgument,
                "slot " + std::to_string(number) + " does not exist: there are " +
                    std::to_string(slots_.size()) + "; add_slot gives the number");
  }
  return slots_[static_cast<size_t>(number)];
}

void StepPipeline::Sequencer::check_job(const StepJob& job) {
  const ParameterSlot& slot = slot_of(job.slot).parameter;
  if (slot.span.count == 0) return;
  if (job.gradient == nullptr) {
    throw Error(ErrorKind::kInvalidArgument,
                "slot '" + slot.name + "': the gradient's address is null; leave out parameters without one");
  }
  try {
    require_states(span_to_check(slot), job.scalars);
  } catch (const Error& error) {
    throw Error(error.kind(), "slot '" + slot.name + "': " + error.what() + ", and this optimizer keeps one");
  }
}

void StepPipeline::Sequencer::expect_chunks(int64_t number, const Slot& slot, bool backwards) {
  if (!slot.parameter.on_disk) return;
  const StatesOnDisk& states = *slot.parameter.on_disk;
  const size_t chunk_count = states.layout.chunk_count();
  for (size_t i = 0; i < chunk_count; ++i) {
    const size_t index = backwards ? chunk_count - 1 - i : i;
    StateChunk chunk = states.layout.chunk(index);
    chunk.offset += states.offset;
    expected_.push_back({.key = {.slot = number, .index = index, .version = slot.version},
                         .chunk = chunk,
                         .trace_name = slot.parameter.trace_name});
  }
}

void StepPipeline::Sequencer::states_written(int64_t slot) {
  owner_.require_owner("this StepPipeline");
  std::lock_guard lock(mutex_);
  ++slot_of(slot).version;
}

std::vector<Ticket> StepPipeline::Sequencer::submit(std::vector<StepJob> jobs, uintptr_t compute_stream,
                                                    bool backwards) {
  owner_.require_owner("this StepPipeline");
  if (std::exception_ptr error = first_error_->any()) {
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& cause) {
      throw Error(
          ErrorKind::kState,
          std::string("the step pipeline stopped at an earlier error and takes no more work; its states "
                      "are no longer those of one step, so go on from a checkpoint. The error was: ") +
              cause.what());
    }
  }
  std::vector<Ticket> tickets;
  tickets.reserve(jobs.size());
  {
    std::lock_guard lock(mutex_);
    bool uploads = false;
    for (const StepJob& job : jobs) {
      check_job(job);
      uploads |= slot_of(job.slot).parameter.device_weight != nullptr;
    }
    // Now and not when a chunk is ready: by then the compute stream may already hold the next forward,
    // which waits for these very uploads.
    if (uploads) transfers_->wait_compute(Direction::kToDevice, compute_stream);
    for (StepJob& job : jobs) {
      Slot& slot = slot_of(job.slot);
      Ticket previous = std::exchange(slot.last_job, Ticket::pending());
      tickets.push_back(slot.last_job);
      expect_chunks(job.slot, slot, backwards);
      enqueue({.slot = &slot,
               .job = std::move(job),
               .number = next_number_++,
               .ticket = slot.last_job,
               .previous = std::move(previous),
               .backwards = backwards});
    }
  }
  changed_.notify_one();
  return tickets;
}

size_t StepPipeline::Sequencer::backup_bytes(int64_t slot) {
  std::lock_guard lock(mutex_);
  return UpdateAhead::backup_bytes(slot_of(slot).parameter.span);
}

Ticket StepPipeline::Sequencer::speculate(StepJob job, void* backup) {
  owner_.require_owner("this StepPipeline");
  const Ticket ticket = Ticket::pending();
  {
    std::lock_guard lock(mutex_);
    check_job(job);
    Slot& slot = slot_of(job.slot);
    if (backup == nullptr || slot.parameter.on_disk || job.weight != nullptr || !job.factors.empty()) {
      throw Error(
          ErrorKind::kInvalidArgument,
          "slot '" + slot.parameter.name +
              "': an update ahead of the step needs a backup, states that stay in memory, and a gradient "
              "without factors");
    }
    enqueue({.slot = &slot,
             .job = std::move(job),
             .number = next_number_,
             .ticket = ticket,
             .previous = slot.last_job,
             .task = Task::kUpdateAhead,
             .backup = backup});
  }
  changed_.notify_one();
  return ticket;
}

Ticket StepPipeline::Sequencer::discard(const std::vector<int64_t>& slots) {
  owner_.require_owner("this StepPipeline");
  Ticket last;
  {
    std::lock_guard lock(mutex_);
    for (const int64_t number : slots) {
      Slot& slot = slot_of(number);
      forget_what_has_not_begun(slot);
      last = Ticket::pending();
      enqueue({.slot = &slot,
               .job = {},
               .number = next_number_,
               .ticket = last,
               .previous = {},
               .task = Task::kDiscard});
    }
  }
  changed_.notify_one();
  return last;
}

// Under mutex_.
void StepPipeline::Sequencer::enqueue(QueuedJob queued) {
  queue_.push_back(std::move(queued));
  if (!thread_.joinable()) thread_ = std::jthread([this](std::stop_token stop) { run(stop); });
}

// Under mutex_. Updates ahead of the slot that nobody takes up.
void StepPipeline::Sequencer::forget_what_has_not_begun(const Slot& slot) {
  std::erase_if(queue_, [&](const QueuedJob& queued) {
    if (queued.task != Task::kUpdateAhead || queued.slot != &slot) return false;
    queued.ticket.complete();
    return true;
  });
}

// Whether the update would only cost a copy more: the step's next job waits for nothing, or is the one that
// would take it up, whose factors are right behind its gradient.
bool StepPipeline::Sequencer::saves_nothing(const QueuedJob& ahead) {
  std::lock_guard lock(mutex_);
  const auto next = std::ranges::find(queue_, Task::kUpdate, &QueuedJob::task);
  return next != queue_.end() &&
         (next->slot == ahead.slot || std::ranges::all_of(next->job.tickets, &Ticket::done));
}

StepStats StepPipeline::Sequencer::stats() const noexcept {
  return {.job_count = job_count_,
          .update_ns = update_ns_,
          .blocked_ns = blocked_ns_,
          .kept_count = kept_count_,
          .discarded_count = discarded_count_,
          .window = window_ ? window_->stats() : WindowStats()};
}

void StepPipeline::Sequencer::set_held(bool held) {
  owner_.require_owner("this StepPipeline");
  {
    std::lock_guard lock(mutex_);
    held_ = held;
  }
  changed_.notify_one();
}

void StepPipeline::Sequencer::run(std::stop_token stop) {
  pthread_setname_np(pthread_self(), "offload-step");
  while (std::optional<QueuedJob> queued = next(stop)) {
    switch (queued->task) {
      case Task::kUpdate: run_job(*queued, stop); break;
      case Task::kUpdateAhead: update_ahead(*queued, stop); break;
      case Task::kDiscard:
        restore(*queued->slot);
        queued->ticket.complete();
        break;
    }
  }
  // The pipeline is being destroyed, so nobody submits any more. What is left was held on purpose.
  for (const QueuedJob& queued : queue_) {
    queued.ticket.fail(with_slot(
        queued.slot->parameter.name, "its update was cancelled",
        std::make_exception_ptr(Error(ErrorKind::kState, "the step pipeline was destroyed while held"))));
  }
  // Host memory of the slots is borrowed until the uploads ended.
  last_uploading_job_.wait_ended(drain_remaining_ns());
}

// Null once the stop is requested and nothing is left that may run.
std::optional<StepPipeline::Sequencer::QueuedJob> StepPipeline::Sequencer::next(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  const auto ready = [&] { return !held_ && !queue_.empty(); };
  if (!ready()) {
    lock.unlock();
    uploads_.flush();
    lock.lock();
  }
  if (!changed_.wait(lock, stop, ready)) return std::nullopt;
  QueuedJob queued = std::move(queue_.front());
  queue_.pop_front();
  return queued;
}

void StepPipeline::Sequencer::run_job(const QueuedJob& queued, std::stop_token stop) {
  auto end = std::make_shared<JobEnd>(queued.ticket, queued.number, first_error_);
  const char* stage = "its gradient did not arrive";
  std::exception_ptr error;
  try {
    read_ahead();
    for (const Ticket& ticket : queued.job.tickets) {
      if (first_error_->any()) break;
      wait_ended(ticket, stop);
      ticket.wait();  // it has ended: rethrows its error
    }
    if (!first_error_->any()) {
      // The slot's last upload still reads what this update will write.
      stage = "its last upload did not end";
      wait_ended(queued.previous, stop);
    }
    // Asked again: an upload may have failed meanwhile.
    if (!first_error_->any()) {
      stage = "its update failed";
      update(queued, end, stop);
    }
  } catch (...) {
    error = with_slot(queued.slot->parameter.name, stage, std::current_exception());
  }
  restore(*queued.slot);  // a job that did not get as far as its update takes nothing up
  job_count_.fetch_add(1, std::memory_order_relaxed);
  end->end_part(error);
}

void StepPipeline::Sequencer::update_ahead(const QueuedJob& queued, std::stop_token stop) {
  Slot& slot = *queued.slot;
  try {
    restore(slot);
    for (const Ticket& ticket : queued.job.tickets) {
      wait_ended(ticket, stop);
      ticket.wait();
    }
    wait_ended(queued.previous, stop);
    if (saves_nothing(queued)) return queued.ticket.complete();
    uploads_.flush();
    UpdateSpan span = slot.parameter.span;
    span.gradient = queued.job.gradient;
    span.gradient_format = queued.job.gradient_format;
    slot.ahead.emplace(queued.job, slot.parameter.span, queued.backup);
    for (size_t begin = 0; begin < span.count && !first_error_->any(); begin += chunk_elements_) {
      const size_t count = std::min(chunk_elements_, span.count - begin);
      slot.ahead->keep(begin, count);
      update_span(slice(span, begin, count), queued, {});
    }
  } catch (...) {
    restore(slot);  // the job that comes tells of what is wrong
  }
  queued.ticket.complete();
}

// Whether the slot's states have had the job's update; otherwise they are what they were before.
bool StepPipeline::Sequencer::take_up(Slot& slot, const StepJob& job, const std::vector<Factor>& factors) {
  if (!slot.ahead || !slot.ahead->is(job, factors)) {
    restore(slot);
    return false;
  }
  slot.ahead.reset();
  kept_count_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void StepPipeline::Sequencer::restore(Slot& slot) noexcept {
  if (!slot.ahead) return;
  try {
    slot.ahead->undo();
  } catch (...) {  // the states are of no step: from here on every job fails
    first_error_->record(
        0, with_slot(slot.parameter.name, "its update was not undone", std::current_exception()));
  }
  slot.ahead.reset();
  discarded_count_.fetch_add(1, std::memory_order_relaxed);
}

void StepPipeline::Sequencer::wait_ended(const Ticket& ticket, std::stop_token stop) {
  if (!ticket.done()) uploads_.flush();
  if (ticket.wait_ended(stop) || ticket.wait_ended(drain_remaining_ns())) return;
  throw Error(ErrorKind::kState, "the step pipeline was destroyed before that");
}

// Before the job waits for its gradient: the disk works meanwhile.
void StepPipeline::Sequencer::read_ahead() {
  if (!window_) return;
  std::vector<ExpectedChunk> expected;
  {
    std::lock_guard lock(mutex_);
    expected.swap(expected_);
  }
  for (ExpectedChunk& chunk : expected) window_->expect(std::move(chunk));
  window_->read_ahead();
}

void StepPipeline::Sequencer::update(const QueuedJob& queued, const std::shared_ptr<JobEnd>& end,
                                     std::stop_token stop) {
  const ParameterSlot& slot = queued.slot->parameter;
  std::vector<Factor> factors;
  factors.reserve(queued.job.factors.size());
  for (const PendingFactor& factor : queued.job.factors) {
    factors.push_back({factor.kind, factor.address != nullptr ? *factor.address : factor.value});
  }
  UpdateSpan span = slot.span;
  span.gradient = queued.job.gradient;
  span.gradient_format = queued.job.gradient_format;
  if (queued.job.weight != nullptr) place_weight(span, queued.job.weight);
  if (slot.device_weight != nullptr) last_uploading_job_ = queued.ticket;
  const TraceLabelled traced({.name = slot.trace_name, .kind = traced_kind(Tag::kWeights)});
  const bool small = slot.weight_bytes <= WeightUploads::kSmallBytes && span.count <= chunk_elements_;
  if (!small || slot.on_disk) uploads_.flush();
  if (slot.on_disk) return update_from_disk(queued, span, factors, end, stop);
  const bool is_done = take_up(*queued.slot, queued.job, factors);
  for (size_t begin = 0; begin < span.count; begin += chunk_elements_) {
    const size_t count = std::min(chunk_elements_, span.count - begin);
    if (!is_done) update_span(slice(span, begin, count), queued, factors);
    if (slot.device_weight == nullptr) continue;
    const CopySpan copy = upload_of(slot, begin, count, nullptr);
    if (small) {
      uploads_.add_small(slot.name, copy, end);
    } else {
      uploads_.submit(slot.name, copy, end);
    }
  }
}

void StepPipeline::Sequencer::update_from_disk(const QueuedJob& queued, const UpdateSpan& span,
                                               const std::vector<Factor>& factors,
                                               const std::shared_ptr<JobEnd>& end, std::stop_token stop) {
  const ParameterSlot& slot = queued.slot->parameter;
  const StateLayout& layout = slot.on_disk->layout;
  const size_t chunk_count = layout.chunk_count();
  for (size_t i = 0; i < chunk_count; ++i) {
    const StateChunk chunk = layout.chunk(queued.backwards ? chunk_count - 1 - i : i);
    StateWindow::Frame& frame = window_->take([&](const Ticket& ticket) { wait_ended(ticket, stop); });
    const UpdateSpan part =
        in_frame(slice(span, chunk.begin, chunk.count), layout, chunk, StateWindow::address(frame));
    update_span(part, queued, factors);
    Ticket uploaded;
    if (slot.device_weight != nullptr) {
      uploaded = uploads_.submit(slot.name, upload_of(slot, chunk.begin, chunk.count, part.master), end);
    }
    const Ticket written = window_->write_back(frame, uploaded);
    end->add_part();
    written.on_end([end, name = slot.name](const std::exception_ptr& error) {
      end->end_part(error ? with_slot(name, "its states were not written", error) : nullptr);
    });
  }
}

void StepPipeline::Sequencer::update_span(const UpdateSpan& span, const QueuedJob& queued,
                                          const std::vector<Factor>& factors) {
  const StepJob& job = queued.job;
  const int64_t start_ns = monotonic_now_ns();
  if (span.count <= kInlineElements) {
    update_states(span, job.scalars, factors.data(), factors.size(), job.flush_denormals, active_isa());
  } else {
    update_states_parallel(WorkerPool::shared(), span, job.scalars, factors.data(), factors.size(),
                           job.flush_denormals, active_isa());
  }
  const int64_t end_ns = monotonic_now_ns();
  update_ns_.fetch_add(static_cast<uint64_t>(end_ns - start_ns), std::memory_order_relaxed);
  if (trace_is_on()) {
    const ParameterSlot& slot = queued.slot->parameter;
    record_trace(TraceLane::kHostUpdate, start_ns, end_ns, span.count * (slot.weight_bytes / slot.span.count),
                 {.name = slot.trace_name});
  }
}

// What is left of kDrainNs, counted from the first time that a dying pipeline would have to wait.
int64_t StepPipeline::Sequencer::drain_remaining_ns() {
  if (!drain_deadline_ns_) drain_deadline_ns_ = monotonic_now_ns() + kDrainNs;
  return std::max<int64_t>(0, *drain_deadline_ns_ - monotonic_now_ns());
}

StepPipeline::StepPipeline(std::shared_ptr<TransferQueue> transfers, size_t chunk_elements,
                           std::shared_ptr<StateWindow> window) {
  if (!transfers) throw Error(ErrorKind::kInvalidArgument, "StepPipeline needs a TransferQueue, got null");
  if (chunk_elements == 0)
    throw Error(ErrorKind::kInvalidArgument, "chunk_elements is 0; it must be positive");
  sequencer_ = std::make_unique<Sequencer>(std::move(transfers), chunk_elements, std::move(window));
}

StepPipeline::~StepPipeline() {
  // Leaked on purpose in a forked child: there is no thread to join, and its locks may be held.
  if (sequencer_->forked()) static_cast<void>(sequencer_.release());
}

int64_t StepPipeline::add_slot(ParameterSlot slot) { return sequencer_->add_slot(std::move(slot)); }

std::vector<Ticket> StepPipeline::submit(std::vector<StepJob> jobs, uintptr_t compute_stream,
                                         bool backwards) {
  return sequencer_->submit(std::move(jobs), compute_stream, backwards);
}

size_t StepPipeline::backup_bytes(int64_t slot) { return sequencer_->backup_bytes(slot); }

Ticket StepPipeline::speculate(StepJob job, void* backup) {
  return sequencer_->speculate(std::move(job), backup);
}

Ticket StepPipeline::discard(const std::vector<int64_t>& slots) { return sequencer_->discard(slots); }

void StepPipeline::states_written(int64_t slot) { sequencer_->states_written(slot); }

bool StepPipeline::wait(const std::vector<Ticket>& tickets, int64_t timeout_ns) {
  const auto pending = [](const Ticket& ticket) { return !ticket.done(); };
  if (std::any_of(tickets.begin(), tickets.end(), pending)) {
    const int64_t start_ns = monotonic_now_ns();
    bool ended = true;
    for (const Ticket& ticket : tickets) {
      const int64_t waited_ns = monotonic_now_ns() - start_ns;
      ended = ticket.wait_ended(timeout_ns < 0 ? -1 : std::max<int64_t>(0, timeout_ns - waited_ns));
      if (!ended) break;
    }
    const int64_t end_ns = monotonic_now_ns();
    sequencer_->count_blocked(end_ns - start_ns);
    if (trace_is_on()) {
      record_trace(TraceLane::kWait, start_ns, end_ns, 0, {.name = trace_label().name});
    }
    if (!ended) return false;
  }
  for (const Ticket& ticket : tickets) ticket.wait();  // all have ended: rethrows the first error
  return true;
}

StepStats StepPipeline::stats() const noexcept { return sequencer_->stats(); }

void StepPipeline::hold() { sequencer_->set_held(true); }

void StepPipeline::release() { sequencer_->set_held(false); }

}  // namespace offload
