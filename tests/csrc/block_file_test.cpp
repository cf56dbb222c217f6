#include "storage/block_file.h"

#include <cerrno>
#include <random>

#include "check.h"
#include "disk_directory.h"
#include "storage/checksum.h"

namespace offload {
namespace {

using test::AlignedBytes;
using test::DiskDirectory;
using test::honest_calls;

constexpr size_t kBlock = kDiskAlignment;

struct Setting {
  DiskBackend backend;
  bool direct;
};

// What this machine has: a sandbox may have no io_uring, a file system no O_DIRECT.
std::vector<Setting> every_setting() {
  std::vector<Setting> settings;
  DiskDirectory directory;
  const BlockFile probe({.directories = {directory.path}, .block_bytes = kBlock, .calls = honest_calls()});
  for (bool direct : {true, false}) {
    if (direct && !probe.facts()[0].direct) continue;
    settings.push_back({DiskBackend::kThreads, direct});
    if (probe.facts()[0].backend == DiskBackend::kUring) settings.push_back({DiskBackend::kUring, direct});
  }
  return settings;
}

struct Fixture {
  explicit Fixture(Setting setting, size_t path_count = 1) : directories(path_count) {
    BlockFileOptions options{.directories = {},
                             .block_bytes = kBlock,
                             .queue_depth = 4,
                             .thread_count = 3,
                             .backend = setting.backend,
                             .direct = setting.direct,
                             .calls = calls};
    for (const DiskDirectory& directory : directories) options.directories.push_back(directory.path);
    file = std::make_unique<BlockFile>(options);
  }

  void write(uint64_t offset, const std::string& text) {
    AlignedBytes source(text.size());
    std::memcpy(source.data(), text.data(), text.size());
    last = file->submit_write(offset, source.data(), text.size());
    last.wait();
  }

  std::string read(uint64_t offset, size_t bytes) {
    AlignedBytes destination(bytes, '?');
    last = file->submit_read(offset, destination.data(), bytes);
    last.wait();
    return {destination.data(), bytes};
  }

