// gradient landed, states read -> optimizer -> to_device, to disk: the only file that knows both sides.
//
// Ownership: owns one sequencer thread; shares queue and window. Spans of a slot are borrowed until the
//            slot's last ticket ended.
// Threads: submit and wait may be called from any thread. The sequencer runs jobs in submission order,
//          each on the shared WorkerPool, and hands every finished chunk to the to_device lane. A slot's
//          next update waits for its last upload, which still reads the weight.
// Stream order: a job's uploads wait for what the compute stream had been given at submit (an earlier
//               backward may still read the weight).
// Invariants: after a job failed every later job fails with the same error, and submit throws kState.
//             A job whose gradient failed has not touched its states.
//             In a forked child submit throws kState and the destructor leaks instead of joining.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/ticket.h"
#include "pipeline/parameter_slot.h"
#include "pipeline/state_window.h"
#include "pipeline/step_job.h"
#include "transfer/transfer_queue.h"

namespace offload {

constexpr size_t kDefaultChunkElements = size_t{4} << 20;

struct StepStats {
  uint64_t job_count = 0;
  uint64_t update_ns = 0;        // the sequencer was updating
  uint64_t blocked_ns = 0;       // callers of wait() were blocked
  uint64_t kept_count = 0;       // updates ahead of the step that a job took up
  uint64_t discarded_count = 0;  // and those that were undone
  WindowStats window;            // of states on disk
};

class StepPipeline {
 public:
  // `window`: null where no states are on disk.
  explicit StepPipeline(std::shared_ptr<TransferQueue> transfers,
                        size_t chunk_elements = kDefaultChunkElements,
                        std::shared_ptr<StateWindow> window = nullptr);
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

  // Blocks the host until the tickets ended; counts the time as blocked. Throws with the slot's name.
  // A negative timeout waits for ever; returns false when the timeout passed first.
  bool wait(const std::vector<Ticket>& tickets, int64_t timeout_ns = -1);

  StepStats stats() const noexcept;

  // The sequencer starts no further job until release(): for tests.
  void hold();
  void release();

 private:
  class Sequencer;
  std::unique_ptr<Sequencer> sequencer_;
};

}  // namespace offload
