#include "storage/block_file.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "base/fork_guard.h"
#include "base/trace_ring.h"

namespace offload {
namespace {

constexpr size_t kLargestBlockBytes = size_t{1} << 30;  // a transfer's result is a signed 32-bit number
constexpr size_t kLargestDepth = 4096;                  // both: far more than a drive has use for
constexpr size_t kMostThreads = 256;

void require(bool holds, const std::string& message) {
  if (!holds) throw Error(ErrorKind::kInvalidArgument, message);
}

void check(const BlockFileOptions& options) {
  require(!options.directories.empty(), "disk_path is empty: name at least one directory");
  require(options.block_bytes >= kDiskAlignment && options.block_bytes <= kLargestBlockBytes &&
              options.block_bytes % kDiskAlignment == 0,
          "block_bytes=" + std::to_string(options.block_bytes) + " is not a multiple of " +
              std::to_string(kDiskAlignment) + " up to 1 GiB; the default is 1 MiB");
  require(options.queue_depth >= 1 && options.queue_depth <= kLargestDepth,
          "queue_depth=" + std::to_string(options.queue_depth) + " must be 1 to " +
              std::to_string(kLargestDepth));
  require(options.thread_count >= 1 && options.thread_count <= kMostThreads,
          "thread_count=" + std::to_string(options.thread_count) + " must be 1 to " +
              std::to_string(kMostThreads));
}

DiskBackend wanted_backend(DiskBackend asked) {
  const char* forced = std::getenv("OFFLOAD_DISK_BACKEND");
  if (asked != DiskBackend::kAuto || forced == nullptr || *forced == '\0') return asked;
  for (DiskBackend backend : {DiskBackend::kUring, DiskBackend::kThreads}) {
    if (std::string(forced) == disk_backend_name(backend)) return backend;
  }
  throw Error(ErrorKind::kInvalidArgument, "OFFLOAD_DISK_BACKEND=" + std::string(forced) +
                                               " is not io_uring or threads; name one of them or unset it");
}

}  // namespace

const char* disk_backend_name(DiskBackend backend) noexcept {
  switch (backend) {
    case DiskBackend::kAuto: return "auto";
    case DiskBackend::kUring: return "io_uring";
    case DiskBackend::kThreads: break;
  }
  return "threads";
}

struct BlockFile::State {
  explicit State(BlockFileOptions its_options);
  // A clone, of what has no write under way and takes no operations meanwhile.
  explicit State(const State& original);

  uint64_t block_of(uint64_t offset) const noexcept { return offset / options.block_bytes; }

  // The bytes of the path's file when there are so many blocks in all: block b is on path b % path count.
  uint64_t file_bytes(size_t path, uint64_t block_count) const noexcept {
    const uint64_t paths = files.size();
    return (block_count + paths - 1 - path) / paths * options.block_bytes;
  }

  Ticket submit(bool is_write, uint64_t offset, char* address, uint64_t bytes);
  void check_range(const char* what, uint64_t offset, const char* address, uint64_t bytes) const;
  void check_written(uint64_t offset, uint64_t bytes) const;
  void open_lanes();

  const BlockFileOptions options;
  const ForkGuard owner;
  std::vector<std::unique_ptr<ScratchFile>> files;
  DiskBackend backend = DiskBackend::kThreads;
  std::string uring_refusal;

  std::mutex mutex;
  // guarded by mutex; records are appended only, and keep their addresses
  std::deque<BlockRecord> records;

  std::mutex writes_mutex;  // a lane ends writes while `mutex` may be held
  std::condition_variable writes_ended;
  size_t write_count = 0;  // guarded by writes_mutex: requests under way

