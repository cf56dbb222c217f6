#include "storage/system_calls.h"

#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace offload {
namespace {

template <typename Result>
Result or_code(Result result) {
  return result < 0 ? static_cast<Result>(-errno) : result;
}

}  // namespace

int SystemCalls::open(const char* path, int flags, mode_t mode) { return or_code(::open(path, flags, mode)); }
int SystemCalls::unlink(const char* path) { return or_code(::unlink(path)); }
int SystemCalls::set_lock(int file, struct flock* lock) { return or_code(::fcntl(file, F_SETLK, lock)); }
int SystemCalls::file_system(int file, struct statfs* facts) { return or_code(::fstatfs(file, facts)); }
int SystemCalls::set_flags(int file, int flags) { return or_code(::fcntl(file, F_SETFL, flags)); }

int SystemCalls::allocate(int file, off_t offset, off_t length) {
  return or_code(::fallocate(file, 0, offset, length));
}

int SystemCalls::truncate(int file, off_t length) { return or_code(::ftruncate(file, length)); }

int SystemCalls::clone(int file, int original) { return or_code(::ioctl(file, FICLONE, original)); }

ssize_t SystemCalls::pread(int file, void* destination, size_t bytes, off_t offset) {
  return or_code(::pread(file, destination, bytes, offset));
}

ssize_t SystemCalls::pwrite(int file, const void* source, size_t bytes, off_t offset) {
  return or_code(::pwrite(file, source, bytes, offset));
}

int SystemCalls::uring_setup(unsigned entries, UringParameters* parameters) {
  return static_cast<int>(or_code(::syscall(kUringSetupNumber, entries, parameters)));
}

int SystemCalls::uring_map(int ring, size_t bytes, uint64_t offset, void** address) {
  *address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                    static_cast<off_t>(offset));
  return *address == MAP_FAILED ? -errno : 0;
}

int SystemCalls::uring_enter(int ring, unsigned submit_count, unsigned wait_count) {
  const unsigned flags = wait_count > 0 ? kUringEnterGetEvents : 0;
  return static_cast<int>(
      or_code(::syscall(kUringEnterNumber, ring, submit_count, wait_count, flags, nullptr, 0)));
}

int SystemCalls::uring_result(bool, int result) { return result; }

std::shared_ptr<SystemCalls> SystemCalls::kernel() {
  static const auto calls = std::make_shared<SystemCalls>();
  return calls;
}

}  // namespace offload
