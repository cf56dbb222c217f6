#include "unified/unified_memory.h"

#include <iterator>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "base/error.h"

namespace offload {
namespace {

constexpr unsigned kAttachGlobal = 0x1;  // CU_MEM_ATTACH_GLOBAL: any stream may use it

// CU_MEM_ADVISE_*; the advice to unset is the one after the advice to set
constexpr int kSetReadMostly = 1;
constexpr int kSetPreferredLocation = 3;
constexpr int kSetAccessedBy = 5;

// CU_MEM_RANGE_ATTRIBUTE_*
constexpr int kReadMostly = 1;
constexpr int kPreferredLocation = 2;
constexpr int kAccessedBy = 3;
constexpr int kLastPrefetchLocation = 4;

// a device is its ordinal
constexpr int kHostLocation = -1;  // CU_DEVICE_CPU
constexpr int kNoLocation = -2;    // CU_DEVICE_INVALID

constexpr CudaResult kNotSupported = 801;        // CUDA_ERROR_NOT_SUPPORTED
constexpr size_t kLocationsAtMost = size_t{32};  // of one range: more devices than a host has

// Refused because a thread captures a CUDA graph.
constexpr CudaResult kFirstOfCaptures = 900;  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
constexpr CudaResult kLastOfCaptures = 908;   // CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD

// Memory of a block that ended while a CUDA graph was captured.
struct Unfreed {
  std::shared_ptr<CudaPrimaryContext> context;
  CudaOrdinal ordinal;
  CudaAddress managed;               // 0 where there are pages
  std::unique_ptr<HostPages> pages;  // of the kind kSystem
};

// Every live block of the process by its address. Leaked on purpose: tensors die at exit in any order.
struct Registry {
  const ForkGuard owner;
  std::mutex making;  // one block at a time: what is free is asked for, then taken
  std::mutex mutex;
  // guarded by mutex
  struct Entry {
    size_t bytes;
    UnifiedKind kind;
    const CudaDriver* driver;
    CudaOrdinal ordinal;
    std::weak_ptr<UnifiedBlock> block;
  };
  std::map<uintptr_t, Entry> blocks;
  std::vector<Unfreed> unfreed;
};

Registry& registry() {
  static auto& all = *new Registry;
  return all;
}

constexpr const char* kUntoldRemedy =
    "Drivers tell the placement of managed memory alone; hints of the kind 'system' count all the same";

// What captures have refused, of this device: it is idle.
void free_unfreed(const CudaDriver& driver, CudaOrdinal ordinal) {
  std::vector<Unfreed> ours;
  {
    std::lock_guard lock(registry().mutex);
    std::erase_if(registry().unfreed, [&](Unfreed& one) {
      const bool is_ours = &one.context->driver() == &driver && one.ordinal == ordinal;
      if (is_ours) ours.push_back(std::move(one));
      return is_ours;
    });
  }
  for (const Unfreed& one : ours) {
    if (one.managed != 0) driver.check(driver.MemFree(one.managed), "cuMemFree");
  }
}

std::string bytes_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

// --- UnifiedMemory ---------------------------------------------------------------------------------------

UnifiedMemory::UnifiedMemory(int index, const std::string& driver_path)
    : index_(index),
      driver_(CudaDriver::load(driver_path)),
      ordinal_(find_cuda_device(driver_, index)),
      facts_(read_memory_facts(driver_, ordinal_)),
      context_(std::make_shared<CudaPrimaryContext>(driver_, ordinal_)) {}

std::shared_ptr<UnifiedBlock> UnifiedMemory::allocate(size_t bytes, UnifiedKind kind,
                                                      const PlacementHints& hints, size_t host_bytes) const {
  context_->owner().require_owner("this UnifiedMemory");
  if (bytes == 0) throw Error(ErrorKind::kInvalidArgument, "0 bytes of unified memory; ask for at least 1");
  require_kind(kind);
  std::shared_ptr<UnifiedBlock> block;
  {
    std::lock_guard making(registry().making);
    require_room(bytes, kind, host_bytes);
    block.reset(new UnifiedBlock(index_, ordinal_, facts_, context_, kind, bytes));
    std::lock_guard lock(registry().mutex);
    registry().blocks.insert_or_assign(block->address(),
                                       Registry::Entry{bytes, kind, &driver_, ordinal_, block});
  }
  // Without the locks: a block whose hints are refused ends here, and waits for the device.
  if (hints.any()) block->advise(block->address(), bytes, hints);
  return block;
}

size_t UnifiedMemory::live_managed_bytes() const {
  context_->owner().require_owner("this UnifiedMemory");
  std::lock_guard lock(registry().mutex);
  size_t sum = 0;
  for (const auto& [address, entry] : registry().blocks) {
    const bool ours = entry.driver == &driver_ && entry.ordinal == ordinal_;
    if (ours && entry.kind == UnifiedKind::kManaged) sum += entry.bytes;
  }
  return sum;
}

void UnifiedMemory::require_kind(UnifiedKind kind) const {
  const std::string device = "cuda:" + std::to_string(index_) + " (" + memory_kind_name(facts_.kind) + ") ";
  if (kind == UnifiedKind::kManaged && !facts_.managed_memory) {
    throw Error(ErrorKind::kInvalidArgument, device + "has no managed memory: use pinned host memory");
  }
  if (kind == UnifiedKind::kSystem && !facts_.pageable_memory_access) {
    throw Error(ErrorKind::kInvalidArgument,
                device + "does not read the system's own memory: use the kind 'managed'");
  }
}

// Beyond the free memory of a discrete device the driver would page managed memory to the host and back at
// every use. Which live pages are on the device already it does not tell, so that those count twice. Pages of
// the system are all touched at once, so that what the host has free is without them.
void UnifiedMemory::require_room(size_t bytes, UnifiedKind kind, size_t host_bytes) const {
  size_t room = host_bytes;
  size_t live = 0;
  std::string where = "the host has " + bytes_text(host_bytes) + " for it";
  ErrorKind error = ErrorKind::kOutOfHostMemory;
  if (kind == UnifiedKind::kManaged) {
    live = live_managed_bytes();
    if (facts_.kind != CudaMemoryKind::kIntegrated) {
      CudaPrimaryContext::Current current(*context_);
      size_t free_bytes = 0;
      size_t total_bytes = 0;
      driver_.check(driver_.MemGetInfo(&free_bytes, &total_bytes), "cuMemGetInfo");
      where = "the device has " + bytes_text(free_bytes) + " free";
      room = free_bytes;
      if (facts_.kind == CudaMemoryKind::kAts) {
        where += " and the host has " + bytes_text(host_bytes) + " for it";
        room += host_bytes;
      } else {
        error = ErrorKind::kInvalidArgument;
      }
    }
  }
  if (bytes <= room && live <= room - bytes) return;
  const std::string name = kind == UnifiedKind::kManaged ? "managed" : "system";
  throw Error(error, bytes_text(bytes) + " of " + name + " memory on cuda:" + std::to_string(index_) + " (" +
                         memory_kind_name(facts_.kind) + "): " + bytes_text(live) +
                         " of managed memory are live, and all of it must fit; " + where +
                         ". Ask for at most " + bytes_text(room > live ? room - live : 0) +
                         ", or free some first");
}

// --- UnifiedBlock ----------------------------------------------------------------------------------------

UnifiedBlock::UnifiedBlock(int index, CudaOrdinal ordinal, const CudaMemoryFacts& facts,
                           std::shared_ptr<CudaPrimaryContext> context, UnifiedKind kind, size_t bytes)
    : index_(index),
      ordinal_(ordinal),
      facts_(facts),
      context_(std::move(context)),
      kind_(kind),
      bytes_(bytes) {
  if (kind_ == UnifiedKind::kSystem) {
    pages_ = std::make_unique<HostPages>(
        bytes_, bytes_, HostPagesOptions{.numa_node = facts_.host_numa_node, .numa_node_is_a_wish = true},
        nullptr);
    address_ = pages_->address();
    return;
  }
  const CudaDriver& driver = context_->driver();
  CudaPrimaryContext::Current current(*context_);
  const OutsideCaptures exempt(driver);
  CudaAddress address = 0;
  if (const CudaResult code = driver.MemAllocManaged(&address, bytes_, kAttachGlobal); code != 0) {
    throw driver.error(code, "allocating " + bytes_text(bytes_) + " of managed memory");
  }
  address_ = static_cast<uintptr_t>(address);
}

UnifiedBlock::~UnifiedBlock() {
  if (context_->owner().forked()) {
    static_cast<void>(pages_.release());  // the device of the parent still uses them
    return;
  }
  if (abandoned_) return;
  {
    std::lock_guard lock(registry().mutex);
    registry().blocks.erase(address_);  // before the address can be used again
  }
  try {
    const CudaDriver& driver = context_->driver();
    CudaPrimaryContext::Current current(*context_);
    // Nothing tells which streams still use the memory. munmap waits for none of them, and cuMemFree only
    // may. An error of this wait is one of earlier work, which that work's owner sees.
    const CudaResult code = driver.CtxSynchronize();
    if (code >= kFirstOfCaptures && code <= kLastOfCaptures) {
      // No thread may wait for a device while a graph is captured, and nothing told so before: that capture
      // is lost, and the memory, which may be in use, is freed when the next block ends.
      const CudaAddress managed = kind_ == UnifiedKind::kManaged ? address_ : 0;
      std::lock_guard lock(registry().mutex);
      registry().unfreed.push_back({context_, ordinal_, managed, std::move(pages_)});
      return;
    }
    const OutsideCaptures exempt(driver);
    if (kind_ == UnifiedKind::kManaged) driver.check(driver.MemFree(address_), "cuMemFree");
    free_unfreed(driver, ordinal_);
  } catch (const Error&) {
    // The context is lost or the process exiting, and the memory gone with it.
  }
}

std::shared_ptr<UnifiedBlock> UnifiedBlock::find(uintptr_t address, size_t bytes) {
  Registry& all = registry();
  if (all.owner.forked()) return nullptr;  // the lock may be held for ever
  std::lock_guard lock(all.mutex);
  auto found = all.blocks.upper_bound(address);
  if (found == all.blocks.begin()) return nullptr;
  --found;
  const size_t offset = address - found->first;
  if (offset > found->second.bytes || bytes > found->second.bytes - offset) return nullptr;
  return found->second.block.lock();
}

void UnifiedBlock::advise(uintptr_t address, size_t bytes, const PlacementHints& hints) const {
  require_inside(address, bytes);
  if (!facts_.concurrent_managed_access && !hints.any()) return;  // it never had any
  require_migration("hints");
  CudaPrimaryContext::Current current(*context_);
  const auto set = [&](int advice, bool wanted, int location) {
    advise_one(address, bytes, wanted ? advice : advice + 1, location);
  };
  set(kSetReadMostly, hints.read_mostly, kHostLocation);  // the location does not count
  set(kSetPreferredLocation, hints.preferred_location.has_value(),
      location_of(hints.preferred_location.value_or(Side::kHost)));
  set(kSetAccessedBy, hints.accessed_by_host, kHostLocation);
  set(kSetAccessedBy, hints.accessed_by_device, ordinal_);
}

Placement UnifiedBlock::placement(uintptr_t address, size_t bytes) const {
  require_inside(address, bytes);
  context_->owner().require_owner("this memory");
  const CudaDriver& driver = context_->driver();
  CudaPrimaryContext::Current current(*context_);
  const auto read = [&](int attribute, int* values, size_t count) {
    const CudaResult code =
        driver.MemRangeGetAttribute(values, count * sizeof(int), attribute, address, bytes);
    if (code != 0) {
      // cuda.h: "The memory range must refer to managed memory".
      throw driver.error(code, "cuMemRangeGetAttribute", kind_ == UnifiedKind::kSystem ? kUntoldRemedy : "");
    }
  };
  Placement result;
  int value = 0;
  read(kReadMostly, &value, 1);
  result.hints.read_mostly = value != 0;
  value = kNoLocation;
  read(kPreferredLocation, &value, 1);
  result.hints.preferred_location = side_of(value);
  int locations[kLocationsAtMost];
  for (int& location : locations) location = kNoLocation;
  read(kAccessedBy, locations, std::size(locations));
  for (const int location : locations) {
    result.hints.accessed_by_host |= location == kHostLocation;
    result.hints.accessed_by_device |= location == ordinal_;
  }
  value = kNoLocation;
  read(kLastPrefetchLocation, &value, 1);
  result.last_prefetch = side_of(value);
  return result;
}

void UnifiedBlock::prefetch(uintptr_t address, size_t bytes, Side side, CudaStreamHandle stream) const {
  require_inside(address, bytes);
  require_migration("prefetches");
  const CudaDriver& driver = context_->driver();
  CudaPrimaryContext::Current current(*context_);
  driver.check(driver.MemPrefetchAsync(address, bytes, location_of(side), stream), "cuMemPrefetchAsync");
}

bool UnifiedBlock::discard(uintptr_t address, size_t bytes, CudaStreamHandle stream) const {
  require_inside(address, bytes);
  context_->owner().require_owner("this memory");
  const CudaDriver& driver = context_->driver();
  if (driver.MemDiscardBatchAsync == nullptr || !facts_.concurrent_managed_access) return false;
  // A neighbour's bytes may share the first and the last page.
  const size_t page = HostPages::page_bytes();
  CudaAddress begin = round_up(address, page);
  const size_t end = (address + bytes) / page * page;
  if (end <= begin) return true;
  size_t discarded_bytes = end - begin;
  CudaPrimaryContext::Current current(*context_);
  const auto submit = [&](CudaStreamHandle own) {
    return driver.MemDiscardBatchAsync(&begin, &discarded_bytes, 1, 0, own);
  };
  CudaResult code = 0;
  if (stream != nullptr) {
    code = submit(stream);
  } else {
    // The legacy stream is not legal here: one of our own runs between two points of it.
    const std::shared_ptr<CudaEvent> before = context_->acquire_event();
    const std::shared_ptr<CudaEvent> after = context_->acquire_event();
    CudaStreamHandle own = nullptr;
    driver.check(driver.StreamCreateWithPriority(&own, kNonBlocking, 0), "cuStreamCreateWithPriority");
    try {
      before->record(stream);
      before->hold_back(own);
      code = submit(own);
      after->record(own);
      after->hold_back(stream);
    } catch (...) {
      static_cast<void>(driver.CtxSynchronize());  // the legacy stream may not come behind it
      static_cast<void>(driver.StreamDestroy(own));
      throw;
    }
    driver.check(driver.StreamDestroy(own), "cuStreamDestroy");  // it goes once its work is done
  }
  if (code == kNotSupported) return false;
  driver.check(code, "cuMemDiscardBatchAsync");
  return true;
}

void UnifiedBlock::require_migration(const char* what) const {
  context_->owner().require_owner("this memory");
  if (facts_.concurrent_managed_access) return;
  throw Error(ErrorKind::kInvalidArgument, "cuda:" + std::to_string(index_) + " (" +
                                               memory_kind_name(facts_.kind) + ") takes no " + what +
                                               ": its driver moves no pages while both sides work. Leave "
                                               "them out there, they change no result");
}

void UnifiedBlock::require_inside(uintptr_t address, size_t bytes) const {
  if (bytes > 0 && address >= address_ && address - address_ <= bytes_ &&
      bytes <= bytes_ - (address - address_)) {
    return;
  }
  throw Error(ErrorKind::kInvalidArgument, bytes_text(bytes) + " at address " + std::to_string(address) +
                                               " are not inside the block of " + bytes_text(bytes_) + " at " +
                                               std::to_string(address_) + "; give at least 1 byte of it");
}

void UnifiedBlock::advise_one(uintptr_t address, size_t bytes, int advice, int location) const {
  const CudaDriver& driver = context_->driver();
  driver.check(driver.MemAdvise(address, bytes, advice, location), "cuMemAdvise");
}

int UnifiedBlock::location_of(Side side) const noexcept {
  return side == Side::kHost ? kHostLocation : ordinal_;
}

std::optional<Side> UnifiedBlock::side_of(int location) const noexcept {
  if (location == kHostLocation) return Side::kHost;
  if (location == ordinal_) return Side::kDevice;
  return std::nullopt;
}

}  // namespace offload
