// Threads that run one parallel loop at a time; no OpenMP (it hangs in forked children and torchrun
// sets it to one thread).
//
// Ownership: owns its threads; they start at the first loop and are joined by the destructor, or by
//            end_threads() when nobody will need them for a while.
// Threads: parallel_for may be called from any thread; loops of several callers run one after another.
//          The calling thread takes part, so a pool of size 1 starts no thread.
// Invariants: after fork() the child owns no threads of the parent: the pool starts new ones at its
//             next loop, and its destructor does not join what does not exist.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace offload {

class WorkerPool {
 public:
  explicit WorkerPool(size_t thread_count = default_thread_count());
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // Runs body(i) for every i in [0, count). Returns when all have run; rethrows the first exception
  // (the remaining indices are then skipped).
  void parallel_for(size_t count, const std::function<void(size_t)>& body);

  // Waits for the loop that runs, if any, and joins the threads; the next loop starts new ones. Does
  // nothing inside a loop of this pool, and in a forked child that has run none.
  void end_threads() noexcept;

  size_t thread_count() const noexcept;

  // The affinity mask, bounded by the cgroup CPU quota and divided by LOCAL_WORLD_SIZE; at least 1.
  // OFFLOAD_NUM_THREADS overrides it. OMP_NUM_THREADS is ignored on purpose.
  static size_t default_thread_count();

  // The pool that everything in this process shares.
  static WorkerPool& shared();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace offload
