// Every system call of the disk tier fails once, at every place; then the space, the drive and the network
// go.
#include <cerrno>
#include <iterator>
#include <string>
#include <vector>

#include "check.h"
#include "disk_directory.h"
#include "storage/block_file.h"

namespace offload {
namespace {

using test::AlignedBytes;
using test::DiskDirectory;
using test::honest_calls;

constexpr size_t kBlock = kDiskAlignment;
constexpr size_t kBlocks = 6;

BlockFileOptions options_of(const std::vector<DiskDirectory>& directories, DiskBackend backend,
                            std::shared_ptr<FailingSystemCalls> calls) {
  BlockFileOptions options{.directories = {},
                           .block_bytes = kBlock,
                           .queue_depth = 3,
                           .thread_count = 2,
                           .backend = backend,
                           .direct = true,
                           .calls = std::move(calls)};
  for (const DiskDirectory& directory : directories) options.directories.push_back(directory.path);
  return options;
}

bool has_uring() {
  const DiskDirectory directory;
  BlockFileOptions options{.directories = {directory.path}, .calls = honest_calls()};
  return BlockFile(options).facts()[0].backend == DiskBackend::kUring;
}

// Nothing but kStorage may come, and it says what to do.
void check_is_typed(const Error& error, int code) {
  CHECK(error.kind() == ErrorKind::kStorage);
  if (error.system_code() != 0) CHECK_EQ(error.system_code(), code);
  CHECK(std::string(error.what()).find(". ") != std::string::npos);
}

// Writes everything, and reads it back; counts the errors. A block whose write failed must not be readable.
size_t use(BlockFile& file, uint64_t offset, char fill, int code) {
  size_t errors = 0;
  std::vector<Ticket> tickets;
  AlignedBytes source(kBlocks * kBlock, fill), destination(kBlocks * kBlock);
  for (size_t i = 0; i < kBlocks; ++i) {
    tickets.push_back(file.submit_write(offset + i * kBlock, source.data() + i * kBlock, kBlock));
  }
  for (size_t i = 0; i < kBlocks; ++i) {
    tickets.push_back(file.submit_read(offset + i * kBlock, destination.data() + i * kBlock, kBlock));
  }
  for (size_t i = 0; i < tickets.size(); ++i) {
    try {
      tickets[i].wait();
      if (i < kBlocks) continue;
      const size_t block = i - kBlocks;
      CHECK(!tickets[block].error());
      CHECK(std::memcmp(destination.data() + block * kBlock, source.data() + block * kBlock, kBlock) == 0);
    } catch (const Error& error) {
      check_is_typed(error, i >= kBlocks && tickets[i - kBlocks].error() ? EIO : code);
      ++errors;
    }
  }
  return errors;
}

// A whole life with one call failing with `code` (0: none does). True: the failure was told somewhere.
bool live(DiskBackend backend, const std::shared_ptr<FailingSystemCalls>& calls, int code) {
  const std::vector<DiskDirectory> directories(2);
  bool is_told = false;
  std::unique_ptr<BlockFile> file;
  try {
    file = std::make_unique<BlockFile>(options_of(directories, backend, calls));
  } catch (const Error& error) {
    check_is_typed(error, code);
    is_told = true;
    file = std::make_unique<BlockFile>(options_of(directories, backend, calls));  // the fault is over
  }
  uint64_t offset = 0;
  try {
    offset = file->allocate(kBlocks * kBlock);
  } catch (const Error& error) {
    check_is_typed(error, code);
    is_told = true;
    for (const DiskPathFacts& facts : file->facts()) CHECK_EQ(facts.allocated_bytes, 0u);
    offset = file->allocate(kBlocks * kBlock);
  }
  if (use(*file, offset, 'a', code) > 0) is_told = true;
  if (code != 0) {
    // How often a ring is entered is a matter of timing, so that this fault alone may come late.
    calls->fail(SystemCall::kUringEnter, 0, 0);
    CHECK_EQ(use(*file, offset, 'b', code), 0u);  // the fault is over, and so is what it lost
  }
  try {
    file->clone();
  } catch (const Error& error) {
    check_is_typed(error, code);
    is_told = true;
    file->clone();
  }
  for (const DiskPathFacts& facts : file->facts()) {
    if (backend == DiskBackend::kAuto && !facts.uring_refusal.empty()) is_told = true;
    if (!facts.direct) is_told = true;
    if (!facts.reserved) is_told = true;
    if (facts.stats.failed_count > 0) is_told = true;
  }
  file.reset();
  // The one trace that a failure may leave: an empty lock file that could not be unlinked.
  for (const DiskDirectory& directory : directories) {
    for (const std::string& name : test::names_in(directory.path)) {
      CHECK_EQ(name, std::string(kLockName));
      is_told = true;
    }
  }
  CHECK(test::open_scratch_files().empty());
  return is_told;
}

void every_call_fails_at_every_place(DiskBackend backend) {
  auto counting = honest_calls();
  counting->pretend_clones();
  live(backend, counting, 0);
  for (size_t index = 0; index < kSystemCallCount; ++index) {
    const auto call = static_cast<SystemCall>(index);
    for (size_t nth = 1; nth <= counting->call_count(call); ++nth) {
      constexpr int kCodes[] = {EIO, ENOSPC, EDQUOT, EROFS};
      const auto calls = honest_calls();
      calls->pretend_clones();
      calls->fail(call, nth, kCodes[nth % std::size(kCodes)]);
      const bool is_told = live(backend, calls, kCodes[nth % std::size(kCodes)]);
      // An entry in vain that submitted nothing loses nothing, and what a clone does not give back at its end
      // goes with its descriptor.
      if (!is_told && call != SystemCall::kUringEnter && call != SystemCall::kTruncate) {
        test::report_failure(
            __FILE__, __LINE__,
            std::string(system_call_name(call)) + " failed unheard, call " + std::to_string(nth));
      }
    }
  }
}

// Keeps the ticket: ThreadSanitizer does not see how exceptions are counted.
class Waiter {
 public:
  void operator()(Ticket ticket) {
    last_ = std::move(ticket);
    last_.wait();
  }

