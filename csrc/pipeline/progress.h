// How far a pipeline's jobs have come, in a word that streams wait for: [Note: streams that wait for the
// host].
//
// Ownership: owns the page with the word; shared by the sequencer and the tickets of its jobs' weights.
// Threads: the sequencer's thread writes the word, devices read it.
// Invariants: the word only counts up, and wraps round. It comes to the value of every job that is submitted.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/ticket.h"
#include "device/device.h"
#include "memory/host_pages.h"

namespace offload {

class Progress {
 public:
  explicit Progress(std::shared_ptr<Device> device)
      : page_(sizeof(uint32_t), HostPages::page_bytes(), {.huge_pages = false}, device),
        refusal_(device->why_no_word(word())) {}

  const std::string& refusal() const noexcept { return refusal_; }  // empty: streams wait for the word
  const uint32_t* word() const noexcept { return reinterpret_cast<const uint32_t*>(page_.address()); }

  static uint32_t value_after(uint64_t job_number) noexcept { return static_cast<uint32_t>(job_number + 1); }

  // The jobs up to this one are over, and what they wrote is there for whoever sees the word.
  void pass(uint64_t job_number) noexcept {
    std::atomic_ref(*reinterpret_cast<uint32_t*>(page_.address()))
        .store(value_after(job_number), std::memory_order_release);
  }

 private:
  const HostPages page_;
  const std::string refusal_;
};

// Of the ticket of a job's weight.
class WeightMark final : public HostWorkMark {
 public:
  WeightMark(std::shared_ptr<const Progress> progress, uint64_t job_number)
      : progress_(std::move(progress)), value_(Progress::value_after(job_number)) {}

  const Ticket& foreseen() const noexcept override { return foreseen_; }
  const uint32_t* word() const noexcept override { return progress_->word(); }
  uint32_t value() const noexcept override { return value_; }

 private:
  const std::shared_ptr<const Progress> progress_;
  const uint32_t value_;
  const Ticket foreseen_ = Ticket::pending();
};

}  // namespace offload
