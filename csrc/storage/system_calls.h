// The calls of the operating system that the disk tier depends on, so that a test can make any of them fail.
//
// Threads: every member may be called from any thread.
// Invariants: as the kernel itself, each returns a result >= 0 or a negative errno; nothing is retried here.
#pragma once

#include <fcntl.h>
#include <sys/types.h>
#include <sys/vfs.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "storage/uring_abi.h"

namespace offload {

class SystemCalls {
 public:
  virtual ~SystemCalls() = default;

  virtual int open(const char* path, int flags, mode_t mode);
  virtual int unlink(const char* path);
  virtual int set_lock(int file, struct flock* lock);          // fcntl(F_SETLK)
  virtual int file_system(int file, struct statfs* facts);     // fstatfs
  virtual int set_flags(int file, int flags);                  // fcntl(F_SETFL)
  virtual int allocate(int file, off_t offset, off_t length);  // fallocate
  virtual int truncate(int file, off_t length);                // ftruncate
  virtual int clone(int file, int original);                   // ioctl(FICLONE)
  virtual ssize_t pread(int file, void* destination, size_t bytes, off_t offset);
  virtual ssize_t pwrite(int file, const void* source, size_t bytes, off_t offset);
  virtual int uring_setup(unsigned entries, UringParameters* parameters);
  virtual int uring_map(int ring, size_t bytes, uint64_t offset, void** address);  // mmap
  virtual int uring_enter(int ring, unsigned submit_count, unsigned wait_count);

  // What io_uring says about an ended read or write, given back unchanged: here a test puts its own.
  virtual int uring_result(bool is_write, int result);

  // Those of the kernel.
  static std::shared_ptr<SystemCalls> kernel();
};

}  // namespace offload
