// A private file without a name in a directory of disk_path: it goes with its descriptor, however the
// process ends.
//
// Ownership: owns the descriptor, and is a user of the directory.
// Threads: reserve() and clone() by one thread at a time; all else, and reads and writes of the descriptor,
//          from any.
// Units: bytes; in direct mode offsets, lengths and addresses are multiples of kDiskAlignment.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "storage/path_lock.h"
#include "storage/system_calls.h"

namespace offload {

// What every drive in use takes for O_DIRECT: their sectors have 512 or 4096 bytes.
constexpr size_t kDiskAlignment = 4096;

class ScratchFile {
 public:
  // Throws kStorage when the directory cannot be used: missing, read-only, memory (tmpfs), in use. With
  // `direct`, O_DIRECT is used where a first write shows that the file system takes it.
  ScratchFile(std::shared_ptr<SystemCalls> calls, std::string directory, bool direct);
  ~ScratchFile();
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  // Grows the file to `bytes`, with space on the disk for all of them. Throws kStorage, and changes nothing,
  // when there is none. Where the file system cannot reserve, free space is compared and reserved() is false.
  void reserve(uint64_t bytes);

  // A file of the same bytes in the same directory, to be read: a reflink. What is written here later takes
  // new space on the disk as long as it lives. Throws kStorage where the file system refuses.
  std::unique_ptr<ScratchFile> clone() const;

  // This file is full, or a write to it: clones give up their bytes, so that writes need no more space than
  // without them. Their reads fail from then on. False: there never was a clone.
  bool unshare() const noexcept;

  // Of a clone: whether it gave up its bytes.
  bool given_up() const noexcept { return given_up_.load(); }

  // Back to `bytes`, as reserve() of another file of the stripe failed.
  void shrink(uint64_t bytes) noexcept;

  int descriptor() const noexcept { return file_; }
  uint64_t size_bytes() const noexcept { return size_bytes_; }
  const std::string& directory() const noexcept { return directory_; }
  const std::string& path() const noexcept { return path_; }  // for messages: the file had this name
  const PathLock& lock() const noexcept { return lock_; }

  std::string file_system_name() const;
  bool direct() const noexcept { return direct_; }
  const std::string& direct_refusal() const noexcept { return direct_refusal_; }
  bool reserved() const noexcept { return reservation_refusal_.empty(); }
  const std::string& reservation_refusal() const noexcept { return reservation_refusal_; }

 private:
  struct Sharing;

  explicit ScratchFile(const ScratchFile& original, int direct_flag);
  void open();
  void refuse_memory();
  void try_direct();
  int try_to_reserve(uint64_t bytes);

  const std::shared_ptr<SystemCalls> calls_;
  const std::string directory_;
  const PathLock lock_;
  std::string path_;
  int file_ = -1;
  long file_system_ = 0;
  bool direct_ = false;
  std::string direct_refusal_;
  uint64_t size_bytes_ = 0;
  std::string reservation_refusal_;
  const std::shared_ptr<Sharing> sharing_;  // of a file with its clones
  const bool is_clone_;
  std::atomic<bool> given_up_{false};
};

}  // namespace offload
