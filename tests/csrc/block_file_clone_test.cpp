// Clones of a block file: by reflinks where the file system of the working directory has them, else by
// copies.
#include <sys/stat.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
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
constexpr size_t kBlocks = 7;

bool file_system_clones() {
  const DiskDirectory directory;
  BlockFile file({.directories = {directory.path}, .block_bytes = kBlock, .calls = honest_calls()});
  try {
    file.clone();
    return true;
  } catch (const Error&) {
    return false;
  }
}

bool has_uring() {
  const DiskDirectory directory;
  BlockFileOptions options{.directories = {directory.path}, .calls = honest_calls()};
  return BlockFile(options).facts()[0].backend == DiskBackend::kUring;
}

std::shared_ptr<FailingSystemCalls> cloning_calls() {
  static const bool is_real = file_system_clones();
  auto calls = honest_calls();
  if (!is_real) calls->pretend_clones();
  return calls;
}

struct Fixture {
  explicit Fixture(DiskBackend its_backend, size_t path_count = 1,
                   std::shared_ptr<SystemCalls> others = nullptr)
      : backend(its_backend), directories(path_count) {
    BlockFileOptions options{.directories = {},
                             .block_bytes = kBlock,
                             .queue_depth = 4,
                             .thread_count = 3,
                             .backend = backend,
                             .calls = others != nullptr ? others : calls};
    for (const DiskDirectory& directory : directories) options.directories.push_back(directory.path);
    file = std::make_unique<BlockFile>(options);
    file->allocate(kBlocks * kBlock);
  }

  void write(char fill) {
    const AlignedBytes source(kBlocks * kBlock, fill);
    last = file->submit_write(0, const_cast<AlignedBytes&>(source).data(), kBlocks * kBlock);
    last.wait();
  }

  // The one letter that all of the file consists of.
  char read(BlockFile& from) {
    AlignedBytes destination(kBlocks * kBlock, '?');
    last = from.submit_read(0, destination.data(), kBlocks * kBlock);
    last.wait();
    for (size_t i = 0; i < kBlocks * kBlock; ++i) CHECK_EQ(destination[i], destination[0]);
    return destination[0];
  }

  SystemCall write_call() const {
    return backend == DiskBackend::kUring ? SystemCall::kUringWrite : SystemCall::kPwrite;
  }

  DiskBackend backend;
  std::shared_ptr<FailingSystemCalls> calls = cloning_calls();
  std::vector<DiskDirectory> directories;
  std::unique_ptr<BlockFile> file;
  Ticket last;  // outlives the reading of its error: ThreadSanitizer does not see exceptions being counted
};

void a_clone_keeps_its_bytes(DiskBackend backend, size_t path_count) {
  Fixture f(backend, path_count);
  f.write('a');
  const std::unique_ptr<BlockFile> clone = f.file->clone();
  CHECK_EQ(test::open_scratch_files().size(), 2 * path_count);
  for (const std::string& path : test::open_scratch_files()) {
    struct stat facts{};
    CHECK_EQ(::stat(path.c_str(), &facts), 0);
    CHECK_EQ(facts.st_mode & 0777, 0600u);
    CHECK_EQ(facts.st_nlink, 0u);
  }
  for (const char fill : {'b', 'c'}) {
    f.write(fill);
    CHECK_EQ(f.read(*clone), 'a');
    CHECK_EQ(f.read(*f.file), fill);
  }
  const std::unique_ptr<BlockFile> second = f.file->clone();
  f.write('d');
  f.file.reset();
  CHECK_EQ(f.read(*clone), 'a');
  CHECK_EQ(f.read(*second), 'c');
}

// A clone's space is free when it has gone, whoever was forked meanwhile and has its descriptors.
void a_clone_that_goes_leaves_nothing(DiskBackend backend) {
  Fixture f(backend);
  f.write('a');
  std::unique_ptr<BlockFile> clone = f.file->clone();
  const int inherited = ::open(test::open_scratch_files().back().c_str(), O_RDONLY);
  struct stat facts{};
  CHECK_EQ(::fstat(inherited, &facts), 0);
  CHECK_EQ(facts.st_size, static_cast<off_t>(kBlocks * kBlock));
  clone.reset();
  CHECK_EQ(::fstat(inherited, &facts), 0);
  CHECK_EQ(facts.st_size, 0);
  ::close(inherited);
  CHECK_EQ(test::open_scratch_files().size(), 1u);
  CHECK_EQ(f.read(*f.file), 'a');
}

// Writes stay where they are until released, and a clone must not be made meanwhile.
class HeldWrites final : public SystemCalls {
 public:
  int file_system(int file, struct statfs* facts) override { return honest_->file_system(file, facts); }
  ssize_t pwrite(int file, const void* source, size_t bytes, off_t offset) override {
    std::unique_lock lock(mutex_);
    ++under_way_;
    changed_.wait(lock, [&] { return !is_holding_; });
    lock.unlock();
    const ssize_t result = SystemCalls::pwrite(file, source, bytes, offset);
    lock.lock();
    --under_way_;
    return result;
  }
  int clone(int file, int original) override {
    {
      std::lock_guard lock(mutex_);
      CHECK_EQ(under_way_, 0u);
    }
    return honest_->clone(file, original);
  }
  void hold(bool is_holding) {
    std::lock_guard lock(mutex_);
    is_holding_ = is_holding;
    changed_.notify_all();
  }

 private:
  const std::shared_ptr<FailingSystemCalls> honest_ = cloning_calls();
  std::mutex mutex_;
  std::condition_variable changed_;
  // guarded by mutex_
  bool is_holding_ = false;
  size_t under_way_ = 0;
};

