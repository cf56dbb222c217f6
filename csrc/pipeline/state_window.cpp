#include "pipeline/state_window.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/trace_ring.h"

namespace offload {
namespace {

Ticket failed(std::exception_ptr error) {
  const Ticket ticket = Ticket::pending();
  ticket.fail(std::move(error));
  return ticket;
}

HostBuffer acquire_frames(HostPool& pool, size_t frame_bytes, size_t frame_count) {
  if (frame_bytes == 0 || frame_bytes % kDiskAlignment != 0 || frame_count == 0 ||
      frame_count > SIZE_MAX / frame_bytes) {
    throw Error(ErrorKind::kInvalidArgument,
                "a window of " + std::to_string(frame_count) + " frames of " + std::to_string(frame_bytes) +
                    " bytes: give one frame or more, of a multiple of " + std::to_string(kDiskAlignment));
  }
  return pool.acquire(frame_bytes * frame_count, Tag::kWindow, kDiskAlignment);
}

}  // namespace

struct StateWindow::Frame {
  char* address = nullptr;
  std::optional<ChunkKey> holds;  // whose bytes are in it, or on their way into it
  StateChunk chunk;
  TraceLabel label;
  bool is_assigned = false;  // to a chunk that is not written back yet
  uint64_t last_use = 0;
  Ticket read;
  Ticket write;
  Ticket upload;

  bool is_idle() const noexcept { return !is_assigned && write.done() && upload.done(); }
};

StateWindow::StateWindow(std::shared_ptr<BlockFile> file, HostPool& pool, size_t frame_bytes,
                         size_t frame_count)
    : file_(std::move(file)),
      frame_bytes_(frame_bytes),
      memory_(acquire_frames(pool, frame_bytes, frame_count)),
      frames_(frame_count) {
  for (size_t i = 0; i < frame_count; ++i) {
    frames_[i].address = static_cast<char*>(memory_.address()) + i * frame_bytes;
  }
}

StateWindow::~StateWindow() {
  for (const Frame& frame : frames_) {
    for (const Ticket& ticket : {frame.read, frame.write, frame.upload}) memory_.release_after(ticket);
  }
}

void StateWindow::check(const StateLayout& layout) const {
  if (layout.chunk_bytes() <= frame_bytes_) return;
  throw Error(ErrorKind::kInvalidArgument, "its chunks take " + std::to_string(layout.chunk_bytes()) +
                                               " bytes, a frame of the window has " +
                                               std::to_string(frame_bytes_));
}

void StateWindow::read_ahead() {
  while (!expected_.empty()) {
    const ExpectedChunk& next = expected_.front();
    Frame* const frame = frame_for(next.key);
    if (frame == nullptr) return;
    frame->is_assigned = true;
    if (frame->holds == next.key) {
      kept_bytes_.fetch_add(next.chunk.bytes, std::memory_order_relaxed);
    } else {
      frame->holds = next.key;
      frame->chunk = next.chunk;
      frame->label = {.name = next.trace_name, .kind = traced_kind(Tag::kWindow)};
      const TraceLabelled traced(frame->label);
      try {
        frame->read = file_->submit_read(next.chunk.offset, frame->address, next.chunk.bytes);
        read_bytes_.fetch_add(next.chunk.bytes, std::memory_order_relaxed);
      } catch (...) {  // told to whoever takes the chunk: this may be the turn of another parameter
        frame->read = failed(std::current_exception());
      }
    }
    assigned_.push_back(frame);
    expected_.pop_front();
  }
}

// The frame that has the chunk, else the one that was idle for longest; null: there is none yet.
StateWindow::Frame* StateWindow::frame_for(const ChunkKey& key) {
  Frame* best = nullptr;
  for (Frame& frame : frames_) {
    // Its own write may be under way: take() waits for that. Nobody may have two frames for one chunk.
    if (frame.holds == key) return frame.is_assigned ? nullptr : &frame;
    if (frame.is_idle() && (best == nullptr || frame.last_use < best->last_use)) best = &frame;
  }
  return best;
}

StateWindow::Frame& StateWindow::take(const Wait& wait) {
  read_ahead();
  const int64_t start_ns = monotonic_now_ns();
  while (assigned_.empty()) {
    if (!wait_for_a_frame(wait)) throw Error(ErrorKind::kInternal, "a chunk was taken that nobody expected");
    read_ahead();
  }
  Frame& frame = *assigned_.front();
  for (const Ticket& ticket : {frame.read, frame.write, frame.upload}) wait(ticket);
  wait_ns_.fetch_add(static_cast<uint64_t>(monotonic_now_ns() - start_ns), std::memory_order_relaxed);
  assigned_.pop_front();
  // It is told how its read ended. A write that failed is told to the job that it was part of.
  frame.read.wait();
  return frame;
}

// Waits until the frame that was written back first is free. False: nothing is expected.
bool StateWindow::wait_for_a_frame(const Wait& wait) {
  if (expected_.empty()) return false;
  const auto oldest = std::min_element(frames_.begin(), frames_.end(), [](const Frame& a, const Frame& b) {
    return std::pair(a.is_assigned, a.last_use) < std::pair(b.is_assigned, b.last_use);
  });
  if (oldest->is_assigned) return false;
  wait(oldest->write);
  wait(oldest->upload);
  return true;
}

char* StateWindow::address(const Frame& frame) noexcept { return frame.address; }

Ticket StateWindow::write_back(Frame& frame, const Ticket& upload) {
  frame.is_assigned = false;
  frame.last_use = ++use_count_;
  frame.upload = upload;
  const TraceLabelled traced(frame.label);
  frame.write = file_->submit_write(frame.chunk.offset, frame.address, frame.chunk.bytes);
  written_bytes_.fetch_add(frame.chunk.bytes, std::memory_order_relaxed);
  return frame.write;
}

WindowStats StateWindow::stats() const noexcept {
  return {.read_bytes = read_bytes_.load(std::memory_order_relaxed),
          .kept_bytes = kept_bytes_.load(std::memory_order_relaxed),
          .written_bytes = written_bytes_.load(std::memory_order_relaxed),
          .wait_ns = wait_ns_.load(std::memory_order_relaxed)};
}

}  // namespace offload
