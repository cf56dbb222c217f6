#include "pipeline/sequencer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/thread.h"
#include "base/trace_ring.h"
#include "base/worker_pool.h"

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

Sequencer::Sequencer(std::shared_ptr<TransferQueue> transfers, size_t chunk_elements,
                     std::shared_ptr<StateWindow> window, std::shared_ptr<Progress> progress)
    : chunk_elements_(chunk_elements),
      window_(std::move(window)),
      progress_(std::move(progress)),
      uploads_(std::move(transfers)) {}

// --- the callers' side -----------------------------------------------------------------------------------

int64_t Sequencer::add_slot(ParameterSlot slot) {
  std::lock_guard lock(mutex_);
  slots_.push_back({.parameter = std::move(slot), .last_job = Ticket(), .ahead = std::nullopt});
  return static_cast<int64_t>(slots_.size()) - 1;
}

const ParameterSlot& Sequencer::slot(int64_t number) {
  std::lock_guard lock(mutex_);
  return slot_of(number).parameter;
}

std::vector<Ticket> Sequencer::submit(std::vector<StepJob> jobs, bool backwards) {
  std::vector<Ticket> tickets;
  tickets.reserve(jobs.size());
  {
    std::lock_guard lock(mutex_);
    if (!jobs.empty()) require_thread();
    for (StepJob& job : jobs) {
      Slot& slot = slot_of(job.slot);
      auto mark = std::make_shared<JobMark>(progress_, next_number_);
      Ticket previous = std::exchange(slot.last_job, Ticket::pending(std::move(mark)));
      tickets.push_back(slot.last_job);
      expect_chunks(job.slot, slot, backwards);
      queue_.push_back({.slot = &slot,
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

Ticket Sequencer::speculate(StepJob job, void* backup) {
  const Ticket ticket = Ticket::pending();
  {
    std::lock_guard lock(mutex_);
    Slot& slot = slot_of(job.slot);
    require_thread();
    queue_.push_back({.slot = &slot,
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

Ticket Sequencer::discard(const std::vector<int64_t>& slots) {
  Ticket last;
  std::vector<Ticket> forgotten;
  {
    std::lock_guard lock(mutex_);
    for (const int64_t number : slots) static_cast<void>(slot_of(number));  // all of them or none
    if (!slots.empty()) require_thread();
    for (const int64_t number : slots) {
      Slot& slot = slot_of(number);
      forget_what_has_not_begun(slot, forgotten);
      last = Ticket::pending();
      queue_.push_back({.slot = &slot,
                        .job = {},
                        .number = next_number_,
                        .ticket = last,
                        .previous = {},
                        .task = Task::kDiscard});
    }
  }
  changed_.notify_one();
  for (const Ticket& ticket : forgotten) ticket.complete();  // not under the lock: see Ticket::on_end
  return last;
}

void Sequencer::states_written(int64_t slot) {
  std::lock_guard lock(mutex_);
  ++slot_of(slot).version;
}

void Sequencer::set_held(bool held) {
  {
    std::lock_guard lock(mutex_);
    held_ = held;
  }
  changed_.notify_one();
}

SequencerStats Sequencer::stats() const noexcept {
  return {.job_count = job_count_,
          .update_ns = static_cast<uint64_t>(update_ns_until(monotonic_now_ns())),
          .kept_count = kept_count_,
          .discarded_count = discarded_count_,
          .window = window_ ? window_->stats() : WindowStats()};
}

int64_t Sequencer::update_ns_until(int64_t now_ns) const noexcept {
  const int64_t clock = update_clock_;
  return clock % 2 == 0 ? clock / 2 : (clock - 1) / 2 + now_ns;
}

// Under mutex_.
Sequencer::Slot& Sequencer::slot_of(int64_t number) {
  if (number < 0 || static_cast<size_t>(number) >= slots_.size()) {
    throw Error(ErrorKind::kInvalidArgument,
                "slot " + std::to_string(number) + " does not exist: there are " +
                    std::to_string(slots_.size()) + "; add_slot gives the number");
  }
  return slots_[static_cast<size_t>(number)];
}

// Under mutex_.
void Sequencer::expect_chunks(int64_t number, const Slot& slot, bool backwards) {
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

// Under mutex_, and before anything is queued: where there is no thread, the caller takes its memory back.
void Sequencer::require_thread() {
  if (thread_.joinable()) return;
  thread_ = start_thread("offload-step", [this](std::stop_token stop) { run(stop); });
}

// Under mutex_. Updates ahead of the slot that nobody takes up; their tickets are the caller's to end.
void Sequencer::forget_what_has_not_begun(const Slot& slot, std::vector<Ticket>& forgotten) {
  std::erase_if(queue_, [&](const QueuedJob& queued) {
    if (queued.task != Task::kUpdateAhead || queued.slot != &slot) return false;
    forgotten.push_back(queued.ticket);
    return true;
  });
}

// --- the thread's side -----------------------------------------------------------------------------------

void Sequencer::run(std::stop_token stop) {
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
    const auto error = with_slot(
        queued.slot->parameter.name, "its update was cancelled",
        std::make_exception_ptr(Error(ErrorKind::kState, "the step pipeline was destroyed while held")));
    if (queued.task == Task::kUpdate && progress_) progress_->pass(queued.number);
    if (const JobMark* mark = JobMark::of(queued.ticket)) mark->end_weight(error);
    queued.ticket.fail(error);
  }
  // Host memory of the slots is borrowed until the uploads ended.
  last_uploading_job_.wait_ended(drain_remaining_ns());
}

// Null once the stop is requested and nothing is left that may run.
std::optional<Sequencer::QueuedJob> Sequencer::next(std::stop_token stop) {
  std::unique_lock lock(mutex_);
  // What is foreseen is not held: streams wait for it.
  const auto ready = [&] { return !queue_.empty() && (!held_ || foreseen_count_ > 0); };
  if (!ready()) {
    lock.unlock();
    uploads_.flush();
    lock.lock();
  }
  if (!changed_.wait(lock, stop, ready)) return std::nullopt;
  QueuedJob queued = std::move(queue_.front());
  queue_.pop_front();
  if (foreseen_count_ > 0) --foreseen_count_;
  return queued;
}

// Whether the update would only cost a copy more: the step's next job waits for nothing, or is the one that
// would take it up, whose factors are right behind its gradient.
bool Sequencer::saves_nothing(const QueuedJob& ahead) {
  std::lock_guard lock(mutex_);
  const auto next = std::ranges::find(queue_, Task::kUpdate, &QueuedJob::task);
  return next != queue_.end() &&
         (next->slot == ahead.slot || std::ranges::all_of(next->job.tickets, &Ticket::done));
}

void Sequencer::run_job(const QueuedJob& queued, std::stop_token stop) {
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
      foresee(queued);
      update(queued, end, stop);
    }
  } catch (...) {
    error = with_slot(queued.slot->parameter.name, stage, std::current_exception());
  }
  restore(*queued.slot);  // a job that did not get as far as its update takes nothing up
  job_count_.fetch_add(1, std::memory_order_relaxed);
  if (progress_) progress_->pass(queued.number);
  end->end_update(error);
}

// The job that is to be updated now, and those behind it for which nothing else is left to do either: none
// that uploads, and no upload of an earlier one, which might fail.
void Sequencer::foresee(const QueuedJob& next) {
  if (!progress_ || !uploads_.empty() || !last_uploading_job_.done()) return;
  if (!is_arithmetic(next)) return;
  std::vector<Ticket> foreseen{next.ticket};
  {
    std::lock_guard lock(mutex_);
    while (!held_ && foreseen_count_ < queue_.size() && is_arithmetic(queue_[foreseen_count_])) {
      foreseen.push_back(queue_[foreseen_count_++].ticket);
    }
  }
  for (const Ticket& ticket : foreseen)
    JobMark::of(ticket)->foresee();  // not under the lock: see Ticket::on_end
}

bool Sequencer::is_arithmetic(const QueuedJob& queued) {
  const ParameterSlot& slot = queued.slot->parameter;
  const auto went_well = [](const Ticket& ticket) { return ticket.done() && !ticket.error(); };
  return queued.task == Task::kUpdate && slot.device_weight == nullptr && !slot.on_disk &&
         queued.previous.done() && std::ranges::all_of(queued.job.tickets, went_well);
}

void Sequencer::update_ahead(const QueuedJob& queued, std::stop_token stop) {
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
bool Sequencer::take_up(Slot& slot, const StepJob& job, const std::vector<Factor>& factors) {
  if (!slot.ahead || !slot.ahead->is(job, factors)) {
    restore(slot);
    return false;
  }
  slot.ahead.reset();
  kept_count_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void Sequencer::restore(Slot& slot) noexcept {
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

void Sequencer::wait_ended(const Ticket& ticket, std::stop_token stop) {
  if (!ticket.done()) uploads_.flush();
  if (ticket.wait_ended(stop) || ticket.wait_ended(drain_remaining_ns())) return;
  throw Error(ErrorKind::kState, "the step pipeline was destroyed before that");
}

// Before the job waits for its gradient: the disk works meanwhile.
void Sequencer::read_ahead() {
  if (!window_) return;
  std::vector<ExpectedChunk> expected;
  {
    std::lock_guard lock(mutex_);
    expected.swap(expected_);
  }
  for (ExpectedChunk& chunk : expected) window_->expect(std::move(chunk));
  window_->read_ahead();
}

void Sequencer::update(const QueuedJob& queued, const std::shared_ptr<JobEnd>& end, std::stop_token stop) {
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

void Sequencer::update_from_disk(const QueuedJob& queued, const UpdateSpan& span,
                                 const std::vector<Factor>& factors, const std::shared_ptr<JobEnd>& end,
                                 std::stop_token stop) {
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
    end->add_write();
    written.on_end([end, name = slot.name](const std::exception_ptr& error) {
      end->end_write(error ? with_slot(name, "its states were not written", error) : nullptr);
    });
  }
}

Sequencer::Updating::Updating(Sequencer& owner, int64_t now_ns) : owner_(owner) {
  owner_.update_clock_ = owner_.update_clock_ - 2 * now_ns + 1;
}

Sequencer::Updating::~Updating() { owner_.update_clock_ = 2 * owner_.update_ns_until(monotonic_now_ns()); }

void Sequencer::update_span(const UpdateSpan& span, const QueuedJob& queued,
                            const std::vector<Factor>& factors) {
  const StepJob& job = queued.job;
  const int64_t start_ns = monotonic_now_ns();
  const Updating updating(*this, start_ns);
  if (span.count <= kInlineElements) {
    update_states(span, job.scalars, factors.data(), factors.size(), job.flush_denormals, active_isa());
  } else {
    update_states_parallel(WorkerPool::shared(), span, job.scalars, factors.data(), factors.size(),
                           job.flush_denormals, active_isa());
  }
  const int64_t end_ns = monotonic_now_ns();
  if (trace_is_on()) {
    const ParameterSlot& slot = queued.slot->parameter;
    record_trace(TraceLane::kHostUpdate, start_ns, end_ns, span.count * (slot.weight_bytes / slot.span.count),
                 {.name = slot.trace_name});
  }
}

// What is left of kDrainNs, counted from the first time that a dying pipeline would have to wait.
int64_t Sequencer::drain_remaining_ns() {
  if (!drain_deadline_ns_) drain_deadline_ns_ = monotonic_now_ns() + kDrainNs;
  return std::max<int64_t>(0, *drain_deadline_ns_ - monotonic_now_ns());
}

}  // namespace offload
