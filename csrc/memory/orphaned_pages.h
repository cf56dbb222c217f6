// Pages whose pool died while a device could still read or write them.
//
// Ownership: takes the pages over and frees them at the first sweep after their tickets ended. Unmapping at
//            once would pull memory from under a copy; waiting could hang on a stream that never runs.
// Threads: may be called from any thread; the pages are freed on the thread that sweeps. A forked child keeps
//          its own: those of its parent are not in it.
#pragma once

#include <memory>
#include <vector>

#include "base/ticket.h"
#include "memory/host_pages.h"

namespace offload {

void adopt_orphans(std::vector<std::unique_ptr<HostPages>> pages, std::vector<Ticket> tickets);

// Frees what no ticket holds any more. Pools call it when they obtain pages and when they die.
void sweep_orphans() noexcept;

}  // namespace offload