void a_clone_has_all_that_was_submitted() {
  const auto calls = std::make_shared<HeldWrites>();
  Fixture f(DiskBackend::kThreads, 2, calls);
  f.write('a');
  calls->hold(true);
  AlignedBytes source(kBlocks * kBlock, 'b');
  const Ticket written = f.file->submit_write(0, source.data(), kBlocks * kBlock);
  std::unique_ptr<BlockFile> clone;
  std::thread cloning([&] { clone = f.file->clone(); });
  calls->hold(false);
  cloning.join();
  CHECK(written.done());
  f.write('c');
  CHECK_EQ(f.read(*clone), 'b');
}

void a_lost_block_is_lost_in_its_clone(DiskBackend backend) {
  Fixture f(backend);
  f.write('a');
  f.calls->fail(f.write_call(), 1, EIO);
  CHECK_THROWS(ErrorKind::kStorage, "(EIO)", f.write('b'));
  const std::unique_ptr<BlockFile> clone = f.file->clone();
  f.write('c');
  CHECK_THROWS(ErrorKind::kStorage, "the last write of that block had failed", f.read(*clone));
}

void a_flipped_bit_in_a_clone_is_found(DiskBackend backend) {
  Fixture f(backend);
  f.write('a');
  const std::unique_ptr<BlockFile> clone = f.file->clone();
  const int file = ::open(test::open_scratch_files().back().c_str(), O_RDWR);
  CHECK_EQ(::pwrite(file, "b", 1, 2 * kBlock + 5), 1);
  CHECK_EQ(::fsync(file), 0);
  ::close(file);
  CHECK_THROWS(ErrorKind::kStorage, "the checksum differs", f.read(*clone));
  CHECK_EQ(f.read(*f.file), 'a');
}

void a_full_disk_costs_the_clone_and_no_write(DiskBackend backend) {
  for (const int code : {ENOSPC, EDQUOT}) {
    Fixture f(backend, 2);
    f.write('a');
    f.calls->fail(f.write_call(), 1, code);
    CHECK_THROWS(ErrorKind::kStorage, "writing 4096 bytes", f.write('b'));  // there is no clone to blame
    f.write('b');
    std::unique_ptr<BlockFile> clone = f.file->clone();
    f.calls->fail(f.write_call(), 3, code);
    f.write('c');
    CHECK_EQ(f.read(*f.file), 'c');
    CHECK_THROWS(ErrorKind::kStorage, "the clone gave its space to the writes of the training",
                 f.read(*clone));
    clone = f.file->clone();
    CHECK_EQ(f.read(*clone), 'c');
    f.calls->fail(f.write_call(), 1, code, SIZE_MAX);  // that is no clone's doing
    CHECK_THROWS(ErrorKind::kStorage, "writing 4096 bytes", f.write('d'));
    f.calls->fail(f.write_call(), 0, 0);
    f.write('e');
    CHECK_EQ(f.read(*f.file), 'e');
  }
}

void space_for_more_is_taken_from_a_clone(DiskBackend backend) {
  Fixture f(backend, 2);
  f.write('a');
  const std::unique_ptr<BlockFile> clone = f.file->clone();
  f.calls->fail(SystemCall::kAllocate, 1, ENOSPC);
  CHECK_EQ(f.file->allocate(2 * kBlock), kBlocks * kBlock);
  CHECK_THROWS(ErrorKind::kStorage, "the clone gave its space", f.read(*clone));
  CHECK_EQ(f.read(*f.file), 'a');
}

void a_refusal_leaves_nothing(DiskBackend backend) {
  Fixture f(backend, 2);
  f.write('a');
  for (const SystemCall call : {SystemCall::kClone, SystemCall::kOpen, SystemCall::kUnlink,
                                SystemCall::kSetFlags, SystemCall::kUringSetup}) {
    const bool is_used = call == SystemCall::kUringSetup ? backend == DiskBackend::kUring
                         : call == SystemCall::kSetFlags ? f.file->facts()[0].direct
                                                         : true;
    for (size_t nth = 1; is_used && nth <= 2; ++nth) {
      f.calls->fail(call, nth, EOPNOTSUPP);
      CHECK_THROWS(ErrorKind::kStorage, "(EOPNOTSUPP)", f.file->clone());
      CHECK_EQ(test::open_scratch_files().size(), 2u);
      f.write('b');
      CHECK_EQ(f.read(*f.file), 'b');
    }
  }
  f.calls->fail(SystemCall::kClone, 1, EXDEV);
  CHECK_THROWS(ErrorKind::kStorage, "a reflink of a file in " + f.directories[0].path + " failed",
               f.file->clone());
  CHECK_EQ(f.read(*f.file->clone()), 'b');
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  std::vector<DiskBackend> backends = {DiskBackend::kThreads};
  if (has_uring()) backends.push_back(DiskBackend::kUring);
  for (const DiskBackend backend : backends) {
    for (size_t path_count : {1, 2, 3}) a_clone_keeps_its_bytes(backend, path_count);
    a_clone_that_goes_leaves_nothing(backend);
    a_lost_block_is_lost_in_its_clone(backend);
    a_flipped_bit_in_a_clone_is_found(backend);
    a_full_disk_costs_the_clone_and_no_write(backend);
    space_for_more_is_taken_from_a_clone(backend);
    a_refusal_leaves_nothing(backend);
  }
  a_clone_has_all_that_was_submitted();
  CHECK(test::open_scratch_files().empty());
  return test::result();
}
