#include "pipeline/parameter_slot.h"

#include "base/error.h"

namespace offload {

UpdateSpan in_frame(UpdateSpan span, const StateLayout& layout, const StateChunk& chunk, char* frame) {
  const auto address = [&](StateArray array) {
    return layout.has(array) ? frame + chunk.array_offsets[static_cast<size_t>(array)] : nullptr;
  };
  if (char* master = address(StateArray::kMaster)) span.master = master;
  if (char* exp_avg = address(StateArray::kExpAvg)) span.exp_avg = reinterpret_cast<float*>(exp_avg);
  if (char* exp_avg_sq = address(StateArray::kExpAvgSq))
    span.exp_avg_sq = reinterpret_cast<float*>(exp_avg_sq);
  return span;
}

void place_weight(UpdateSpan& span, void* weight) {
  (span.weight != nullptr ? span.weight : span.master) = weight;
}

UpdateSpan span_to_check(const ParameterSlot& slot) {
  static char somewhere;
  if (!slot.on_disk) return slot.span;
  return in_frame(slot.span, slot.on_disk->layout, StateChunk(), &somewhere);
}

void check(const ParameterSlot& slot, const StateWindow* window) {
  const UpdateSpan span = span_to_check(slot);
  auto refuse = [&](const std::string& what) {
    throw Error(ErrorKind::kInvalidArgument, "slot '" + slot.name + "': " + what);
  };
  if (span.count == 0) return;
  if (span.master == nullptr || (span.exp_avg == nullptr && span.exp_avg_sq == nullptr)) {
    refuse("master, and exp_avg, exp_avg_sq or both, must be addresses of host memory, got null");
  }
  if (span.master_format == MasterFormat::kSplit &&
      (span.weight == nullptr || span.weight_format != FloatFormat::kBFloat16)) {
    refuse("a split master needs a bf16 working weight");
  }
  if (span.master_format == MasterFormat::kBFloat16 && (span.weight != nullptr || slot.on_disk)) {
    refuse("a bf16 master is the working weight: in host memory, and weight is null");
  }
  if (span.master_format == MasterFormat::kFloat32 && span.weight != nullptr &&
      span.weight_format == FloatFormat::kFloat32) {
    refuse(
        "beside a fp32 master the working weight is bf16 or fp16; give null when the master is the weight");
  }
  if (slot.on_disk) {
    if (window == nullptr) refuse("its states are on disk, and this pipeline has no window for them");
    if (slot.on_disk->layout.element_count() != span.count) refuse("its layout is for another count");
    try {
      window->check(slot.on_disk->layout);
    } catch (const Error& error) {
      refuse(error.what());
    }
  }
  if (slot.device_weight == nullptr) return;
  const bool master_on_disk = slot.on_disk && slot.on_disk->layout.has(StateArray::kMaster);
  if (slot.upload_source == nullptr && (!master_on_disk || slot.weight_bytes != span.count * 4)) {
    refuse("device_weight is given, so upload_source must be, too");
  }
  if (slot.weight_bytes != span.count * 2 && slot.weight_bytes != span.count * 4) {
    refuse("weight_bytes is " + std::to_string(slot.weight_bytes) + " for " + std::to_string(span.count) +
           " elements; it must be 2 or 4 an element");
  }
}

}  // namespace offload
