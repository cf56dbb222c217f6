#include "pipeline/step_pipeline.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/trace_ring.h"
#include "pipeline/job_end.h"
#include "pipeline/update_ahead.h"

namespace offload {
namespace {

void check_job(const ParameterSlot& slot, const StepJob& job) {
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

}  // namespace

StepPipeline::StepPipeline(std::shared_ptr<TransferQueue> transfers, size_t chunk_elements,
                           std::shared_ptr<StateWindow> window, bool run_ahead)
    : transfers_(std::move(transfers)), chunk_elements_(chunk_elements), window_(std::move(window)) {
  if (!transfers_) throw Error(ErrorKind::kInvalidArgument, "StepPipeline needs a TransferQueue, got null");
  if (chunk_elements == 0)
    throw Error(ErrorKind::kInvalidArgument, "chunk_elements is 0; it must be positive");
  std::shared_ptr<Progress> progress;
  if (run_ahead && window_) {
    run_ahead_refusal_ = "states are on disk";
  } else if (run_ahead) {
    progress = std::make_shared<Progress>(transfers_->device());
    run_ahead_refusal_ = progress->refusal();
    if (!run_ahead_refusal_.empty()) progress = nullptr;
  }
  sequencer_ = std::make_unique<Sequencer>(transfers_, chunk_elements_, window_, std::move(progress));
}

StepPipeline::~StepPipeline() {
  // Leaked on purpose in a forked child: there is no thread to join, and its locks may be held.
  if (owner_.forked()) static_cast<void>(sequencer_.release());
}

int64_t StepPipeline::add_slot(ParameterSlot slot) {
  owner_.require_owner("this StepPipeline");
  check(slot, window_.get());
  if (slot.span.moment_format == MomentFormat::kInt8 && chunk_elements_ % kMomentBlock != 0) {
    throw Error(ErrorKind::kInvalidArgument,
                "slot '" + slot.name +
                    "': int8 moments need chunk_elements that are a multiple of 256, not " +
                    std::to_string(chunk_elements_));
  }
  return sequencer_->add_slot(std::move(slot));
}

std::vector<Ticket> StepPipeline::submit(std::vector<StepJob> jobs, uintptr_t compute_stream,
                                         bool backwards) {
  owner_.require_owner("this StepPipeline");
  if (std::exception_ptr error = sequencer_->error()) {
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
  bool uploads = false;
  for (const StepJob& job : jobs) {
    const ParameterSlot& slot = sequencer_->slot(job.slot);
    check_job(slot, job);
    uploads |= slot.device_weight != nullptr;
  }
  // Now and not when a chunk is ready: by then the compute stream may already hold the next forward,
  // which waits for these very uploads.
  if (uploads) transfers_->wait_compute(Direction::kToDevice, compute_stream);
  return sequencer_->submit(std::move(jobs), backwards);
}

size_t StepPipeline::backup_bytes(int64_t slot) {
  owner_.require_owner("this StepPipeline");
  return UpdateAhead::backup_bytes(sequencer_->slot(slot).span);
}

Ticket StepPipeline::speculate(StepJob job, void* backup) {
  owner_.require_owner("this StepPipeline");
  const ParameterSlot& slot = sequencer_->slot(job.slot);
  check_job(slot, job);
  if (backup == nullptr || slot.on_disk || job.weight != nullptr || !job.factors.empty()) {
    throw Error(
        ErrorKind::kInvalidArgument,
        "slot '" + slot.name +
            "': an update ahead of the step needs a backup, states that stay in memory, and a gradient "
            "without factors");
  }
  return sequencer_->speculate(std::move(job), backup);
}

Ticket StepPipeline::discard(const std::vector<int64_t>& slots) {
  owner_.require_owner("this StepPipeline");
  return sequencer_->discard(slots);
}

void StepPipeline::states_written(int64_t slot) {
  owner_.require_owner("this StepPipeline");
  sequencer_->states_written(slot);
}

bool StepPipeline::wait(const std::vector<Ticket>& tickets, int64_t timeout_ns) {
  const auto pending = [](const Ticket& ticket) { return !ticket.done(); };
  if (std::any_of(tickets.begin(), tickets.end(), pending)) {
    const int64_t start_ns = monotonic_now_ns();
    const int64_t updated_before_ns = sequencer_->update_ns_until(start_ns);
    bool ended = true;
    for (const Ticket& ticket : tickets) {
      const int64_t waited_ns = monotonic_now_ns() - start_ns;
      ended = ticket.wait_ended(timeout_ns < 0 ? -1 : std::max<int64_t>(0, timeout_ns - waited_ns));
      if (!ended) break;
    }
    const int64_t end_ns = monotonic_now_ns();
    blocked_ns_.fetch_add(static_cast<uint64_t>(end_ns - start_ns));
    // An update that began after `start_ns` was read may be a little ahead of it, or behind `end_ns`.
    const int64_t updated_ns = sequencer_->update_ns_until(end_ns) - updated_before_ns;
    exposed_ns_.fetch_add(static_cast<uint64_t>(std::clamp<int64_t>(updated_ns, 0, end_ns - start_ns)));
    if (trace_is_on()) {
      record_trace(TraceLane::kWait, start_ns, end_ns, 0, {.name = trace_label().name});
    }
    if (!ended) return false;
  }
  for (const Ticket& ticket : tickets) ticket.wait();  // all have ended: rethrows the first error
  return true;
}

Ticket StepPipeline::weight(const Ticket& ticket) {
  const JobMark* mark = JobMark::of(ticket);
  return mark == nullptr ? ticket : mark->weight();
}

StepStats StepPipeline::stats() const noexcept { return {sequencer_->stats(), blocked_ns_, exposed_ns_}; }

void StepPipeline::hold() {
  owner_.require_owner("this StepPipeline");
  sequencer_->set_held(true);
}

void StepPipeline::release() {
  owner_.require_owner("this StepPipeline");
  sequencer_->set_held(false);
}

}  // namespace offload
