// States that live on disk, while they are updated: a bounded number of frames of host memory that chunks are
// read into ahead of their update and written from behind it.
//
// Ownership: owns the frames, and shares the file.
// Threads: used by one thread at a time; stats() by any.
// Units: bytes.
// Invariants: chunks are taken in the order in which they were expected. A frame is given another chunk only
//             after its write and its upload ended. What was written stays in its frame until then, so a
//             chunk that is expected again soon enough is not read: least recently used frames go first.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/ticket.h"
#include "memory/host_pool.h"
#include "pipeline/state_layout.h"
#include "storage/block_file.h"

namespace offload {

// Which chunk, as it is after `version` changes by others than the window.
struct ChunkKey {
  int64_t slot;
  size_t index;
  uint64_t version;
  bool operator==(const ChunkKey&) const = default;
};

struct ExpectedChunk {
  ChunkKey key;
  StateChunk chunk;  // its offset is of the file
  uint32_t trace_name = 0;
};

struct WindowStats {
  uint64_t read_bytes = 0;
  uint64_t kept_bytes = 0;  // expected, and not read: they were still in the window
  uint64_t written_bytes = 0;
  uint64_t wait_ns = 0;  // the update waited for the disk
};

class StateWindow {
 public:
  struct Frame;

  // Returns when the ticket ended, well or badly; throws when that must not be waited for any longer.
  using Wait = std::function<void(const Ticket&)>;

  // Throws kInvalidArgument for frames of nothing, kOutOfHostMemory when the pool cannot hold them.
  StateWindow(std::shared_ptr<BlockFile> file, HostPool& pool, size_t frame_bytes, size_t frame_count);
  // Does not wait: the pool reuses a frame's memory when what is in flight has ended.
  ~StateWindow();
  StateWindow(const StateWindow&) = delete;
  StateWindow& operator=(const StateWindow&) = delete;

  // The chunk is taken after all that were expected before. Throws kInvalidArgument for one larger than a
  // frame.
  void check(const StateLayout& layout) const;
  void expect(ExpectedChunk expected) { expected_.push_back(std::move(expected)); }

  // Starts reads into frames that are free, for the chunks that are expected next. Never blocks.
  void read_ahead();

  // The next chunk's frame, read and with nothing in flight. Rethrows the error of its read.
  Frame& take(const Wait& wait);
  static char* address(const Frame& frame) noexcept;

  // The frame's chunk was changed: writes it. The ticket is the write's; the frame is free after it and
  // `upload`.
  Ticket write_back(Frame& frame, const Ticket& upload);

  WindowStats stats() const noexcept;

 private:
  Frame* frame_for(const ChunkKey& key);
  bool wait_for_a_frame(const Wait& wait);

  const std::shared_ptr<BlockFile> file_;
  const size_t frame_bytes_;
  HostBuffer memory_;
  std::vector<Frame> frames_;
  std::deque<ExpectedChunk> expected_;
  std::deque<Frame*> assigned_;  // frames of the chunks that were expected before those
  uint64_t use_count_ = 0;

  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> kept_bytes_{0};
  std::atomic<uint64_t> written_bytes_{0};
  std::atomic<uint64_t> wait_ns_{0};
};

}  // namespace offload
