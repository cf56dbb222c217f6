#include "memory/host_pool.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "base/error.h"
#include "memory/host_pages.h"
#include "memory/host_pool_state.h"

namespace offload {
namespace {

constexpr size_t kBlockBytes = 256;

size_t block_size(size_t requested_bytes) {
  return round_up(std::max<size_t>(requested_bytes, 1), kBlockBytes);
}

}  // namespace

const char* tag_name(Tag tag) noexcept {
  switch (tag) {
    case Tag::kWeights: return "weights";
    case Tag::kMaster: return "master";
    case Tag::kMoments: return "moments";
    case Tag::kGradients: return "gradients";
    case Tag::kActivations: return "activations";
    case Tag::kWindow: return "window";
    case Tag::kBackups: return "backups";
    case Tag::kStaging: break;
  }
  return "staging";
}

HostBuffer::HostBuffer(std::unique_ptr<HostBlock> block) noexcept : block_(std::move(block)) {}
HostBuffer::HostBuffer() = default;
HostBuffer::HostBuffer(HostBuffer&& other) noexcept = default;

HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
  if (this != &other) {
    give_back();
    block_ = std::move(other.block_);
  }
  return *this;
}

HostBuffer::~HostBuffer() { give_back(); }

void HostBuffer::give_back() noexcept {
  if (!block_) return;
  if (block_->pool->owner.forked()) {
    // Leaked on purpose: a thread of the parent may have held the lock, and the pages are not in this
    // process.
    static_cast<void>(block_.release());
    return;
  }
  block_->pool->give_back(*block_);
  block_.reset();
}

void* HostBuffer::address() const noexcept {
  return block_ ? reinterpret_cast<void*>(round_up(block_->address, block_->alignment)) : nullptr;
}
size_t HostBuffer::size_bytes() const noexcept { return block_ ? block_->requested_bytes : 0; }
Tag HostBuffer::tag() const noexcept { return block_ ? block_->tag : Tag::kStaging; }

void HostBuffer::release_after(const Ticket& ticket) {
  if (!block_ || ticket.done()) return;
  // Those of a buffer that is used over and over would pile up.
  std::erase_if(block_->tickets, [](const Ticket& earlier) { return earlier.done(); });
  block_->tickets.push_back(ticket);
}

HostPool::HostPool(std::shared_ptr<Device> device, HostPoolOptions options) {
  if (options.pin && !device) {
    throw Error(ErrorKind::kInvalidArgument, "pin=True needs a device to pin for; give one, or pin=False");
  }
  if (options.slab_bytes == 0 || options.slab_bytes > kLargestRequestBytes) {
    throw Error(ErrorKind::kInvalidArgument, "slab_bytes=" + std::to_string(options.slab_bytes) +
                                                 " is not a size of pages; the default is 64 MiB");
  }
  if (options.pin_chunk_bytes == 0) {
    throw Error(ErrorKind::kInvalidArgument, "pin_chunk_bytes must be above 0; the default is 64 GiB");
  }
  if (options.numa_node < -1) {
    throw Error(ErrorKind::kInvalidArgument, "numa_node=" + std::to_string(options.numa_node) +
                                                 " is not a node; legal are 0 and above, or -1 for none");
  }
  state_ = std::make_shared<HostPoolState>(std::move(device), options);
}

HostPool::~HostPool() {
  // Leaked on purpose in a forked child, as a buffer's block is: the pages are not in this process.
  if (state_->owner.forked()) new std::shared_ptr<HostPoolState>(std::move(state_));
}

void HostPool::reserve(size_t bytes) {
  state_->owner.require_owner("the host pool");
  state_->reserve(bytes);
}

HostBuffer HostPool::acquire(size_t bytes, Tag tag, size_t alignment) {
  return *acquire_within(bytes, tag, /*timeout_ns=*/-1, alignment);
}

std::optional<HostBuffer> HostPool::acquire_within(size_t bytes, Tag tag, int64_t timeout_ns,
                                                   size_t alignment) {
  state_->owner.require_owner("the host pool");
  if (!std::has_single_bit(alignment) || alignment > kLargestRequestBytes) {
    throw Error(ErrorKind::kInvalidArgument,
                "alignment=" + std::to_string(alignment) + " is not a power of two; blocks have 256 anyway");
  }
  auto block = std::make_unique<HostBlock>();
  block->requested_bytes = bytes;
  const size_t lead_bytes = std::max(alignment, kBlockBytes) - kBlockBytes;
  block->block_bytes = bytes > kLargestRequestBytes ? bytes : block_size(bytes) + lead_bytes;
  block->alignment = alignment;
  block->tag = tag;
  if (!state_->take(*block, timeout_ns)) return std::nullopt;
  block->pool = state_;
  return HostBuffer(std::move(block));
}

size_t HostPool::trim() {
  state_->owner.require_owner("the host pool");
  return state_->trim();
}

HostPoolStats HostPool::stats() const {
  state_->owner.require_owner("the host pool");
  return state_->stats();
}

void HostPool::trace_sample() const {
  state_->owner.require_owner("the host pool");
  state_->trace_sample();
}

HostPoolStats layout_stats(const std::vector<size_t>& sizes_bytes, bool reserve_first,
                           const HostPoolOptions& options) {
  HostPoolOptions dry = options;
  dry.address_space_only = true;
  HostPool pool(nullptr, dry);
  if (reserve_first) {
    size_t total_bytes = 0;
    for (size_t bytes : sizes_bytes) total_bytes += block_size(bytes);
    pool.reserve(total_bytes);
  }
  std::vector<HostBuffer> buffers;
  buffers.reserve(sizes_bytes.size());
  for (size_t bytes : sizes_bytes) buffers.push_back(pool.acquire(bytes, Tag::kStaging));
  return pool.stats();
}

}  // namespace offload
