#include "memory/host_pages.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <fstream>
#include <limits>

#include "base/error.h"
#include "base/worker_pool.h"

namespace offload {
namespace {

// One index of the parallel first touch: large enough to hide the dispatch, small enough to balance.
constexpr size_t kTouchBytes = size_t{32} << 20;
constexpr size_t kMaxNumaNodes = 1024;  // the kernel's largest CONFIG_NODES_SHIFT
constexpr unsigned char kPoisonByte = 0xFF;

// With the raw system call, libnuma is not needed. 0, or the system's error: containers forbid the call
// (without CAP_SYS_NICE those of Docker do), and a cpuset may leave the node out.
int prefer_numa_node(uintptr_t address, size_t bytes, int node) {
  constexpr size_t kWordBits = std::numeric_limits<unsigned long>::digits;
  std::array<unsigned long, kMaxNumaNodes / kWordBits> nodes{};
  const auto index = static_cast<size_t>(node);
  if (index >= kMaxNumaNodes) return EINVAL;
  nodes[index / kWordBits] |= 1UL << (index % kWordBits);
  // Preferred and not bound: when the node is full, pages of another node beat a kill. The kernel reads
  // one bit less than it is told.
  return syscall(SYS_mbind, address, bytes, MPOL_PREFERRED, nodes.data(), kMaxNumaNodes + 1, 0) == 0 ? 0
                                                                                                     : errno;
}

}  // namespace

size_t HostPages::page_bytes() noexcept {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t HostPages::huge_page_bytes() noexcept {
  static const size_t bytes = [] {
    size_t value = 0;
    std::ifstream("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") >> value;
    return value;
  }();
  return bytes;
}

HostPages::Mapping::Mapping(size_t wanted_bytes, size_t alignment, bool address_space_only) {
  // mmap aligns to pages only: take `alignment` more, then give both ends back. They were never touched.
  const size_t slack_bytes = alignment > page_bytes() ? alignment : 0;
  const int protection = address_space_only ? PROT_NONE : PROT_READ | PROT_WRITE;
  void* mapped = mmap(nullptr, wanted_bytes + slack_bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Error(ErrorKind::kOutOfHostMemory, "the system refuses to map " + std::to_string(wanted_bytes) +
                                                 " bytes of host memory (" + std::strerror(errno) +
                                                 "); lower the host budget or free memory on this machine");
  }
  const auto start = reinterpret_cast<uintptr_t>(mapped);
  address = slack_bytes == 0 ? start : round_up(start, alignment);
  bytes = wanted_bytes;
  const size_t head_bytes = address - start;
  const size_t tail_bytes = slack_bytes - head_bytes;
  if (head_bytes > 0) munmap(mapped, head_bytes);
  if (tail_bytes > 0) munmap(reinterpret_cast<void*>(address + bytes), tail_bytes);
}

HostPages::Mapping::~Mapping() {
  if (!owner.forked()) munmap(reinterpret_cast<void*>(address), bytes);
}

HostPages::HostPages(size_t bytes, size_t chunk_bytes, const HostPagesOptions& options,
                     std::shared_ptr<Device> pin_device)
    : mapping_(round_up(bytes, page_bytes()),
               bytes >= huge_page_bytes() && huge_page_bytes() > 0 ? huge_page_bytes() : page_bytes(),
               options.address_space_only),
      chunk_bytes_(round_up(std::min(chunk_bytes, mapping_.bytes), page_bytes())),
      pin_device_(std::move(pin_device)) {
  if (options.address_space_only) return;
  advise(options);
  touch(options.poison);  // before pin(): registering pages that exist is faster and runs on one thread
  if (pin_device_) pin();
}

HostPages::~HostPages() { unpin(pinned_bytes_); }

void HostPages::advise(const HostPagesOptions& options) {
  void* start = reinterpret_cast<void*>(mapping_.address);
  if (madvise(start, mapping_.bytes, MADV_DONTFORK) != 0) {
    throw Error(ErrorKind::kInternal, std::string("madvise(MADV_DONTFORK) failed: ") + std::strerror(errno));
  }
  // A kernel without transparent huge pages refuses the advice; small pages are slower, never wrong.
  if (options.huge_pages) static_cast<void>(madvise(start, mapping_.bytes, MADV_HUGEPAGE));
  if (options.numa_node < 0) return;
  const int refusal = prefer_numa_node(mapping_.address, mapping_.bytes, options.numa_node);
  if (refusal == 0 || options.numa_node_is_a_wish) return;
  throw Error(
      ErrorKind::kInvalidArgument,
      "numa_node=" + std::to_string(options.numa_node) + ": the system refuses this node (" +
          std::strerror(refusal) +
          "); legal are the nodes of /sys/devices/system/node/online, or -1 for none, and containers may "
          "need `--cap-add SYS_NICE`");
}

void HostPages::touch(bool poison) {
  const size_t page = page_bytes();
  WorkerPool::shared().parallel_for(round_up(mapping_.bytes, kTouchBytes) / kTouchBytes, [&](size_t index) {
    const size_t begin = index * kTouchBytes;
    const size_t end = std::min(begin + kTouchBytes, mapping_.bytes);
    auto* base = reinterpret_cast<unsigned char*>(mapping_.address);
    if (poison) {
      std::memset(base + begin, kPoisonByte, end - begin);
      return;
    }
    // volatile: the compiler would drop a store of zero into memory that nobody reads.
    for (size_t offset = begin; offset < end; offset += page)
      *static_cast<volatile unsigned char*>(base + offset) = 0;
  });
}

void HostPages::pin() {
  size_t done_bytes = 0;
  try {
    while (done_bytes < mapping_.bytes) {
      const size_t bytes = std::min(chunk_bytes_, mapping_.bytes - done_bytes);
      pin_device_->pin(reinterpret_cast<void*>(mapping_.address + done_bytes), bytes);
      done_bytes += bytes;
    }
    pinned_bytes_ = done_bytes;
  } catch (const std::exception& refusal) {
    unpin(done_bytes);
    pin_refusal_ = refusal.what();
  }
}

void HostPages::unpin(size_t bytes) noexcept {
  for (size_t offset = 0; offset < bytes; offset += chunk_bytes_) {
    pin_device_->unpin(reinterpret_cast<void*>(mapping_.address + offset),
                       std::min(chunk_bytes_, bytes - offset));
  }
}

}  // namespace offload
