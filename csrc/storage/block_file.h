// Bytes on disk: one address space over private files, one a path, striped block by block.
//
// Ownership: owns the files, which go with it or with the process. Memory given to a read or write is the
//            caller's, and must live and stay as it is until the ticket ended.
// Threads: every member may be called from any thread; in a forked child all throw kState.
// Units: bytes. Offsets are multiples of block_bytes. Addresses are multiples of kDiskAlignment, and memory
//        reaches to the next multiple of it behind the last byte.
// Invariants: operations on one block take effect in the order of submission (those that wait for tickets
//             are submitted when these have ended); a read gives the bytes of the last write or fails with
//             kStorage. Space is on the disk before an offset is given out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/ticket.h"
#include "storage/disk_lane.h"
#include "storage/scratch_file.h"
#include "storage/system_calls.h"

namespace offload {

// kAuto: io_uring where the kernel lets us, else threads; OFFLOAD_DISK_BACKEND names one ("io_uring",
// "threads") in its place.
enum class DiskBackend { kAuto, kUring, kThreads };
const char* disk_backend_name(DiskBackend backend) noexcept;

struct BlockFileOptions {
  std::vector<std::string> directories;
  size_t block_bytes = size_t{1} << 20;  // of one transfer, one checksum and one stripe
  size_t queue_depth = 16;               // io_uring: operations in flight, a path
  size_t thread_count = 8;               // threads: of each path, each with one block in flight
  DiskBackend backend = DiskBackend::kAuto;
  bool direct = true;  // O_DIRECT where the file system takes it
  std::shared_ptr<SystemCalls> calls = SystemCalls::kernel();
};

struct DiskPathFacts {
  std::string directory;
  std::string file_system;
  DiskBackend backend = DiskBackend::kThreads;
  std::string uring_refusal;  // why io_uring is not used; empty: it is
  bool direct = false;
  std::string direct_refusal;  // why reads and writes go through the page cache; empty: they do not
  bool reserved = true;
  std::string reservation_refusal;  // why space is counted and not reserved; empty: it is reserved
  uint64_t allocated_bytes = 0;
  LaneStats stats;
};

class BlockFile {
 public:
  // Throws kInvalidArgument for options that make no sense, kStorage for a path that cannot be used.
  explicit BlockFile(BlockFileOptions options);
  ~BlockFile();  // see DiskLane
  BlockFile(const BlockFile&) = delete;
  BlockFile& operator=(const BlockFile&) = delete;

  // Reserves space for `bytes`, rounded up to blocks, and returns its offset. Throws kStorage, and changes
  // nothing, when a path cannot hold its part. Space is given back with the file, not before.
  uint64_t allocate(uint64_t bytes);

  // A file of the bytes that this one has when all writes submitted so far have ended, which is waited for;
  // to be read. By reflinks: nothing is copied, and what is written here while it lives takes new space.
  // Where that runs out the clone gives up its bytes, and not the write. Throws kStorage when a path's file
  // system refuses.
  std::unique_ptr<BlockFile> clone();

  // Each block is read with the length that it was written with: all of it, but for the end of a write.
  // Throws kInvalidArgument, or kState for a block that was never written, and then submits nothing.
  // A failed read leaves the memory undefined.
  Ticket submit_read(uint64_t offset, void* destination, uint64_t bytes);

  // A failed write leaves its blocks lost: reads of them fail until a later write succeeds.
  Ticket submit_write(uint64_t offset, const void* source, uint64_t bytes);

  // As submit_read, begun when all of `after` have ended, well or badly. What submit_read would throw is the
  // ticket's error. Memory and range are the operation's from the call on.
  Ticket submit_read_after(const std::vector<Ticket>& after, uint64_t offset, void* destination,
                           uint64_t bytes);

  // As submit_write, begun when `after` has ended well; its error, and what submit_write would throw, are the
  // ticket's, and the blocks are as they were.
  Ticket submit_write_after(const Ticket& after, uint64_t offset, const void* source, uint64_t bytes);

  size_t block_bytes() const noexcept;
  std::vector<DiskPathFacts> facts() const;

 private:
  struct State;
  struct Door;
  explicit BlockFile(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;  // leaked in a forked child: its threads do not exist there
  std::shared_ptr<Door> door_;    // what waits for tickets comes in by it, as long as it is open
};

}  // namespace offload