 private:
  Ticket last_;
};

void interrupted_and_short_transfers_go_on(DiskBackend backend) {
  const bool is_uring = backend == DiskBackend::kUring;
  for (const SystemCall call : {is_uring ? SystemCall::kUringRead : SystemCall::kPread,
                                is_uring ? SystemCall::kUringWrite : SystemCall::kPwrite}) {
    const std::vector<DiskDirectory> directories(1);
    const auto calls = honest_calls();
    BlockFileOptions options = options_of(directories, backend, calls);
    options.block_bytes = 4 * kBlock;
    BlockFile file(options);
    const uint64_t offset = file.allocate(4 * kBlock);
    Waiter wait;
    AlignedBytes source(4 * kBlock, 's'), destination(4 * kBlock);
    for (size_t moved : {kBlock, kBlock + 100, 3 * kBlock}) {
      calls->shorten(call, 1, moved);
      wait(file.submit_write(offset, source.data(), 4 * kBlock));
      wait(file.submit_read(offset, destination.data(), 4 * kBlock));
      CHECK(std::memcmp(source.data(), destination.data(), 4 * kBlock) == 0);
    }
    calls->fail(call, 1, EINTR, /*count=*/3);
    wait(file.submit_write(offset, source.data(), 4 * kBlock));
    wait(file.submit_read(offset, destination.data(), 4 * kBlock));
    calls->shorten(call, 1, 100);
    CHECK_THROWS(ErrorKind::kStorage, "it moved 100 of 16384 bytes", {
      wait(file.submit_write(offset, source.data(), 4 * kBlock));
      wait(file.submit_read(offset, destination.data(), 4 * kBlock));
    });
  }
}

void a_drive_that_is_gone_fails_everything_and_hangs_nothing(DiskBackend backend) {
  const std::vector<DiskDirectory> directories(2);
  const auto calls = honest_calls();
  BlockFile file(options_of(directories, backend, calls));
  const uint64_t offset = file.allocate(kBlocks * kBlock);
  const bool is_uring = backend == DiskBackend::kUring;
  const auto break_calls = [&](size_t nth) {
    calls->fail(is_uring ? SystemCall::kUringRead : SystemCall::kPread, nth, EIO, SIZE_MAX);
    calls->fail(is_uring ? SystemCall::kUringWrite : SystemCall::kPwrite, nth, EIO, SIZE_MAX);
  };
  break_calls(1);
  CHECK_EQ(use(file, offset, 'a', EIO), 2 * kBlocks);
  Waiter wait;
  AlignedBytes memory(kBlock);
  CHECK_THROWS(ErrorKind::kStorage, "the last write of that block had failed",
               wait(file.submit_read(offset, memory.data(), kBlock)));
  break_calls(0);
  CHECK_EQ(use(file, offset, 'b', EIO), 0u);
}

void a_ring_that_can_no_longer_be_entered_hangs_nothing() {
  const std::vector<DiskDirectory> directories(1);
  const auto calls = honest_calls();
  BlockFile file(options_of(directories, DiskBackend::kUring, calls));
  const uint64_t offset = file.allocate(kBlocks * kBlock);
  calls->fail(SystemCall::kUringEnter, 2, ENOMEM, SIZE_MAX);  // what the first call submitted is in flight
  CHECK(use(file, offset, 'a', ENOMEM) >= kBlocks);
  calls->fail(SystemCall::kUringEnter, 0, 0);
  CHECK_EQ(use(file, offset, 'b', ENOMEM), 0u);
}

// "Wait for some completions and try again" (io_uring_enter(2)).
void a_ring_that_is_short_of_something_is_entered_again() {
  const std::vector<DiskDirectory> directories(1);
  const auto calls = honest_calls();
  BlockFile file(options_of(directories, DiskBackend::kUring, calls));
  const uint64_t offset = file.allocate(kBlocks * kBlock);
  for (const int code : {EAGAIN, EBUSY}) {
    for (const size_t nth : {1, 2}) {  // nothing is in flight, or something is
      const size_t before = calls->call_count(SystemCall::kUringEnter);
      calls->fail(SystemCall::kUringEnter, nth, code, 10);
      CHECK_EQ(use(file, offset, 'a', code), 0u);
      CHECK(calls->call_count(SystemCall::kUringEnter) > before + 10);
    }
  }
  calls->fail(SystemCall::kUringEnter, 1, EAGAIN, SIZE_MAX);  // no end of it
  CHECK(use(file, offset, 'b', EAGAIN) >= kBlocks);
  calls->fail(SystemCall::kUringEnter, 0, 0);
  CHECK_EQ(use(file, offset, 'c', 0), 0u);
}

// As over a network: the best transfer is larger than the fragments that blocks are counted in.
class FewFragments final : public SystemCalls {
 public:
  int file_system(int file, struct statfs* facts) override {
    const int result = SystemCalls::file_system(file, facts);
    facts->f_type = test::kExt4;
    facts->f_bsize = 1 << 20;
    facts->f_frsize = kBlock;
    facts->f_bavail = 3;
    return result;
  }
};

void free_space_is_counted_in_fragments() {
  const DiskDirectory directory;
  BlockFile file({.directories = {directory.path},
                  .block_bytes = kBlock,
                  .backend = DiskBackend::kThreads,
                  .calls = std::make_shared<FewFragments>()});
  CHECK_THROWS(ErrorKind::kStorage, "(ENOSPC). Free space", file.allocate(4 * kBlock));
  CHECK_EQ(file.allocate(3 * kBlock), 0u);
}

void check_sizes(size_t bytes) {
  for (const std::string& path : test::open_scratch_files()) {
    struct stat facts{};
    CHECK_EQ(::stat(path.c_str(), &facts), 0);
    CHECK_EQ(facts.st_size, static_cast<off_t>(bytes));
  }
}

void a_full_disk_is_found_before_anything_is_written() {
  const std::vector<DiskDirectory> directories(3);
  const auto calls = honest_calls();
  BlockFile file(options_of(directories, DiskBackend::kThreads, calls));
  const uint64_t first = file.allocate(3 * kBlock);
  calls->fail(SystemCall::kAllocate, 3, ENOSPC);
  CHECK_THROWS(ErrorKind::kStorage, "reserving 8192 bytes in " + directories[2].path,
               file.allocate(6 * kBlock));
  for (const DiskPathFacts& facts : file.facts()) CHECK_EQ(facts.allocated_bytes, kBlock);
  check_sizes(kBlock);
  const uint64_t second = file.allocate(6 * kBlock);
  CHECK_EQ(second, first + 3 * kBlock);
  CHECK_EQ(use(file, second, 'a', 0), 0u);
  CHECK_THROWS(ErrorKind::kStorage, "(ENOSPC). Free space",
               file.allocate(uint64_t{1} << 59));  // more than there is, and nothing is taken to find out
  check_sizes(3 * kBlock);
}

void a_file_system_without_reservations_is_shown() {
  const std::vector<DiskDirectory> directories(1);
  const auto calls = honest_calls();
  calls->fail(SystemCall::kAllocate, 1, EOPNOTSUPP, SIZE_MAX);
  BlockFile file(options_of(directories, DiskBackend::kThreads, calls));
  const uint64_t offset = file.allocate(kBlocks * kBlock);
  CHECK(!file.facts()[0].reserved);
  CHECK_EQ(file.facts()[0].reservation_refusal, std::string("the file system has no fallocate"));
  CHECK_EQ(use(file, offset, 'a', 0), 0u);
  CHECK_THROWS(ErrorKind::kStorage, "(ENOSPC)", file.allocate(uint64_t{1} << 59));
}

void fallbacks_say_why() {
  const std::vector<DiskDirectory> directories(1);
  const auto facts_with = [&](SystemCall call, size_t nth, int code, DiskBackend backend) {
    const auto calls = honest_calls();
    calls->fail(call, nth, code);
    return BlockFile(options_of(directories, backend, calls)).facts()[0];
  };
  DiskPathFacts facts = facts_with(SystemCall::kUringSetup, 1, EPERM, DiskBackend::kAuto);
  CHECK(facts.backend == DiskBackend::kThreads);
  CHECK(facts.uring_refusal.find("EPERM, blocked by seccomp") != std::string::npos);
  CHECK_THROWS(ErrorKind::kStorage, "no io_uring",
               facts_with(SystemCall::kUringSetup, 1, ENOSYS, DiskBackend::kUring));
  facts = facts_with(SystemCall::kSetFlags, 1, EINVAL, DiskBackend::kThreads);
  CHECK(!facts.direct);
  CHECK_EQ(facts.direct_refusal, std::string("the file system refuses O_DIRECT: EINVAL"));
  facts = facts_with(SystemCall::kPwrite, 1, EINVAL, DiskBackend::kThreads);  // said yes, and meant no
  CHECK(!facts.direct);
  CHECK_EQ(facts.direct_refusal, std::string("the file system refuses direct writes of 4096 bytes"));
}

void paths_that_cannot_be_used_are_named() {
  const std::vector<DiskDirectory> directories(1);
  const std::string file_path = directories[0].path + "/file";
  ::close(::open(file_path.c_str(), O_CREAT | O_WRONLY, 0600));
  const auto open_at = [](const std::string& path, std::shared_ptr<FailingSystemCalls> calls) {
    BlockFile({.directories = {path}, .calls = std::move(calls)});
  };
  CHECK_THROWS(ErrorKind::kStorage, "opening disk_path " + directories[0].path + "/none failed",
               open_at(directories[0].path + "/none", honest_calls()));
  CHECK_THROWS(ErrorKind::kStorage, "must be a directory", open_at(file_path, honest_calls()));
  auto calls = honest_calls();
  calls->pretend_file_system(0x01021994);
  CHECK_THROWS(ErrorKind::kStorage, "is on tmpfs, which is host memory", open_at(directories[0].path, calls));
  calls = honest_calls();
  calls->fail(SystemCall::kSetLock, 1, EAGAIN);
  CHECK_THROWS(ErrorKind::kStorage, "is in use by another process", open_at(directories[0].path, calls));
  CHECK(test::open_scratch_files().empty());
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  std::vector<DiskBackend> backends = {DiskBackend::kThreads};
  if (has_uring()) backends.insert(backends.end(), {DiskBackend::kUring, DiskBackend::kAuto});
  for (DiskBackend backend : backends) {
    every_call_fails_at_every_place(backend);
    if (backend == DiskBackend::kAuto) continue;
    interrupted_and_short_transfers_go_on(backend);
    a_drive_that_is_gone_fails_everything_and_hangs_nothing(backend);
    if (backend != DiskBackend::kUring) continue;
    a_ring_that_can_no_longer_be_entered_hangs_nothing();
    a_ring_that_is_short_of_something_is_entered_again();
  }
  a_full_disk_is_found_before_anything_is_written();
  free_space_is_counted_in_fragments();
  a_file_system_without_reservations_is_shown();
  fallbacks_say_why();
  paths_that_cannot_be_used_are_named();
  return test::result();
}
