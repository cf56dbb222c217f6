// An update that was begun before its job may run, and can be undone to the byte.
//
// [Note: updates ahead of the step] The states are updated in place, behind a backup of what they were. The
// slot's next job takes the update up when it is the same: of the same weight and gradient, whose bytes
// nobody has changed, in the same format, mode and with the same scalars, and with factors that are 1, as
// clipping gives for gradients that it leaves alone. Otherwise, and when it is discarded, the states become
// what they were. A gradient that fails touches none. Jobs may be submitted before the updates ahead of them
// have begun, as a thread that is far ahead of its accelerator does: they begin for as long as the step's
// next job must wait.
//
// Ownership: borrows states, backup and what the job borrows.
// Threads: the sequencer's alone; copies run on the shared WorkerPool.
#pragma once

#include <cstddef>
#include <vector>

#include "pipeline/step_job.h"

namespace offload {

class UpdateAhead {
 public:
  // What a backup of these states takes, in bytes.
  static size_t backup_bytes(const UpdateSpan& states);

  UpdateAhead(StepJob job, const UpdateSpan& states, void* backup);

  // Comes before the update of these elements; the ranges follow one another. With int8 moments they begin at
  // multiples of kMomentBlock.
  void keep(size_t begin, size_t count);

  // Whether the job would give the same bits; `factors` are its factors with their values.
  bool is(const StepJob& job, const std::vector<Factor>& factors) const;

  void undo() const;

 private:
  StepJob job_;
  UpdateSpan states_;
  UpdateSpan backup_;
  size_t kept_count_ = 0;
};

}  // namespace offload
