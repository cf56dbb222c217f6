#include "base/worker_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu_count.h"
#include "check.h"

namespace offload {
namespace {

void every_index_runs_once() {
  for (size_t threads : {1, 2, 5}) {
    WorkerPool pool(threads);
    CHECK_EQ(pool.thread_count(), threads);
    for (size_t count : {0, 1, 2, 3, 64, 1000}) {
      std::vector<std::atomic<int>> runs(count);
      pool.parallel_for(count, [&](size_t i) { ++runs[i]; });
      for (const auto& run : runs) CHECK_EQ(run.load(), 1);
    }
  }
}

// Every index waits until all have begun, so each needs a thread of its own.
void all_threads_take_part() {
  constexpr size_t kThreads = 4;
  WorkerPool pool(kThreads);
  std::mutex mutex;
  std::condition_variable all_began;
  size_t begun = 0;
  pool.parallel_for(kThreads, [&](size_t) {
    std::unique_lock lock(mutex);
    if (++begun == kThreads) all_began.notify_all();
    all_began.wait(lock, [&] { return begun == kThreads; });
  });
  CHECK_EQ(begun, kThreads);
}

void writes_are_seen_by_the_caller_and_the_next_loop() {
  WorkerPool pool(3);
  std::vector<int> values(100);  // plain memory: ThreadSanitizer reports a missing happens-before
  for (int round = 0; round < 500; ++round) {
    pool.parallel_for(values.size(), [&](size_t i) { ++values[values.size() - 1 - i]; });
  }
  for (int value : values) CHECK_EQ(value, 500);
}

void the_first_exception_is_rethrown_and_the_pool_goes_on() {
  for (size_t threads : {1, 4}) {
    WorkerPool pool(threads);
    std::atomic<size_t> ran{0};
    std::string seen;
    try {
      pool.parallel_for(100'000, [&](size_t i) {
        ++ran;
        if (i == 10) throw std::runtime_error("index 10");
      });
    } catch (const std::runtime_error& error) {
      seen = error.what();
    }
    CHECK_EQ(seen, "index 10");
    CHECK(ran.load() >= 1);
    ran = 0;
    pool.parallel_for(100, [&](size_t) { ++ran; });
    CHECK_EQ(ran.load(), size_t{100});
  }
}

void an_exception_of_every_index_is_reported_once() {
  WorkerPool pool(4);
  int caught = 0;
  for (int round = 0; round < 100; ++round) {
    try {
      pool.parallel_for(8, [&](size_t i) { throw static_cast<int>(i); });
    } catch (int) {
      ++caught;
    }
  }
  CHECK_EQ(caught, 100);
}

void loops_inside_a_loop_run_inline() {
  WorkerPool outer(3), inner(2);
  std::atomic<size_t> ran{0};
  outer.parallel_for(6, [&](size_t) {
    outer.parallel_for(5, [&](size_t) { ++ran; });
    inner.parallel_for(2, [&](size_t) { ++ran; });
  });
  CHECK_EQ(ran.load(), size_t{6 * 7});
}

void loops_of_several_callers_do_not_mix() {
  WorkerPool pool(3);
  std::atomic<size_t> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        std::vector<int> values(50);
        pool.parallel_for(values.size(), [&](size_t i) { values[i] = 1; });
        for (int value : values) wrong += value != 1;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(wrong.load(), size_t{0});
}

size_t threads_of_this_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<size_t>(std::distance(begin(tasks), end(tasks)));
}

// A joined thread may be listed for a moment longer: the system wakes its joiner before it forgets it.
bool threads_become(size_t count) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (threads_of_this_process() != count) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

void ended_threads_are_gone_and_come_back_with_the_next_loop() {
  const size_t before = threads_of_this_process();
  WorkerPool pool(4);
  pool.end_threads();  // it has none yet
  for (int round = 0; round < 20; ++round) {
    std::atomic<size_t> ran{0};
    pool.parallel_for(100, [&](size_t) { ++ran; });
    CHECK_EQ(ran.load(), size_t{100});
    CHECK(threads_become(before + 3));
    pool.end_threads();
    CHECK(threads_become(before));
  }
  pool.end_threads();
}

void threads_end_between_the_loops_of_other_callers() {
  WorkerPool pool(3);
  std::atomic<size_t> ran{0};
  std::thread caller([&] {
    for (int round = 0; round < 200; ++round) pool.parallel_for(50, [&](size_t) { ++ran; });
  });
  for (int round = 0; round < 50; ++round) pool.end_threads();
  caller.join();
  CHECK_EQ(ran.load(), size_t{200 * 50});
}

