// One update of one parameter, as it is submitted to the step pipeline.
//
// Ownership: borrows the gradient, the factors and the weight until the job's ticket has ended.
// Threads: a plain value.
#pragma once

#include <cstdint>
#include <vector>

#include "base/ticket.h"
#include "optimizer/update.h"

namespace offload {

// A factor whose value may still be on its way: read from `address` once the job's tickets are done.
struct PendingFactor {
  FactorKind kind;
  const float* address;  // null: use value
  float value;
};

struct StepJob {
  int64_t slot;
  const void* gradient;
  FloatFormat gradient_format;
  std::vector<Ticket> tickets;  // of the gradient and of the factors: all must have landed
  UpdateScalars scalars;
  std::vector<PendingFactor> factors;
  bool flush_denormals;
  void* weight = nullptr;  // where the slot's weight on the host is for this job; null: where the slot says
};

}  // namespace offload