  std::shared_ptr<FailingSystemCalls> calls = honest_calls();
  std::vector<DiskDirectory> directories;
  std::unique_ptr<BlockFile> file;
  Ticket last;  // outlives the reading of its error: ThreadSanitizer does not see exceptions being counted
};

std::string text_of(size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  std::string text(bytes, ' ');
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

void checksums_agree_and_see_every_bit() {
  std::string text = text_of(300, 1);
  for (size_t bytes = 0; bytes <= text.size(); ++bytes) {
    CHECK_EQ(block_checksum(text.data(), bytes), block_checksum_by_table(text.data(), bytes));
  }
  const uint32_t honest = block_checksum(text.data(), text.size());
  for (size_t bit = 0; bit < 8 * text.size(); ++bit) {
    text[bit / 8] = static_cast<char>(text[bit / 8] ^ (1 << (bit % 8)));
    CHECK(block_checksum(text.data(), text.size()) != honest);
    text[bit / 8] = static_cast<char>(text[bit / 8] ^ (1 << (bit % 8)));
  }
  const std::string zeros(64, '\0');
  CHECK(block_checksum(zeros.data(), 40) != block_checksum(zeros.data(), 41));
}

void bytes_come_back(Setting setting, size_t path_count) {
  Fixture f(setting, path_count);
  const std::vector<size_t> sizes = {1, kBlock, kBlock + 1, 7 * kBlock, 5 * kBlock - 3};
  std::vector<uint64_t> offsets;
  for (size_t i = 0; i < sizes.size(); ++i) {
    offsets.push_back(f.file->allocate(sizes[i]));
    f.write(offsets[i], text_of(sizes[i], static_cast<unsigned>(i)));
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    CHECK(f.read(offsets[i], sizes[i]) == text_of(sizes[i], static_cast<unsigned>(i)));
  }
  CHECK(f.read(offsets[4] + 2 * kBlock, 3 * kBlock - 3) == text_of(sizes[4], 4).substr(2 * kBlock));
  uint64_t allocated = 0, written = 0;
  for (const DiskPathFacts& facts : f.file->facts()) {
    CHECK_EQ(facts.direct, setting.direct);
    CHECK(facts.backend == setting.backend);
    CHECK(facts.allocated_bytes >= 16 / path_count * kBlock);
    allocated += facts.allocated_bytes;
    written += facts.stats.written_bytes;
  }
  CHECK_EQ(allocated, 16 * kBlock);
  CHECK_EQ(written, 1 + kBlock + kBlock + 1 + 7 * kBlock + 5 * kBlock - 3);
}

void operations_on_a_block_keep_their_order(Setting setting) {
  Fixture f(setting);
  const uint64_t offset = f.file->allocate(2 * kBlock);
  std::vector<AlignedBytes> sources, destinations;
  std::vector<Ticket> tickets;
  for (int i = 0; i < 60; ++i) {
    sources.emplace_back(2 * kBlock, static_cast<char>(i));
    destinations.emplace_back(2 * kBlock);
  }
  for (size_t i = 0; i < sources.size(); ++i) {
    tickets.push_back(f.file->submit_write(offset, sources[i].data(), 2 * kBlock));
    tickets.push_back(f.file->submit_read(offset, destinations[i].data(), 2 * kBlock));
  }
  for (const Ticket& ticket : tickets) ticket.wait();
  for (size_t i = 0; i < sources.size(); ++i) {
    CHECK(std::memcmp(sources[i].data(), destinations[i].data(), 2 * kBlock) == 0);
  }
}

void bad_requests_change_nothing(Setting setting) {
  Fixture f(setting);
  AlignedBytes memory(4 * kBlock);
  const uint64_t offset = f.file->allocate(3 * kBlock);
  f.write(offset, text_of(kBlock + 10, 1));
  const auto refused = [&](ErrorKind kind, const char* part, uint64_t at, char* address, uint64_t bytes) {
    CHECK_THROWS(kind, part, f.file->submit_read(at, address, bytes));
  };
  refused(ErrorKind::kInvalidArgument, "multiples of block_bytes", offset + 1, memory.data(), 1);
  refused(ErrorKind::kInvalidArgument, "passes the end", offset, memory.data(), 3 * kBlock + 1);
  refused(ErrorKind::kInvalidArgument, "passes the end", UINT64_MAX - kBlock + 1, memory.data(), kBlock);
  refused(ErrorKind::kInvalidArgument, "alignment=4096", offset, memory.data() + 256, kBlock);
  refused(ErrorKind::kInvalidArgument, "alignment=4096", offset, nullptr, kBlock);
  refused(ErrorKind::kInvalidArgument, "where 10 were written", offset, memory.data(), 2 * kBlock);
  refused(ErrorKind::kState, "never written", offset + 2 * kBlock, memory.data(), kBlock);
  CHECK(f.file->submit_read(offset, nullptr, 0).done());
  CHECK(f.read(offset, kBlock + 10) == text_of(kBlock + 10, 1));
}

void a_flipped_bit_is_found(Setting setting) {
  Fixture f(setting);
  const uint64_t offset = f.file->allocate(3 * kBlock);
  f.write(offset, text_of(3 * kBlock, 5));
  const std::vector<std::string> files = test::open_scratch_files();
  CHECK_EQ(files.size(), 1u);
  const int descriptor = ::open(files[0].c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
  AlignedBytes block(kBlock);
  CHECK_EQ(::pread(descriptor, block.data(), kBlock, kBlock), static_cast<ssize_t>(kBlock));
  block[1234] = static_cast<char>(block[1234] ^ 16);
  CHECK_EQ(::pwrite(descriptor, block.data(), kBlock, kBlock), static_cast<ssize_t>(kBlock));
  ::close(descriptor);
  CHECK_THROWS(ErrorKind::kStorage, "at offset 4096 of " + f.directories[0].path, f.read(offset, 3 * kBlock));
  CHECK_THROWS(ErrorKind::kStorage, "checksum", f.read(offset + kBlock, kBlock));
  CHECK(f.read(offset, kBlock) == text_of(3 * kBlock, 5).substr(0, kBlock));
  f.write(offset + kBlock, text_of(kBlock, 6));
  CHECK(f.read(offset + kBlock, kBlock) == text_of(kBlock, 6));
}

void a_truncated_file_is_found(Setting setting) {
  Fixture f(setting);
  const uint64_t offset = f.file->allocate(2 * kBlock);
  f.write(offset, text_of(2 * kBlock, 5));
  CHECK_EQ(::truncate(test::open_scratch_files()[0].c_str(), kBlock), 0);
  CHECK_THROWS(ErrorKind::kStorage, "it moved 0 of 4096 bytes", f.read(offset, 2 * kBlock));
}

void the_file_is_private_and_nameless(Setting setting) {
  Fixture f(setting);
  struct stat facts{};
  CHECK_EQ(::stat(test::open_scratch_files()[0].c_str(), &facts), 0);
  CHECK_EQ(facts.st_mode & 0777, 0600u);
  CHECK_EQ(facts.st_nlink, 0u);
  CHECK(test::names_in(f.directories[0].path) == std::vector<std::string>{kLockName});
  f.file.reset();
  CHECK(test::names_in(f.directories[0].path).empty());
  CHECK(test::open_scratch_files().empty());
}

void what_has_not_begun_when_the_file_goes_is_told(Setting setting) {
  Fixture f(setting);
  const uint64_t offset = f.file->allocate(256 * kBlock);
  AlignedBytes source(256 * kBlock, 'x');
  std::vector<Ticket> tickets;
  for (int i = 0; i < 20; ++i) tickets.push_back(f.file->submit_write(offset, source.data(), 256 * kBlock));
  f.file.reset();
  for (const Ticket& ticket : tickets) {
    CHECK(ticket.done());
    if (!ticket.error()) continue;
    CHECK_THROWS(ErrorKind::kState, "closed before", ticket.wait());
  }
}

void users_of_one_directory_share_its_lock() {
  DiskDirectory directory;
  const BlockFileOptions options{.directories = {directory.path}, .calls = honest_calls()};
  auto first = std::make_unique<BlockFile>(options);
  auto second = std::make_unique<BlockFile>(options);
  first.reset();
  CHECK_EQ(test::names_in(directory.path).size(), 1u);
  second.reset();
  CHECK(test::names_in(directory.path).empty());
  BlockFileOptions twice = options;
  twice.directories = {directory.path, directory.path + "/."};
  CHECK_THROWS(ErrorKind::kInvalidArgument, "twice", BlockFile{twice});
}

void stale_files_are_removed() {
  DiskDirectory directory;
  const std::string stale = directory.path + "/" + kScratchPrefix + "1-0";
  const std::string other = directory.path + "/mine";
  for (const std::string& path : {stale, other}) ::close(::open(path.c_str(), O_CREAT | O_WRONLY, 0600));
  {
    const BlockFile file({.directories = {directory.path}, .calls = honest_calls()});
  }
  CHECK(test::names_in(directory.path) == std::vector<std::string>{"mine"});
}

void options_are_checked() {
  DiskDirectory directory;
  const auto with = [&](auto change) {
    BlockFileOptions options{.directories = {directory.path}, .calls = honest_calls()};
    change(options);
    return options;
  };
  const auto refused = [&](const char* part, auto change) {
    CHECK_THROWS(ErrorKind::kInvalidArgument, part, BlockFile{with(change)});
  };
  refused("disk_path is empty", [](auto& o) { o.directories.clear(); });
  refused("block_bytes=5000", [](auto& o) { o.block_bytes = 5000; });
  refused("block_bytes=0", [](auto& o) { o.block_bytes = 0; });
  refused("queue_depth=0", [](auto& o) { o.queue_depth = 0; });
  refused("thread_count=0", [](auto& o) { o.thread_count = 0; });
  ::setenv("OFFLOAD_DISK_BACKEND", "libaio", 1);
  refused("OFFLOAD_DISK_BACKEND=libaio", [](auto&) {});
  ::setenv("OFFLOAD_DISK_BACKEND", "threads", 1);
  CHECK(BlockFile{with([](auto&) {})}.facts()[0].backend == DiskBackend::kThreads);
  ::unsetenv("OFFLOAD_DISK_BACKEND");
  CHECK(test::names_in(directory.path).empty());
}

void what_waits_for_tickets_comes_after_them(Setting setting) {
  Fixture fixture(setting);
  BlockFile& file = *fixture.file;
  file.allocate(4 * kBlock);
  fixture.write(0, "first");
  AlignedBytes image(kBlock), place(kBlock, '?');
  std::memcpy(image.data(), "other", 5);
  const Ticket update = Ticket::pending(), upload = Ticket::pending();
  // As weights go: written when their update has ended, and another's read into the place after that.
  const Ticket written = file.submit_write_after(update, 0, image.data(), 5);
  const Ticket read = file.submit_read_after({written, upload}, 0, place.data(), 5);
  CHECK(!written.done() && !read.done());
  upload.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "of somebody else")));
  CHECK(!written.done() && !read.done());
  CHECK(place[0] == '?');
  update.complete();
  read.wait();
  CHECK(written.done() && std::string(place.data(), 5) == "other");

