// The thread of a step pipeline, and what it shares with the callers: gradient landed, states read ->
// optimizer -> to_device, to disk. The only file that knows both sides.
//
// Ownership: owns the thread; shares queue and window. Spans of a slot are borrowed until the slot's last
//            ticket ended.
// Threads: every member may be called from any thread. The thread runs what it was given in that order, each
//          update on the shared WorkerPool, and hands every finished chunk to the to_device lane. A slot's
//          next update waits for its last upload, which still reads the weight.
// Invariants: slots and jobs were checked by StepPipeline, and the process is the one that made it. After a
//             job failed every later job fails with the same error.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <thread>
#include <vector>

#include "base/ticket.h"
#include "pipeline/job_end.h"
#include "pipeline/parameter_slot.h"
#include "pipeline/progress.h"
#include "pipeline/state_window.h"
#include "pipeline/step_job.h"
#include "pipeline/update_ahead.h"
#include "pipeline/weight_uploads.h"
#include "transfer/transfer_queue.h"

namespace offload {

struct SequencerStats {
  uint64_t job_count = 0;
  uint64_t update_ns = 0;        // the thread was updating
  uint64_t kept_count = 0;       // updates ahead of the step that a job took up
  uint64_t discarded_count = 0;  // and those that were undone
  WindowStats window;            // of states on disk
};

class Sequencer {
 public:
  // `window`: null where no states are on disk. `progress`: null where no stream waits for the host. The
  // thread begins with the first job.
  Sequencer(std::shared_ptr<TransferQueue> transfers, size_t chunk_elements,
            std::shared_ptr<StateWindow> window, std::shared_ptr<Progress> progress);

  int64_t add_slot(ParameterSlot slot);
  // Throws kInvalidArgument for a number that add_slot() did not give. A slot never moves or changes.
  const ParameterSlot& slot(int64_t number);

  // See StepPipeline.
  std::vector<Ticket> submit(std::vector<StepJob> jobs, bool backwards);
  Ticket speculate(StepJob job, void* backup);
  Ticket discard(const std::vector<int64_t>& slots);
  void states_written(int64_t slot);
  void set_held(bool held);

  // What every later job fails with; null while none failed.
  std::exception_ptr error() const { return first_error_->any(); }
  SequencerStats stats() const noexcept;
  // Of SequencerStats::update_ns, with what has passed by `now_ns` of an update that runs.
  int64_t update_ns_until(int64_t now_ns) const noexcept;

 private:
  struct Slot {
    ParameterSlot parameter;
    Ticket last_job;
    uint64_t version = 0;              // of its states on disk: how often others wrote them
    std::optional<UpdateAhead> ahead;  // that no job has taken up; used by the thread alone
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

  // Counts as updating while it lives.
  class Updating {
   public:
    Updating(Sequencer& owner, int64_t now_ns);
    ~Updating();
    Updating(const Updating&) = delete;
    Updating& operator=(const Updating&) = delete;

   private:
    Sequencer& owner_;
  };

  Slot& slot_of(int64_t number);
  void expect_chunks(int64_t number, const Slot& slot, bool backwards);
  void require_thread();
  void forget_what_has_not_begun(const Slot& slot, std::vector<Ticket>& forgotten);

  // the thread's
  void run(std::stop_token stop);
  std::optional<QueuedJob> next(std::stop_token stop);
  bool saves_nothing(const QueuedJob& ahead);
  void run_job(const QueuedJob& queued, std::stop_token stop);
  void foresee(const QueuedJob& next);
  static bool is_arithmetic(const QueuedJob& queued);
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

  const size_t chunk_elements_;
  const std::shared_ptr<StateWindow> window_;  // used by the thread alone; may be null
  const std::shared_ptr<Progress> progress_;   // may be null
  const std::shared_ptr<FirstError> first_error_ = std::make_shared<FirstError>();

  std::atomic<uint64_t> job_count_{0};
  // Twice the nanoseconds of the updates that ended. While one runs: twice those less when it began, and 1
  // more. One number, so that whoever reads it sees either.
  std::atomic<int64_t> update_clock_{0};
  std::atomic<uint64_t> kept_count_{0};
  std::atomic<uint64_t> discarded_count_{0};

  // used by the thread alone
  WeightUploads uploads_;
  Ticket last_uploading_job_;  // the lane is ordered: when it ended, every upload has
  std::optional<int64_t> drain_deadline_ns_;

  std::mutex mutex_;
  std::condition_variable_any changed_;
  // guarded by mutex_
  std::deque<Slot> slots_;  // never shrinks: queued jobs point into it
  std::deque<QueuedJob> queue_;
  size_t foreseen_count_ = 0;            // of the first ones in the queue
  std::vector<ExpectedChunk> expected_;  // of queued jobs; the window does not know of them yet
  uint64_t next_number_ = 0;
  bool held_ = false;

  std::jthread thread_;  // last: its destructor requests the stop and joins while the rest still lives
};

}  // namespace offload