  std::vector<std::unique_ptr<DiskLane>> lanes;  // last: their threads use all of the above
};

BlockFile::State::State(BlockFileOptions its_options) : options(std::move(its_options)) {
  check(options);
  backend = wanted_backend(options.backend);
  for (const std::string& directory : options.directories) {
    auto file = std::make_unique<ScratchFile>(options.calls, directory, options.direct);
    for (const auto& other : files) {
      require(!file->lock().same_directory(other->lock()),
              "disk_path names " + other->directory() + " twice (" + directory + "): a path counts once");
    }
    files.push_back(std::move(file));
  }
  open_lanes();
}

BlockFile::State::State(const State& original) : options(original.options), backend(original.backend) {
  for (const auto& file : original.files) files.push_back(file->clone());
  for (const BlockRecord& record : original.records) {
    records.push_back(
        {.submitted_bytes = record.submitted_bytes, .checksum = record.checksum, .is_lost = record.is_lost});
  }
  open_lanes();
}

// One back-end for all paths: the first path's ring tells whether the kernel has any to give.
void BlockFile::State::open_lanes() {
  const bool may_fall_back = backend == DiskBackend::kAuto;
  if (backend == DiskBackend::kThreads) uring_refusal = "not asked for";
  if (backend != DiskBackend::kThreads) {
    try {
      for (const auto& file : files)
        lanes.push_back(make_uring_lane(options.calls, *file, options.queue_depth));
      backend = DiskBackend::kUring;
      return;
    } catch (const Error& error) {
      if (!may_fall_back || error.kind() != ErrorKind::kStorage) throw;
      uring_refusal = error.what();
      lanes.clear();
    }
  }
  backend = DiskBackend::kThreads;
  for (const auto& file : files)
    lanes.push_back(make_thread_lane(options.calls, *file, options.thread_count));
}

void BlockFile::State::check_range(const char* what, uint64_t offset, const char* address,
                                   uint64_t bytes) const {
  const uint64_t allocated = records.size() * options.block_bytes;
  require(offset % options.block_bytes == 0,
          std::string(what) + " at offset " + std::to_string(offset) +
              ": offsets are multiples of block_bytes=" + std::to_string(options.block_bytes));
  require(offset <= allocated && bytes <= allocated - offset,
          std::string(what) + " of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
              " passes the end: " + std::to_string(allocated) + " bytes are allocated");
  require(bytes == 0 || (address != nullptr && reinterpret_cast<uintptr_t>(address) % kDiskAlignment == 0),
          std::string(what) + " needs memory at a multiple of " + std::to_string(kDiskAlignment) +
              " bytes: acquire the buffer with alignment=" + std::to_string(kDiskAlignment));
}

void BlockFile::State::check_written(uint64_t offset, uint64_t bytes) const {
  for (uint64_t done = 0; done < bytes; done += options.block_bytes) {
    const uint64_t length = std::min<uint64_t>(options.block_bytes, bytes - done);
    const uint64_t written = records[block_of(offset + done)].submitted_bytes;
    if (written == 0) {
      throw Error(ErrorKind::kState, "a read at offset " + std::to_string(offset + done) +
                                         " asks for a block that was never written");
    }
    require(written == length, "a read of " + std::to_string(length) + " bytes at offset " +
                                   std::to_string(offset + done) + ", where " + std::to_string(written) +
                                   " were written: a block is read with the length of its write");
  }
}

Ticket BlockFile::State::submit(bool is_write, uint64_t offset, char* address, uint64_t bytes) {
  owner.require_owner("the block file");
  // Held until the lanes have the operations, so that all blocks see submissions in one order.
  std::lock_guard lock(mutex);
  check_range(is_write ? "a write" : "a read", offset, address, bytes);
  if (bytes == 0) return {};
  if (!is_write) check_written(offset, bytes);

  const uint64_t count = (bytes + options.block_bytes - 1) / options.block_bytes;
  const auto request = std::make_shared<DiskRequest>(count, is_write, bytes);
  std::vector<std::vector<BlockOperation>> by_lane(lanes.size());
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t block = block_of(offset) + i;
    const uint64_t length = std::min<uint64_t>(options.block_bytes, bytes - i * options.block_bytes);
    BlockOperation operation;
    operation.is_write = is_write;
    operation.address = address + i * options.block_bytes;
    operation.bytes = static_cast<uint32_t>(length);
    operation.transfer_bytes =
        static_cast<uint32_t>((length + kDiskAlignment - 1) / kDiskAlignment * kDiskAlignment);
    operation.file_offset = block / lanes.size() * options.block_bytes;
    operation.record = &records[block];
    operation.request = request;
    by_lane[block % lanes.size()].push_back(std::move(operation));
  }
  if (is_write) {
    for (const auto& operations : by_lane) {
      for (const BlockOperation& operation : operations) operation.record->submitted_bytes = operation.bytes;
    }
    {
      std::lock_guard writes(writes_mutex);
      ++write_count;
    }
    request->ticket().on_end([this](const std::exception_ptr&) {
      std::lock_guard writes(writes_mutex);
      if (--write_count == 0) writes_ended.notify_all();
    });
  }
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    if (!by_lane[lane].empty()) lanes[lane]->submit(std::move(by_lane[lane]));
  }
  return request->ticket();
}

struct BlockFile::Door {
  std::mutex mutex;       // held while something is submitted: the file lives until then
  State* file = nullptr;  // guarded by mutex; null when the file is going

  // `ended` ends as the ticket that `submit` gives, or with what it throws.
  template <typename Submit>
  void submit(const Ticket& ended, Submit submit) {
    Ticket submitted;
    std::exception_ptr error;
    {
      std::lock_guard lock(mutex);
      try {
        if (file == nullptr) throw Error(ErrorKind::kState, "the files were given up before this began");
        submitted = submit(*file);
      } catch (...) {
        error = std::current_exception();
      }
    }
    // Not under the lock: it may end here and now, and then what waits for it is submitted.
    if (error) return ended.fail(error);
    submitted.on_end([ended](const std::exception_ptr& outcome) { ended.fail(outcome); });
  }
};

