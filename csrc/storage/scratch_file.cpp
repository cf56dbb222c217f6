#include "storage/scratch_file.h"

#include <linux/magic.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include "storage/storage_error.h"

namespace offload {
namespace {

struct KnownFileSystem {
  long type;
  const char* name;
  bool is_memory;
};

// Numbers that older kernel headers lack are written out.
constexpr KnownFileSystem kKnownFileSystems[] = {
    {TMPFS_MAGIC, "tmpfs", true},         {RAMFS_MAGIC, "ramfs", true},
    {HUGETLBFS_MAGIC, "hugetlbfs", true}, {EXT4_SUPER_MAGIC, "ext4", false},
    {BTRFS_SUPER_MAGIC, "btrfs", false},  {NFS_SUPER_MAGIC, "nfs", false},
    {0x58465342, "xfs", false},           {0x794C7630, "overlayfs", false},
    {0x65735546, "fuse", false},          {0x2FC12FC1, "zfs", false},
};

const KnownFileSystem* find_file_system(long type) {
  for (const KnownFileSystem& known : kKnownFileSystems) {
    if (known.type == type) return &known;
  }
  return nullptr;
}

bool is_full(int result) { return result == -ENOSPC || result == -EDQUOT; }

alignas(kDiskAlignment) const char kZeros[kDiskAlignment] = {};

}  // namespace

struct ScratchFile::Sharing {
  std::mutex mutex;
  // guarded by mutex
  std::vector<ScratchFile*> clones;
  bool was_cloned = false;
};

ScratchFile::ScratchFile(std::shared_ptr<SystemCalls> calls, std::string directory, bool direct)
    : calls_(std::move(calls)),
      directory_(std::move(directory)),
      lock_(calls_, directory_),
      sharing_(std::make_shared<Sharing>()),
      is_clone_(false) {
  open();
  try {
    refuse_memory();
    if (direct) {
      try_direct();
    } else {
      direct_refusal_ = "not asked for";
    }
  } catch (...) {
    ::close(file_);
    throw;
  }
}

ScratchFile::ScratchFile(const ScratchFile& original, int direct_flag)
    : calls_(original.calls_),
      directory_(original.directory_),
      lock_(calls_, directory_),
      file_system_(original.file_system_),
      direct_(original.direct_),
      direct_refusal_(original.direct_refusal_),
      size_bytes_(original.size_bytes_),
      reservation_refusal_(original.reservation_refusal_),
      sharing_(original.sharing_),
      is_clone_(true) {
  open();
  int result = calls_->clone(file_, original.file_);
  if (result == 0 && direct_flag != 0)
    result = calls_->set_flags(file_, ::fcntl(file_, F_GETFL) | direct_flag);
  if (result < 0) {
    ::close(file_);
    throw Error(ErrorKind::kStorage,
                "a reflink of a file in " + directory_ +
                    " failed: " + std::generic_category().message(-result) + " (" + error_name(-result) +
                    "). Of the file systems of a disk_path, XFS and btrfs have reflinks.",
                -result);
  }
  std::lock_guard lock(sharing_->mutex);
  sharing_->clones.push_back(this);
  sharing_->was_cloned = true;
}

ScratchFile::~ScratchFile() {
  if (is_clone_) {
    // Under the lock, so that who finds no clone finds its space free. The bytes go before the descriptor,
    // which a forked child may have too, and on file systems that give back space some time after a close.
    std::lock_guard lock(sharing_->mutex);
    std::erase(sharing_->clones, this);
    calls_->truncate(file_, 0);
  }
  ::close(file_);
}

std::unique_ptr<ScratchFile> ScratchFile::clone() const {
  return std::unique_ptr<ScratchFile>(new ScratchFile(*this, direct_ ? O_DIRECT : 0));
}

bool ScratchFile::unshare() const noexcept {
  std::lock_guard lock(sharing_->mutex);
  for (ScratchFile* clone : sharing_->clones) {
    if (!clone->given_up_.exchange(true)) calls_->truncate(clone->file_, 0);
  }
  return sharing_->was_cloned;
}

void ScratchFile::open() {
  static std::atomic<uint64_t> serial{0};
  path_ = directory_ + "/" + kScratchPrefix + std::to_string(::getpid()) + "-" + std::to_string(serial++);
  file_ = calls_->open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file_ < 0) throw storage_error(-file_, "making the file " + path_);
  if (const int result = calls_->unlink(path_.c_str()); result < 0) {
    calls_->unlink(path_.c_str());  // once more: a clone's directory may be in use for long
    ::close(file_);                 // the file is stale now: who locks the directory next removes it
    throw storage_error(-result, "unlinking the file " + path_);
  }
}

