#include "pipeline/update_ahead.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "base/worker_pool.h"

namespace offload {
namespace {

// Each array of a backup begins at a cache line.
constexpr size_t kArrayAlignment = 64;

// Several a worker of what a chunk has, and long enough for a copy to stream.
constexpr size_t kPieceBytes = size_t{1} << 20;

size_t padded(size_t bytes) { return (bytes + kArrayAlignment - 1) / kArrayAlignment * kArrayAlignment; }

// visit(address, bytes) for each array of the span that an update writes to; it may change the address.
template <typename Visit>
void for_each_state(UpdateSpan& span, Visit visit) {
  const auto state = [&](auto& address, size_t bytes) {
    if (address != nullptr) visit(address, bytes);
  };
  const size_t moment_bytes = span.count * element_bytes(span.moment_format);
  const size_t scale_bytes = (span.count + kMomentBlock - 1) / kMomentBlock * sizeof(float);
  state(span.master, span.count * element_bytes(span.master_format));
  state(span.weight, span.count * element_bytes(span.weight_format));
  state(span.exp_avg, moment_bytes);
  state(span.exp_avg_sq, moment_bytes);
  state(span.exp_avg_scales, scale_bytes);
  state(span.exp_avg_sq_scales, scale_bytes);
}

// The span with each of its states in the backup: slices of both are copied to each other.
UpdateSpan in_backup(UpdateSpan span, void* backup) {
  char* next = static_cast<char*>(backup);
  for_each_state(span, [&](auto& address, size_t bytes) {
    address = reinterpret_cast<std::remove_reference_t<decltype(address)>>(next);
    next += padded(bytes);
  });
  return span;
}

// Copies what an update of `from` writes to; `to` has the same arrays.
void copy_states(const UpdateSpan& from, const UpdateSpan& to) {
  struct Piece {
    const char* source;
    char* destination;
    size_t bytes;
  };
  std::vector<Piece> pieces;
  std::vector<char*> destinations;
  UpdateSpan sources = from, targets = to;
  for_each_state(targets,
                 [&](auto& address, size_t) { destinations.push_back(reinterpret_cast<char*>(address)); });
  size_t array = 0;
  for_each_state(sources, [&](auto& address, size_t bytes) {
    const char* const source = reinterpret_cast<const char*>(address);
    char* const destination = destinations[array++];
    for (size_t at = 0; at < bytes; at += kPieceBytes) {
      pieces.push_back({source + at, destination + at, std::min(kPieceBytes, bytes - at)});
    }
  });
  const auto copy = [&](size_t i) { std::memcpy(pieces[i].destination, pieces[i].source, pieces[i].bytes); };
  // Arrays of one piece each are copied sooner than the workers wake.
  if (pieces.size() > destinations.size()) return WorkerPool::shared().parallel_for(pieces.size(), copy);
  for (size_t i = 0; i < pieces.size(); ++i) copy(i);
}

}  // namespace

size_t UpdateAhead::backup_bytes(const UpdateSpan& states) {
  size_t total = 0;
  UpdateSpan all = states;
  for_each_state(all, [&](auto&, size_t bytes) { total += padded(bytes); });
  return total;
}

UpdateAhead::UpdateAhead(StepJob job, const UpdateSpan& states, void* backup)
    : job_(std::move(job)), states_(states), backup_(in_backup(states, backup)) {}

void UpdateAhead::keep(size_t begin, size_t count) {
  copy_states(slice(states_, begin, count), slice(backup_, begin, count));
  kept_count_ = begin + count;
}

bool UpdateAhead::is(const StepJob& job, const std::vector<Factor>& factors) const {
  const auto is_one = [](const Factor& factor) { return factor.value == 1.0f; };
  return kept_count_ == states_.count && job_.weight == job.weight && job_.gradient == job.gradient &&
         job_.gradient_format == job.gradient_format && job_.scalars == job.scalars &&
         job_.flush_denormals == job.flush_denormals &&
         (factors.empty() || (!job.flush_denormals && std::all_of(factors.begin(), factors.end(), is_one)));
}

void UpdateAhead::undo() const {
  copy_states(slice(backup_, 0, kept_count_), slice(states_, 0, kept_count_));
}

}  // namespace offload