BlockFile::BlockFile(BlockFileOptions options) : BlockFile(std::make_unique<State>(std::move(options))) {}

BlockFile::BlockFile(std::unique_ptr<State> state)
    : state_(std::move(state)), door_(std::make_shared<Door>()) {
  door_->file = state_.get();
}

BlockFile::~BlockFile() {
  if (state_->owner.forked()) {
    static_cast<void>(state_.release());
    return;
  }
  // Before the lanes end: what fails then must not submit what waited for it.
  std::lock_guard lock(door_->mutex);
  door_->file = nullptr;
}

uint64_t BlockFile::allocate(uint64_t bytes) {
  State& state = *state_;
  state.owner.require_owner("the block file");
  std::lock_guard lock(state.mutex);
  const uint64_t block_bytes = state.options.block_bytes;
  const uint64_t before = state.records.size();
  constexpr uint64_t kLargestBytes = uint64_t{1} << 60;
  require(bytes <= kLargestBytes,
          "an allocation of " + std::to_string(bytes) + " bytes is larger than any disk");
  const uint64_t after = before + (bytes + block_bytes - 1) / block_bytes;
  size_t path = 0;
  try {
    for (; path < state.files.size(); ++path) state.files[path]->reserve(state.file_bytes(path, after));
    state.records.resize(after);
  } catch (...) {
    for (size_t grown = 0; grown < path; ++grown) state.files[grown]->shrink(state.file_bytes(grown, before));
    throw;
  }
  return before * block_bytes;
}

std::unique_ptr<BlockFile> BlockFile::clone() {
  State& state = *state_;
  state.owner.require_owner("the block file");
  for (;;) {
    {
      std::lock_guard lock(state.mutex);
      std::unique_lock writes(state.writes_mutex);
      const bool is_quiet = state.write_count == 0;
      writes.unlock();  // reads end meanwhile, and what waits for them
      if (is_quiet) return std::unique_ptr<BlockFile>(new BlockFile(std::make_unique<State>(state)));
    }
    std::unique_lock writes(state.writes_mutex);
    state.writes_ended.wait(writes, [&] { return state.write_count == 0; });
  }
}

Ticket BlockFile::submit_read(uint64_t offset, void* destination, uint64_t bytes) {
  return state_->submit(/*is_write=*/false, offset, static_cast<char*>(destination), bytes);
}

Ticket BlockFile::submit_write(uint64_t offset, const void* source, uint64_t bytes) {
  // Only a read writes to an operation's memory.
  return state_->submit(/*is_write=*/true, offset, static_cast<char*>(const_cast<void*>(source)), bytes);
}

Ticket BlockFile::submit_read_after(const std::vector<Ticket>& after, uint64_t offset, void* destination,
                                    uint64_t bytes) {
  state_->owner.require_owner("the block file");
  const Ticket ended = Ticket::pending();
  const auto left = std::make_shared<std::atomic<size_t>>(after.size() + 1);
  const auto count_down = [=, door = door_, label = trace_label()](const std::exception_ptr&) {
    if (left->fetch_sub(1) != 1) return;
    const TraceLabelled traced(label);
    door->submit(ended, [=](State& file) {
      return file.submit(/*is_write=*/false, offset, static_cast<char*>(destination), bytes);
    });
  };
  for (const Ticket& ticket : after) ticket.on_end(count_down);
  count_down(nullptr);
  return ended;
}

Ticket BlockFile::submit_write_after(const Ticket& after, uint64_t offset, const void* source,
                                     uint64_t bytes) {
  state_->owner.require_owner("the block file");
  const Ticket ended = Ticket::pending();
  // Only a read writes to an operation's memory.
  char* const address = static_cast<char*>(const_cast<void*>(source));
  after.on_end([=, door = door_, label = trace_label()](const std::exception_ptr& error) {
    if (error) return ended.fail(error);
    const TraceLabelled traced(label);
    door->submit(ended, [=](State& file) { return file.submit(/*is_write=*/true, offset, address, bytes); });
  });
  return ended;
}

size_t BlockFile::block_bytes() const noexcept { return state_->options.block_bytes; }

std::vector<DiskPathFacts> BlockFile::facts() const {
  state_->owner.require_owner("the block file");
  std::lock_guard lock(state_->mutex);
  std::vector<DiskPathFacts> all;
  for (size_t path = 0; path < state_->files.size(); ++path) {
    const ScratchFile& file = *state_->files[path];
    all.push_back({.directory = file.directory(),
                   .file_system = file.file_system_name(),
                   .backend = state_->backend,
                   .uring_refusal = state_->uring_refusal,
                   .direct = file.direct(),
                   .direct_refusal = file.direct_refusal(),
                   .reserved = file.reserved(),
                   .reservation_refusal = file.reservation_refusal(),
                   .allocated_bytes = file.size_bytes(),
                   .stats = state_->lanes[path]->stats()});
  }
  return all;
}

}  // namespace offload
