#include "storage/path_lock.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <mutex>
#include <utility>

#include "base/fork_guard.h"
#include "storage/storage_error.h"

namespace offload {
namespace {

Error in_use(const std::string& directory, pid_t holder) {
  return Error(ErrorKind::kStorage,
               "disk_path " + directory + " is in use by " +
                   (holder > 0 ? "process " + std::to_string(holder) : std::string("another process")) +
                   ". Give each process a directory of its own, or end that process.",
               EBUSY);
}

// The locked file itself.
class LockFile {
 public:
  LockFile(std::shared_ptr<SystemCalls> calls, std::string directory)
      : calls_(std::move(calls)), directory_(std::move(directory)), path_(directory_ + "/" + kLockName) {
    while (!try_lock()) {
    }
    try {
      remove_stale_files();
    } catch (...) {
      ::close(file_);
      throw;
    }
  }

  ~LockFile() {
    // While the lock is held, so that nobody else's lock file is removed. A failure leaves an empty file.
    calls_->unlink(path_.c_str());
    ::close(file_);
  }

  LockFile(const LockFile&) = delete;
  LockFile& operator=(const LockFile&) = delete;

 private:
  // False: the file that was locked had just been removed by its owner.
  bool try_lock() {
    file_ = calls_->open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (file_ < 0) throw storage_error(-file_, "making the lock file " + path_);
    struct flock request{};
    request.l_type = F_WRLCK;
    request.l_whence = SEEK_SET;
    if (const int result = calls_->set_lock(file_, &request); result < 0) {
      struct flock holder = request;
      const bool is_known = ::fcntl(file_, F_GETLK, &holder) == 0 && holder.l_type != F_UNLCK;
      ::close(file_);
      if (result == -EACCES || result == -EAGAIN) throw in_use(directory_, is_known ? holder.l_pid : 0);
      throw storage_error(-result, "locking " + path_);
    }
    struct stat locked{}, named{};
    const bool is_same = ::fstat(file_, &locked) == 0 && ::stat(path_.c_str(), &named) == 0 &&
                         locked.st_dev == named.st_dev && locked.st_ino == named.st_ino;
    if (!is_same) ::close(file_);
    return is_same;
  }

  void remove_stale_files() {
    const std::unique_ptr<DIR, int (*)(DIR*)> listing(::opendir(directory_.c_str()), &::closedir);
    if (!listing) throw storage_error(errno, "listing disk_path " + directory_);
    while (const dirent* entry = ::readdir(listing.get())) {
      const std::string name = entry->d_name;
      if (!name.starts_with(kScratchPrefix)) continue;
      const std::string stale = directory_ + "/" + name;
      const int result = calls_->unlink(stale.c_str());
      if (result < 0 && result != -ENOENT) throw storage_error(-result, "removing the stale file " + stale);
    }
  }

  const std::shared_ptr<SystemCalls> calls_;
  const std::string directory_;
  const std::string path_;
  int file_ = -1;
};

}  // namespace

struct PathLock::Entry {
  size_t user_count = 0;
  std::unique_ptr<LockFile> file;
};

// A record lock belongs to the process, which loses it by closing any descriptor of the file: so each
// directory has one LockFile, made and removed under one mutex.
struct PathLock::Registry {
  const ForkGuard owner;
  std::mutex mutex;
  std::map<std::pair<dev_t, ino_t>, Entry> entries;  // guarded by mutex; entries keep their addresses
};

// A forked child has none of its parent's locks.
PathLock::Registry& PathLock::registry() {
  static OnePerProcess<Registry> registries;
  return registries.get();
}

PathLock::PathLock(const std::shared_ptr<SystemCalls>& calls, const std::string& directory)
    : registry_(&registry()) {
  struct stat facts{};
  if (::stat(directory.c_str(), &facts) != 0) throw storage_error(errno, "opening disk_path " + directory);
  if (!S_ISDIR(facts.st_mode)) throw storage_error(ENOTDIR, "opening disk_path " + directory);
  std::lock_guard lock(registry_->mutex);
  Entry& entry = registry_->entries[{facts.st_dev, facts.st_ino}];
  if (!entry.file) entry.file = std::make_unique<LockFile>(calls, directory);
  ++entry.user_count;
  entry_ = &entry;
}

PathLock::~PathLock() {
  if (registry_->owner.forked()) return;  // the parent's lock: the child's descriptor goes with the child
  std::lock_guard lock(registry_->mutex);
  if (--entry_->user_count == 0) entry_->file.reset();
}

}  // namespace offload
