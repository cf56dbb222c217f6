#include "base/cpu_count.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <thread>

namespace offload {
namespace {

// More CPUs than any machine has: ends the search for a mask size that the kernel accepts.
constexpr size_t kMaxMaskCpus = size_t{1} << 20;

// 0: this group sets no quota (or its files are not there).
size_t round_up_quota(double quota_us, double period_us) {
  if (quota_us <= 0 || period_us <= 0) return 0;
  const double cpus = quota_us / period_us;
  const auto whole = static_cast<size_t>(cpus);
  return whole + (static_cast<double>(whole) < cpus ? 1 : 0);
}

size_t quota_v2(const std::string& group) {
  double quota_us = 0, period_us = 0;  // an unlimited group reads "max 100000": the extraction fails
  std::ifstream(group + "/cpu.max") >> quota_us >> period_us;
  return round_up_quota(quota_us, period_us);
}

size_t quota_v1(const std::string& group) {
  double quota_us = 0, period_us = 0;  // an unlimited group reads -1
  std::ifstream(group + "/cpu.cfs_quota_us") >> quota_us;
  std::ifstream(group + "/cpu.cfs_period_us") >> period_us;
  return round_up_quota(quota_us, period_us);
}

size_t smaller_limit(size_t a, size_t b) { return a == 0 ? b : b == 0 ? a : std::min(a, b); }

// A limit of any ancestor binds too. Inside a container the path may name groups that are not visible
// here: then only the mount's own root answers.
size_t smallest_on_path(const std::string& root, std::string path, size_t (*quota)(const std::string&)) {
  size_t limit = 0;
  for (;;) {
    limit = smaller_limit(limit, quota(root + path));
    const size_t slash = path.find_last_of('/');
    if (path.empty() || slash == std::string::npos) return limit;
    path.resize(slash);
  }
}

}  // namespace

size_t affinity_cpu_count() {
  for (size_t cpus = CPU_SETSIZE; cpus <= kMaxMaskCpus; cpus *= 2) {
    cpu_set_t* mask = CPU_ALLOC(cpus);
    if (mask == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const bool known = sched_getaffinity(0, bytes, mask) == 0;  // fails when the machine has more CPUs
    const int count = known ? CPU_COUNT_S(bytes, mask) : 0;
    CPU_FREE(mask);
    if (known) return static_cast<size_t>(std::max(count, 1));
  }
  return std::max<size_t>(std::thread::hardware_concurrency(), 1);
}

size_t cgroup_cpu_limit(const std::string& membership, const std::string& mount) {
  size_t limit = 0;
  std::ifstream lines(membership);
  // A line is "hierarchy:controllers:path"; version 2 has no controllers.
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string hierarchy, controllers, path;
    std::getline(fields, hierarchy, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    if (path == "/") path.clear();
    if (controllers.empty()) {
      limit = smaller_limit(limit, smallest_on_path(mount, path, quota_v2));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      limit = smaller_limit(limit, smallest_on_path(mount + "/" + controllers, path, quota_v1));
      limit = smaller_limit(limit, smallest_on_path(mount + "/cpu", path, quota_v1));
    }
  }
  return limit;
}

}  // namespace offload
