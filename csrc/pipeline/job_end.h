// How a job of the step pipeline ends: when all its parts have, and with the first error of the pipeline.
//
// Ownership: shared by the sequencer and by the callbacks of the uploads, which may outlive the pipeline.
// Threads: every member may be called from any thread.
// Invariants: a job fails exactly when it or a job submitted before it has failed by itself.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/ticket.h"
#include "pipeline/progress.h"

namespace offload {

// The same error, of the same kind, with the parameter and what it was doing in front.
inline std::exception_ptr with_slot(const std::string& slot, const char* stage,
                                    const std::exception_ptr& error) {
  const std::string prefix = "parameter '" + slot + "': " + stage + ": ";
  try {
    std::rethrow_exception(error);
  } catch (const Error& cause) {
    return std::make_exception_ptr(Error(cause.kind(), prefix + cause.what(), cause.system_code()));
  } catch (const std::exception& cause) {
    return std::make_exception_ptr(Error(ErrorKind::kInternal, prefix + cause.what()));
  }
}

// The error of the first job, in submission order, that failed by itself.
class FirstError {
 public:
  // What the job must end with; null when no job up to it has failed.
  std::exception_ptr up_to(uint64_t job_number) const {
    std::lock_guard lock(mutex_);
    return job_number_ <= job_number ? error_ : nullptr;
  }

  std::exception_ptr any() const { return up_to(UINT64_MAX); }

  void record(uint64_t job_number, std::exception_ptr error) {
    std::lock_guard lock(mutex_);
    if (error_ && job_number_ <= job_number) return;
    job_number_ = job_number;
    error_ = std::move(error);
  }

 private:
  mutable std::mutex mutex_;
  // guarded by mutex_
  uint64_t job_number_ = 0;
  std::exception_ptr error_;
};

// What a job's ticket knows beside its own end.
class JobMark final : public TicketMark {
 public:
  // `progress`: null where no stream waits for the host.
  JobMark(const std::shared_ptr<const Progress>& progress, uint64_t job_number)
      : weight_(Ticket::pending(progress ? std::make_shared<WeightMark>(progress, job_number) : nullptr)) {}

  // The mark of a ticket if it is a job's, else null.
  static const JobMark* of(const Ticket& ticket) noexcept { return dynamic_cast<JobMark*>(ticket.mark()); }

  // See StepPipeline::weight.
  const Ticket& weight() const noexcept { return weight_; }

  // What is left of the job is arithmetic on the host.
  void foresee() const noexcept {
    if (const HostWorkMark* work = HostWorkMark::of(weight_)) work->foreseen().complete();
  }

  void end_weight(std::exception_ptr error) const noexcept {
    weight_.fail(std::move(error));  // first: who finds it foreseen finds how it ended
    foresee();
  }

 private:
  const Ticket weight_;
};

// Ends a job's ticket when its update, every upload and every write have ended, and that of its weight before
// the writes.
class JobEnd {
 public:
  // `ticket`: has a JobMark.
  JobEnd(Ticket ticket, uint64_t job_number, std::shared_ptr<FirstError> first_error)
      : ticket_(std::move(ticket)),
        mark_(*JobMark::of(ticket_)),
        job_number_(job_number),
        first_error_(std::move(first_error)) {}

  void add_upload() { weight_parts_.fetch_add(1, std::memory_order_relaxed); }
  void end_upload(std::exception_ptr error) { end_weight_part(std::move(error)); }
  void end_update(std::exception_ptr error) { end_weight_part(std::move(error)); }

  void add_write() { parts_.fetch_add(1, std::memory_order_relaxed); }
  void end_write(std::exception_ptr error) { end_part(std::move(error)); }

 private:
  void end_weight_part(std::exception_ptr error) {
    if (error) first_error_->record(job_number_, std::move(error));
    if (weight_parts_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    end_part(nullptr);  // first: where nothing is written, who has waited for the weight finds the job ended
    mark_.end_weight(first_error_->up_to(job_number_));
  }

  void end_part(std::exception_ptr error) {
    if (error) first_error_->record(job_number_, std::move(error));
    if (parts_.fetch_sub(1, std::memory_order_acq_rel) == 1) ticket_.fail(first_error_->up_to(job_number_));
  }

  const Ticket ticket_;
  const JobMark& mark_;  // the ticket has it
  const uint64_t job_number_;
  const std::shared_ptr<FirstError> first_error_;
  std::atomic<size_t> weight_parts_{1};  // the update, and uploads
  std::atomic<size_t> parts_{1};         // the weight, and writes
};

}  // namespace offload
