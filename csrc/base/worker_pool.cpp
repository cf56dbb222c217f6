#include "base/worker_pool.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/cpu_count.h"
#include "base/error.h"
#include "base/fork_guard.h"
#include "base/thread.h"

namespace offload {
namespace {

// An idle worker looks for work this often before it sleeps: about 20 us of pauses, so that loops that
// follow each other closely are dispatched without a system call and torch's own threads are not starved.
constexpr int kSpinCount = 500;
// The gate below counts workers in 16 bits; also far above any useful number.
constexpr size_t kMaxThreads = 4096;

void pause_cpu() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` does nothing on most cores; isb takes about as long as pause
#endif
}

template <typename Condition>
bool spin_until(const Condition& condition) noexcept {
  for (int i = 0; i < kSpinCount; ++i) {
    if (condition()) return true;
    pause_cpu();
  }
  return condition();
}

// The threads of one pool in one process, and the loop that they run.
//
// The gate is one word: (loop number << 17) | (open << 16) | workers inside. A worker enters an open
// gate by adding one; the caller closes it when the indices have run out and waits for those inside, so
// a worker that wakes late costs nothing. The loop's fields are written only while the gate is closed
// and nobody is inside.
class Crew {
 public:
  explicit Crew(size_t worker_count) : worker_count_(worker_count) {}

  ~Crew() { end_workers(); }

  bool forked() const noexcept { return owner_.forked(); }

  void run(size_t count, const std::function<void(size_t)>& body) {
    std::lock_guard one_loop(loop_mutex_);
    if (!started_) start();
    body_ = &body;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    {
      // Under the mutex: a worker that found the gate closed must be asleep before it is woken.
      std::lock_guard lock(mutex_);
      gate_.store(((gate_.load(std::memory_order_relaxed) >> kLoopShift) + 1) << kLoopShift | kOpen,
                  std::memory_order_release);
    }
    gate_opened_.notify_all();
    run_indices();
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    auto empty = [&] { return (gate_.load(std::memory_order_acquire) & kInsideMask) == 0; };
    if (!spin_until(empty)) {
      std::unique_lock lock(mutex_);
      last_left_.wait(lock, empty);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void end_workers() noexcept {
    std::lock_guard no_loop(loop_mutex_);
    {
      std::lock_guard lock(mutex_);
      stopping_.store(true, std::memory_order_relaxed);
    }
    gate_opened_.notify_all();
    for (std::jthread& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false, std::memory_order_relaxed);
    started_ = false;
  }

 private:
  static constexpr int kLoopShift = 17;
  static constexpr uint64_t kOpen = uint64_t{1} << 16;
  static constexpr uint64_t kInsideMask = kOpen - 1;

  void start() {
    started_ = true;
    workers_.reserve(worker_count_);
    try {
      while (workers_.size() < worker_count_)
        workers_.push_back(start_thread("offload-worker", [this](std::stop_token) { serve(); }));
    } catch (const Error&) {
      // The system refuses more threads: the loop is complete with those that started, the caller at least.
    }
  }

  void serve() noexcept;

  // Enters the gate if it is open for a loop other than `last_loop`; then `last_loop` is that loop.
  bool try_enter(uint64_t& last_loop) noexcept {
    uint64_t gate = gate_.load(std::memory_order_relaxed);
    while ((gate & kOpen) != 0 && gate >> kLoopShift != last_loop) {
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel, std::memory_order_relaxed)) {
        last_loop = gate >> kLoopShift;
        return true;
      }
    }
    return false;
  }

  void leave() noexcept {
    const uint64_t before = gate_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kInsideMask) != 1 || (before & kOpen) != 0) return;
    {
      std::lock_guard lock(mutex_);
    }  // the caller is either before its test or asleep
    last_left_.notify_one();
  }

  void run_indices() noexcept {
    for (;;) {
      const size_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      try {
        (*body_)(index);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(count_, std::memory_order_relaxed);
      }
    }
  }

  const ForkGuard owner_;
  const size_t worker_count_;

  std::mutex loop_mutex_;  // held by the caller for its whole loop
  // guarded by loop_mutex_
  bool started_ = false;
  std::vector<std::jthread> workers_;
  // written by the caller while the gate is closed and empty, read by those inside
  const std::function<void(size_t)>* body_ = nullptr;
  size_t count_ = 0;

  std::atomic<size_t> next_{0};
  std::atomic<uint64_t> gate_{0};

  std::mutex mutex_;  // sleeping and waking; also guards error_ while a loop runs
  std::condition_variable gate_opened_, last_left_;
  std::atomic<bool> stopping_{false};
  std::exception_ptr error_;
};

// The pools whose loops are on this thread's stack, innermost first: a loop that is started from its
// own body runs inline instead of waiting for itself.
struct LoopFrame {
  const void* pool;
  const LoopFrame* outer;
};
thread_local const LoopFrame* loops_on_stack = nullptr;

class LoopOnStack {
 public:
  explicit LoopOnStack(const void* pool) noexcept : frame_{pool, loops_on_stack} { loops_on_stack = &frame_; }
  ~LoopOnStack() { loops_on_stack = frame_.outer; }
  LoopOnStack(const LoopOnStack&) = delete;
  LoopOnStack& operator=(const LoopOnStack&) = delete;

  static bool contains(const void* pool) noexcept {
    for (const LoopFrame* frame = loops_on_stack; frame != nullptr; frame = frame->outer) {
      if (frame->pool == pool) return true;
    }
    return false;
  }

 private:
  LoopFrame frame_;
};

void Crew::serve() noexcept {
  LoopOnStack frame(this);
  uint64_t last_loop = 0;
  for (;;) {
    bool entered = false;
    auto entered_or_stopping = [&] {
      entered = try_enter(last_loop);
      return entered || stopping_.load(std::memory_order_relaxed);
    };
    if (!spin_until(entered_or_stopping)) {
      std::unique_lock lock(mutex_);
      gate_opened_.wait(lock, entered_or_stopping);
    }
    if (!entered) return;
    run_indices();
    leave();
  }
}

// The value of a count in the environment; 0 when it is not set.
size_t count_from_environment(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return 0;
  size_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [parsed_to, failure] = std::from_chars(text, end, value);
  if (failure != std::errc{} || parsed_to != end || value == 0 || value > kMaxThreads) {
    throw Error(ErrorKind::kInvalidArgument, std::string(name) + "=" + text +
                                                 " is not a whole number from 1 to " +
                                                 std::to_string(kMaxThreads) + ": correct or unset it");
  }
  return value;
}

}  // namespace

struct WorkerPool::State {
  size_t thread_count;
  // Replaced without a lock: after fork() a lock could be held by a thread that is no longer there.
  std::atomic<Crew*> crew{nullptr};

  Crew& current_crew() {
    Crew* seen = crew.load(std::memory_order_acquire);
    while (seen == nullptr || seen->forked()) {
      auto made = std::make_unique<Crew>(thread_count - 1);
      // What `seen` pointed to is leaked on purpose: its threads stayed in the parent, so they cannot be
      // joined, and its mutexes may be held by them for ever.
      if (crew.compare_exchange_strong(seen, made.get(), std::memory_order_acq_rel)) return *made.release();
    }
    return *seen;
  }
};

WorkerPool::WorkerPool(size_t thread_count) : state_(std::make_unique<State>()) {
  if (thread_count == 0 || thread_count > kMaxThreads) {
    throw Error(ErrorKind::kInvalidArgument, "a pool of " + std::to_string(thread_count) +
                                                 " threads: ask for 1 to " + std::to_string(kMaxThreads));
  }
  state_->thread_count = thread_count;
}

WorkerPool::~WorkerPool() {
  Crew* crew = state_->crew.load(std::memory_order_acquire);
  // A crew of another process is leaked for the reason given in current_crew().
  if (crew != nullptr && !crew->forked()) delete crew;
}

void WorkerPool::parallel_for(size_t count, const std::function<void(size_t)>& body) {
  if (count == 0) return;
  Crew* crew = nullptr;
  if (count > 1 && state_->thread_count > 1) crew = &state_->current_crew();
  if (crew == nullptr || LoopOnStack::contains(crew)) {
    for (size_t i = 0; i < count; ++i) body(i);
    return;
  }
  LoopOnStack frame(crew);
  crew->run(count, body);
}

void WorkerPool::end_threads() noexcept {
  Crew* crew = state_->crew.load(std::memory_order_acquire);
  if (crew != nullptr && !crew->forked() && !LoopOnStack::contains(crew)) crew->end_workers();
}

size_t WorkerPool::thread_count() const noexcept { return state_->thread_count; }

size_t WorkerPool::default_thread_count() {
  if (const size_t forced = count_from_environment("OFFLOAD_NUM_THREADS")) return forced;
  size_t cpus = affinity_cpu_count();
  if (const size_t quota = cgroup_cpu_limit()) cpus = std::min(cpus, quota);
  const size_t processes = std::max<size_t>(count_from_environment("LOCAL_WORLD_SIZE"), 1);
  return std::clamp<size_t>(cpus / processes, 1, kMaxThreads);
}

WorkerPool& WorkerPool::shared() {
  // Never destroyed: other threads and other static objects may still use it at exit. Made without a
  // lock (a function-local static has one) for the same reason as the crew.
  static std::atomic<WorkerPool*> shared_pool{nullptr};
  WorkerPool* pool = shared_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    auto made = std::make_unique<WorkerPool>();
    if (shared_pool.compare_exchange_strong(pool, made.get(), std::memory_order_acq_rel))
      pool = made.release();
  }
  return *pool;
}

}  // namespace offload
