// One parameter as the step pipeline knows it: where its states and its weights are.
//
// Ownership: borrows all memory.
// Invariants: what check() has passed needs no further look in a step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "optimizer/update.h"
#include "pipeline/state_layout.h"
#include "pipeline/state_window.h"

namespace offload {

struct StatesOnDisk {
  StateLayout layout;
  uint64_t offset;  // in the window's file
};

struct ParameterSlot {
  std::string name;           // for errors: "unit/parameter"
  UpdateSpan span;            // null what is on disk; gradient and gradient_format are given per job
  const void* upload_source;  // the working weight on the host; null: the master, which is on disk
  void* device_weight;        // null: nothing is uploaded
  size_t weight_bytes;
  std::optional<StatesOnDisk> on_disk = std::nullopt;
  uint32_t trace_name = 0;  // see TraceLabel
};

// The span with the arrays that are on disk where `frame` has those of `chunk`.
UpdateSpan in_frame(UpdateSpan span, const StateLayout& layout, const StateChunk& chunk, char* frame);

// The span with the weight on the host at `weight`: it is the master where it has none beside it.
void place_weight(UpdateSpan& span, void* weight);

// The span as the update will see it; what is on disk is anywhere but null.
UpdateSpan span_to_check(const ParameterSlot& slot);

// Throws kInvalidArgument naming the slot. `window`: what states on disk pass through, null: nothing.
void check(const ParameterSlot& slot, const StateWindow* window);

}  // namespace offload
