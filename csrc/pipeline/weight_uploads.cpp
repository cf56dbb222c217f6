#include "pipeline/weight_uploads.h"

#include "base/trace_ring.h"
#include "memory/host_pool.h"

namespace offload {
namespace {

// More would save little, and the first of them would wait for the updates of the others.
constexpr size_t kBatchCount = 16;

}  // namespace

void WeightUploads::Part::operator()(const std::exception_ptr& error) const {
  end->end_upload(error ? with_slot(name, "its upload failed", error) : nullptr);
}

Ticket WeightUploads::submit(const std::string& name, const CopySpan& copy,
                             const std::shared_ptr<JobEnd>& end) {
  const Ticket ticket = transfers_->submit_after(Direction::kToDevice, {&copy, 1}, Ticket());
  end->add_upload();
  ticket.on_end(Part{name, end});
  return ticket;
}

void WeightUploads::add_small(const std::string& name, const CopySpan& copy,
                              const std::shared_ptr<JobEnd>& end) {
  copies_.push_back(copy);
  parts_.push_back({name, end});
  end->add_upload();
  if (copies_.size() == kBatchCount) flush();
}

void WeightUploads::flush() noexcept {
  if (copies_.empty()) return;
  const auto end_all = [parts = std::exchange(parts_, {})](const std::exception_ptr& error) {
    for (const Part& part : parts) part(error);
  };
  const std::vector<CopySpan> copies = std::exchange(copies_, {});
  const TraceLabelled traced({.kind = traced_kind(Tag::kWeights)});  // of several parameters
  try {
    transfers_->submit_after(Direction::kToDevice, copies, Ticket()).on_end(end_all);
  } catch (...) {
    end_all(std::current_exception());
  }
}

}  // namespace offload
