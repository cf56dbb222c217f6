// Updated weights on their way to the device: large ones at once, small ones several in one submission, for
// what a small copy costs is its submission.
//
// Ownership: shares the queue. Memory of a weight is borrowed until its part of the job has ended.
// Threads: used by the sequencer's thread alone.
// Invariants: whoever is about to block, or to begin a long update, calls flush() first: a weight may wait
//             for the update of other small ones, and for nothing else. flush() comes before destruction.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/job_end.h"
#include "transfer/transfer_queue.h"

namespace offload {

class WeightUploads {
 public:
  // A copy of 256 KiB takes about as long as two submissions.
  static constexpr size_t kSmallBytes = size_t{256} << 10;

  explicit WeightUploads(std::shared_ptr<TransferQueue> transfers) : transfers_(std::move(transfers)) {}

  // The copy is a part of the job that ends with `end`; its error has the parameter's name. Throws what
  // refuses it; then nothing was begun.
  Ticket submit(const std::string& name, const CopySpan& copy, const std::shared_ptr<JobEnd>& end);

  // The same at flush(), or before.
  void add_small(const std::string& name, const CopySpan& copy, const std::shared_ptr<JobEnd>& end);
  void flush() noexcept;
  bool empty() const noexcept { return copies_.empty(); }  // nothing waits for flush()

 private:
  // A copy's part of its job. The name is copied: the lane may end after the pipeline.
  struct Part {
    std::string name;
    std::shared_ptr<JobEnd> end;

    void operator()(const std::exception_ptr& error) const;
  };

  const std::shared_ptr<TransferQueue> transfers_;
  std::vector<CopySpan> copies_;
  std::vector<Part> parts_;  // of copies_
};

}  // namespace offload
