// The door of the step pipeline: slots and jobs are checked here, and Sequencer runs them.
//
// Ownership: owns the sequencer. Spans of a slot are borrowed until the slot's last ticket ended.
// Threads: every member may be called from any thread.
// Stream order: a job's uploads wait for what the compute stream had been given at submit (an earlier
//               backward may still read the weight).
// Invariants: after a job failed every later job fails with the same error, and submit throws kState.
//             A job whose gradient failed has not touched its states.
//             In a forked child submit throws kState and the destructor leaks instead of joining.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/fork_guard.h"
#include "base/ticket.h"
#include "pipeline/parameter_slot.h"
#include "pipeline/sequencer.h"
#include "pipeline/state_window.h"
#include "pipeline/step_job.h"
#include "transfer/transfer_queue.h"

namespace offload {

constexpr size_t kDefaultChunkElements = size_t{4} << 20;

struct StepStats : SequencerStats {
  uint64_t blocked_ns = 0;  // callers of wait() were blocked
  uint64_t exposed_ns = 0;  // and an update ran meanwhile
};

class StepPipeline {
 public:
  // `window`: null where no states are on disk. `run_ahead`: streams of the device wait for foreseen updates
  // of weights that are not uploaded here, if they can.
  explicit StepPipeline(std::shared_ptr<TransferQueue> transfers,
                        size_t chunk_elements = kDefaultChunkElements,
                        std::shared_ptr<StateWindow> window = nullptr, bool run_ahead = false);
  // Finishes what was submitted. What cannot end (a held sequencer or lane, a gradient that does not
  // land) is given up after a short while: those tickets fail, and destruction never hangs.
  ~StepPipeline();
  StepPipeline(const StepPipeline&) = delete;
  StepPipeline& operator=(const StepPipeline&) = delete;

  int64_t add_slot(ParameterSlot slot);

  // One ticket a job, done when the slot's weight is on the device and its states are on disk. Takes all
  // the jobs or, when one is not legal, none. `backwards`: each one's chunks from the last to the first.
  std::vector<Ticket> submit(std::vector<StepJob> jobs, uintptr_t compute_stream, bool backwards = false);

  // What a backup of the slot's states takes.
  size_t backup_bytes(int64_t slot);

  // Updates states in memory before the step that is expected, as [Note: updates ahead of the step] says;
  // nothing is uploaded. The ticket is done when gradient and backup are no longer used; it does not fail by
  // itself.
  Ticket speculate(StepJob job, void* backup);

  // The states of these slots are what their last jobs made them once the ticket is done.
  Ticket discard(const std::vector<int64_t>& slots);

  // The slot's states on disk were written by somebody else: what the window still has of them is not used.
  void states_written(int64_t slot);

  // Blocks the host until the tickets ended; counts the time as blocked, and as exposed while an update ran.
  // Throws with the slot's name. A negative timeout waits for ever; returns false when the timeout passed
  // first.
  bool wait(const std::vector<Ticket>& tickets, int64_t timeout_ns = -1);

  // Of a job: ends when its weight is updated, and on the device where it has a place there, and fails with
  // the job's error of then; its states may be on their way to disk. Another ticket is returned as it is.
  static Ticket weight(const Ticket& ticket);

  StepStats stats() const noexcept;

  // Why they do not; empty: they do, or nobody asked for it.
  const std::string& run_ahead_refusal() const noexcept { return run_ahead_refusal_; }

  // The sequencer starts no further job until release(), but for those that streams may wait for: for tests.
  void hold();
  void release();

 private:
  const ForkGuard owner_;
  const std::shared_ptr<TransferQueue> transfers_;
  const size_t chunk_elements_;
  const std::shared_ptr<StateWindow> window_;  // the sequencer's: slots are checked against its frames
  std::atomic<uint64_t> blocked_ns_{0};
  std::atomic<uint64_t> exposed_ns_{0};
  std::string run_ahead_refusal_;
  std::unique_ptr<Sequencer> sequencer_;
};

}  // namespace offload