void a_loop_does_not_end_its_own_threads() {
  WorkerPool pool(3);
  std::atomic<size_t> ran{0};
  pool.parallel_for(20, [&](size_t) {
    pool.end_threads();
    ++ran;
  });
  CHECK_EQ(ran.load(), size_t{20});
}

// Waits for the child and returns its exit status; -1 when a signal ended it.
int status_of(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Keeps every thread that enters until release(): none of them is then starting or in an allocator, whose
// locks the runtime of AddressSanitizer, unlike the C library, leaves locked in a forked child.
class Gathering {
 public:
  void enter() {
    std::unique_lock lock(mutex_);
    ++entered_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return released_; });
  }
  void wait_for(int threads) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return entered_ == threads; });
  }
  void release() {
    std::lock_guard lock(mutex_);
    released_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int entered_ = 0;
  bool released_ = false;
};

// The fork falls into a loop of another thread: in the child its mutexes stay locked for ever.
[[maybe_unused]] void a_child_forked_during_a_loop_has_a_pool_of_its_own() {
  auto* pool = new WorkerPool(3);
  Gathering threads;
  std::thread caller([&] { pool->parallel_for(3, [&](size_t) { threads.enter(); }); });
  threads.wait_for(3);
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<size_t> ran{0};
    pool->parallel_for(100, [&](size_t) { ++ran; });
    pool->parallel_for(100, [&](size_t) { ++ran; });
    delete pool;
    _exit(ran == 200 ? 0 : 1);
  }
  CHECK_EQ(status_of(child), 0);
  threads.release();
  caller.join();
  delete pool;
}

void a_child_may_destroy_a_pool_that_it_never_used() {
  auto* pool = new WorkerPool(3);
  Gathering threads;
  std::thread caller([&] { pool->parallel_for(3, [&](size_t) { threads.enter(); }); });
  threads.wait_for(3);
  const pid_t child = fork();
  if (child == 0) {
    pool->end_threads();
    delete pool;
    _exit(0);
  }
  CHECK_EQ(status_of(child), 0);
  threads.release();
  caller.join();
  delete pool;
}

void sizes_that_are_not_legal_are_refused() {
  CHECK_THROWS(ErrorKind::kInvalidArgument, "0 threads", WorkerPool(0));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "4097 threads", WorkerPool(4097));
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "offload-cgroup-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string write(const std::string& file, const std::string& text) const {
    const std::filesystem::path full = path_ / file;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text;
    return full.string();
  }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

void quotas_are_read_from_both_versions_of_control_groups() {
  {
    TemporaryFolder mount;
    const std::string membership = mount.write("membership", "0::/a/b\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{0});
    mount.write("cpu.max", "800000 100000\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{8});  // the group itself is not visible
    mount.write("a/b/cpu.max", "max 100000\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{8});
    mount.write("a/cpu.max", "250000 100000\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{3});  // 2.5 rounded up
    mount.write("a/b/cpu.max", "10000 100000\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{1});
  }
  {
    TemporaryFolder mount;
    const std::string membership =
        mount.write("membership", "5:cpuset:/x\n4:cpu,cpuacct:/job\n1:name=systemd:/job\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{0});
    mount.write("cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
    mount.write("cpu,cpuacct/cpu.cfs_period_us", "100000\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{0});
    mount.write("cpu,cpuacct/job/cpu.cfs_quota_us", "400000\n");
    mount.write("cpu,cpuacct/job/cpu.cfs_period_us", "100000\n");
    CHECK_EQ(cgroup_cpu_limit(membership, mount.path()), size_t{4});
  }
  CHECK_EQ(cgroup_cpu_limit("/nonexistent", "/nonexistent"), size_t{0});
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  every_index_runs_once();
  all_threads_take_part();
  writes_are_seen_by_the_caller_and_the_next_loop();
  the_first_exception_is_rethrown_and_the_pool_goes_on();
  an_exception_of_every_index_is_reported_once();
  loops_inside_a_loop_run_inline();
  loops_of_several_callers_do_not_mix();
  ended_threads_are_gone_and_come_back_with_the_next_loop();
  threads_end_between_the_loops_of_other_callers();
  a_loop_does_not_end_its_own_threads();
#if !defined(__SANITIZE_THREAD__)  // its runtime does not survive new threads in a child of many threads
  a_child_forked_during_a_loop_has_a_pool_of_its_own();
#endif
  a_child_may_destroy_a_pool_that_it_never_used();
  sizes_that_are_not_legal_are_refused();
  quotas_are_read_from_both_versions_of_control_groups();
  return test::result();
}