void ScratchFile::refuse_memory() {
  struct statfs facts{};
  if (const int result = calls_->file_system(file_, &facts); result < 0) {
    throw storage_error(-result, "asking for the file system of " + directory_);
  }
  file_system_ = static_cast<long>(facts.f_type);
  const KnownFileSystem* known = find_file_system(file_system_);
  if (known != nullptr && known->is_memory) {
    throw Error(ErrorKind::kStorage,
                "disk_path " + directory_ + " is on " + known->name +
                    ", which is host memory: what goes there saves none. Name a directory "
                    "on a disk.");
  }
}

// Some file systems take the flag and refuse the first transfer, so that one decides.
void ScratchFile::try_direct() {
  const int flags = ::fcntl(file_, F_GETFL);
  if (const int result = calls_->set_flags(file_, flags | O_DIRECT); result < 0) {
    direct_refusal_ = "the file system refuses O_DIRECT: " + error_name(-result);
    return;
  }
  ssize_t written;
  do {
    written = calls_->pwrite(file_, kZeros, sizeof(kZeros), 0);
  } while (written == -EINTR);
  if (written == -EINVAL) {
    direct_refusal_ = "the file system refuses direct writes of " + std::to_string(kDiskAlignment) + " bytes";
    if (const int result = calls_->set_flags(file_, flags); result < 0) {
      throw storage_error(-result, "leaving O_DIRECT on " + path_);
    }
    return;
  }
  if (written < 0) throw storage_error(static_cast<int>(-written), "the first write to " + path_);
  direct_ = true;
}

void ScratchFile::reserve(uint64_t bytes) {
  if (bytes <= size_bytes_) return;
  int result = try_to_reserve(bytes);
  if (is_full(result) && unshare()) result = try_to_reserve(bytes);
  if (result < 0) {
    throw storage_error(-result,
                        "reserving " + std::to_string(bytes - size_bytes_) + " bytes in " + directory_);
  }
  size_bytes_ = bytes;
}

int ScratchFile::try_to_reserve(uint64_t bytes) {
  const uint64_t more_bytes = bytes - size_bytes_;
  struct statfs facts{};
  int result = calls_->file_system(file_, &facts);
  // Compared first: fallocate may take all that is left, from everybody, before it finds it too little.
  // Blocks are counted in fragments, which f_bsize, the best transfer of a network file system, may exceed.
  const auto fragment_bytes = static_cast<uint64_t>(facts.f_frsize != 0 ? facts.f_frsize : facts.f_bsize);
  const uint64_t free_bytes = static_cast<uint64_t>(facts.f_bavail) * fragment_bytes;
  if (result == 0 && free_bytes < more_bytes) result = -ENOSPC;
  if (result == 0) {
    do {
      result = calls_->allocate(file_, static_cast<off_t>(size_bytes_), static_cast<off_t>(more_bytes));
    } while (result == -EINTR);
    if (result == -EOPNOTSUPP) {
      reservation_refusal_ = "the file system has no fallocate";
      result = calls_->truncate(file_, static_cast<off_t>(bytes));
    }
    if (result < 0) shrink(size_bytes_);  // what failed may have grown the file
  }
  return result;
}

void ScratchFile::shrink(uint64_t bytes) noexcept {
  // What cannot be given back stays reserved until the file is closed.
  calls_->truncate(file_, static_cast<off_t>(bytes));
  size_bytes_ = bytes;
}

std::string ScratchFile::file_system_name() const {
  if (const KnownFileSystem* known = find_file_system(file_system_)) return known->name;
  char hexadecimal[32];
  std::snprintf(hexadecimal, sizeof(hexadecimal), "type 0x%lx", static_cast<unsigned long>(file_system_));
  return hexadecimal;
}

}  // namespace offload
