// How many CPUs this process may use, as the affinity mask and the control groups say.
//
// Threads: pure functions of /proc and /sys; callable from any thread.
// Units: CPUs; a fractional quota is rounded up (half a CPU left idle costs more than throttling).
#pragma once

#include <cstddef>
#include <string>

namespace offload {

// The number of CPUs in the calling thread's affinity mask; at least 1.
size_t affinity_cpu_count();

// The smallest CPU quota of the process's control group and its ancestors, version 1 or 2; 0 when
// there is none. `membership` is /proc/self/cgroup and `mount` is /sys/fs/cgroup, except in tests.
size_t cgroup_cpu_limit(const std::string& membership = "/proc/self/cgroup",
                        const std::string& mount = "/sys/fs/cgroup");

}  // namespace offload