  const Ticket failing = Ticket::pending();
  const Ticket unwritten = file.submit_write_after(failing, 0, place.data(), 5);
  failing.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the update failed")));
  CHECK_THROWS(ErrorKind::kDevice, "the update failed", unwritten.wait());
  CHECK(fixture.read(0, 5) == "other");
  // What submit_read would throw is the ticket's: this block was never written.
  CHECK_THROWS(ErrorKind::kState, "never written",
               file.submit_read_after({}, kBlock, place.data(), 5).wait());

  const Ticket never = Ticket::pending();
  const Ticket late_write = file.submit_write_after(never, 0, image.data(), 5);
  const Ticket late_read = file.submit_read_after({never, late_write}, 0, place.data(), 5);
  fixture.file.reset();
  never.complete();
  CHECK_THROWS(ErrorKind::kState, "given up", late_write.wait());
  CHECK_THROWS(ErrorKind::kState, "given up", late_read.wait());
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  checksums_agree_and_see_every_bit();
  for (const Setting setting : every_setting()) {
    for (size_t path_count : {1, 2, 3}) bytes_come_back(setting, path_count);
    operations_on_a_block_keep_their_order(setting);
    bad_requests_change_nothing(setting);
    a_flipped_bit_is_found(setting);
    a_truncated_file_is_found(setting);
    the_file_is_private_and_nameless(setting);
    what_has_not_begun_when_the_file_goes_is_told(setting);
    what_waits_for_tickets_comes_after_them(setting);
  }
  users_of_one_directory_share_its_lock();
  stale_files_are_removed();
  options_are_checked();
  return test::result();
}
