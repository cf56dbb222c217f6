#include "memory/orphaned_pages.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "base/fork_guard.h"

namespace offload {
namespace {

struct Orphan {
  std::vector<std::unique_ptr<HostPages>> pages;
  std::vector<Ticket> tickets;
};

struct Orphans {
  const ForkGuard owner;
  std::mutex mutex;
  std::vector<Orphan> waiting;  // guarded by mutex
};

OnePerProcess<Orphans> orphans;

}  // namespace

void adopt_orphans(std::vector<std::unique_ptr<HostPages>> pages, std::vector<Ticket> tickets) {
  Orphans& all = orphans.get();
  std::lock_guard lock(all.mutex);
  all.waiting.push_back({std::move(pages), std::move(tickets)});
}

void sweep_orphans() noexcept {
  Orphans& all = orphans.get();
  std::vector<Orphan> ended;  // freed after the lock is gone: unmapping is slow
  std::lock_guard lock(all.mutex);
  auto still_used = [](const Orphan& orphan) {
    return std::any_of(orphan.tickets.begin(), orphan.tickets.end(),
                       [](const Ticket& t) { return !t.done(); });
  };
  auto first_ended = std::partition(all.waiting.begin(), all.waiting.end(), still_used);
  std::move(first_ended, all.waiting.end(), std::back_inserter(ended));
  all.waiting.erase(first_ended, all.waiting.end());
}

}  // namespace offload
