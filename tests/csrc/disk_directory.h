// A directory for the tests of the disk tier, and a look behind their backs.
//
// Ownership: owns the directory, which goes with it.
// Threads: used by the test's thread alone.
#pragma once

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "storage/block_file.h"
#include "storage/failing_system_calls.h"

namespace offload::test {

inline constexpr long kExt4 = 0xEF53;

inline std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  DIR* const listing = ::opendir(directory.c_str());
  if (listing == nullptr) return names;
  while (const dirent* entry = ::readdir(listing)) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  ::closedir(listing);
  return names;
}

class DiskDirectory {
 public:
  DiskDirectory() {
    char pattern[] = "disk-test-XXXXXX";  // in the build folder
    if (::mkdtemp(pattern) == nullptr) std::abort();
    path = pattern;
  }
  ~DiskDirectory() {
    for (const std::string& name : names_in(path)) ::unlink((path + "/" + name).c_str());
    ::rmdir(path.c_str());
  }
  DiskDirectory(const DiskDirectory&) = delete;
  DiskDirectory& operator=(const DiskDirectory&) = delete;

  std::string path;
};

// Calls that are honest until told otherwise, on a file system that passes for a disk wherever the test runs.
inline std::shared_ptr<FailingSystemCalls> honest_calls() {
  auto calls = std::make_shared<FailingSystemCalls>();
  calls->pretend_file_system(kExt4);
  return calls;
}

// The open scratch files of this process, as paths that can be opened: their own names are gone.
inline std::vector<std::string> open_scratch_files() {
  std::vector<std::string> found;
  for (const std::string& name : names_in("/proc/self/fd")) {
    const std::string link = "/proc/self/fd/" + name;
    char target[4096] = {};
    if (::readlink(link.c_str(), target, sizeof(target) - 1) < 0) continue;
    if (std::strstr(target, kScratchPrefix) != nullptr) found.push_back(link);
  }
  return found;
}

// Memory as a block file needs it.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t bytes, char fill = 0)
      : size_((bytes + kDiskAlignment - 1) / kDiskAlignment * kDiskAlignment),
        data_(static_cast<char*>(std::aligned_alloc(kDiskAlignment, size_)), &std::free) {
    std::memset(data_.get(), fill, size_);
  }
  char* data() noexcept { return data_.get(); }
  char& operator[](size_t index) noexcept { return data_.get()[index]; }

 private:
  size_t size_;
  std::unique_ptr<char, decltype(&std::free)> data_;
};

}  // namespace offload::test
