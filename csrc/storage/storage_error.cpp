#include "storage/storage_error.h"

#include <cerrno>
#include <system_error>

namespace offload {
namespace {

struct KnownCode {
  int code;
  const char* name;
  const char* remedy;
};

constexpr char kFailingDrive[] =
    "The drive or its connection is failing: see the kernel's log (dmesg), name another disk_path and go on "
    "from the last checkpoint.";
constexpr char kNoPermission[] = "Give this user the right to write there, or name another disk_path.";

constexpr KnownCode kKnownCodes[] = {
    {EACCES, "EACCES", kNoPermission},
    {EPERM, "EPERM", kNoPermission},
    {EROFS, "EROFS", "The file system is read-only: name a writable disk_path."},
    {ENOENT, "ENOENT", "Create the directory, or name an existing disk_path."},
    {ENOTDIR, "ENOTDIR", "disk_path must be a directory."},
    {ENOSPC, "ENOSPC", "Free space on that file system, or name more or larger ones in disk_path."},
    {EDQUOT, "EDQUOT", "The quota of this user is used up: raise it, or name another disk_path."},
    {EFBIG, "EFBIG", "Raise the limit of the file size (ulimit -f), or name more paths in disk_path."},
    {EIO, "EIO", kFailingDrive},
    {ESTALE, "ESTALE", "The network file system lost the file: use a local disk as disk_path."},
    {EMFILE, "EMFILE", "Raise the limit of open files (ulimit -n)."},
    {ENFILE, "ENFILE", "Raise the system's limit of open files (fs.file-max)."},
    {ENOMEM, "ENOMEM", "The kernel has no memory for it: free some, or lower queue_depth."},
    {EINVAL, "EINVAL", "The file system refuses the operation: name a disk_path on ext4, xfs or btrfs."},
    {EOPNOTSUPP, "EOPNOTSUPP",
     "The file system refuses the operation: name a disk_path on ext4, xfs or btrfs."},
    {ENOSYS, "ENOSYS", "This kernel does not know the call."},
    {EINTR, "EINTR", "A signal stopped it: try again."},
    {EAGAIN, "EAGAIN", "The system is short of something for now: try again."},
    {EBUSY, "EBUSY", "The system is short of something for now: try again."},
};

const KnownCode* find(int code) {
  for (const KnownCode& known : kKnownCodes) {
    if (known.code == code) return &known;
  }
  return nullptr;
}

}  // namespace

std::string error_name(int code) {
  const KnownCode* known = find(code);
  return known != nullptr ? known->name : "errno " + std::to_string(code);
}

Error storage_error(int code, const std::string& doing) {
  const KnownCode* known = find(code);
  return Error(ErrorKind::kStorage,
               doing + " failed: " + std::generic_category().message(code) + " (" + error_name(code) + "). " +
                   (known != nullptr ? known->remedy : kFailingDrive),
               code);
}

}  // namespace offload
