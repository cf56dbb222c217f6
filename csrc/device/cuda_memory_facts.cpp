#include "device/cuda_memory_facts.h"

#include <cstdlib>
#include <string>

#include "base/error.h"

namespace offload {
namespace {

// CU_DEVICE_ATTRIBUTE_*
constexpr int kIntegrated = 18;
constexpr int kManagedMemory = 83;
constexpr int kHostNativeAtomicSupported = 86;
constexpr int kPageableMemoryAccess = 88;
constexpr int kConcurrentManagedAccess = 89;
constexpr int kCanUseHostPointerForRegisteredMem = 91;
constexpr int kPageableMemoryAccessUsesHostPageTables = 100;
constexpr int kDirectManagedMemAccessFromHost = 101;
constexpr int kHostNumaId = 134;  // CUDA 12.2

constexpr CudaResult kInvalidValue = 1;  // CUDA_ERROR_INVALID_VALUE: an attribute that came later

CudaMemoryKind kind_of(const CudaMemoryFacts& facts) {
  if (facts.integrated) return CudaMemoryKind::kIntegrated;
  if (!facts.pageable_memory_access) return CudaMemoryKind::kDiscrete;
  return facts.uses_host_page_tables ? CudaMemoryKind::kAts : CudaMemoryKind::kHmm;
}

}  // namespace

const char* memory_kind_name(CudaMemoryKind kind) {
  switch (kind) {
    case CudaMemoryKind::kDiscrete: return "discrete";
    case CudaMemoryKind::kHmm: return "hmm";
    case CudaMemoryKind::kAts: return "ats";
    case CudaMemoryKind::kIntegrated: return "integrated";
  }
  return "";  // not reached: the switch is complete
}

CudaOrdinal find_cuda_device(const CudaDriver& driver, int index) {
  int count = 0;
  driver.check(driver.DeviceGetCount(&count), "cuDeviceGetCount");
  if (index < 0 || index >= count) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    throw Error(ErrorKind::kDevice, "there is no device cuda:" + std::to_string(index) +
                                        ": the driver shows " + std::to_string(count) +
                                        " (CUDA_VISIBLE_DEVICES is " +
                                        (visible != nullptr ? "'" + std::string(visible) + "'" : "not set") +
                                        "); legal are indices from 0 below that count");
  }
  CudaOrdinal ordinal = 0;
  driver.check(driver.DeviceGet(&ordinal, index), "cuDeviceGet");
  return ordinal;
}

int device_attribute(const CudaDriver& driver, CudaOrdinal ordinal, int attribute) {
  int value = 0;
  driver.check(driver.DeviceGetAttribute(&value, attribute, ordinal), "cuDeviceGetAttribute");
  return value;
}

CudaMemoryFacts read_memory_facts(const CudaDriver& driver, CudaOrdinal ordinal) {
  const auto has = [&](int attribute) { return device_attribute(driver, ordinal, attribute) != 0; };
  CudaMemoryFacts facts;
  facts.integrated = has(kIntegrated);
  facts.managed_memory = has(kManagedMemory);
  facts.concurrent_managed_access = has(kConcurrentManagedAccess);
  facts.pageable_memory_access = has(kPageableMemoryAccess);
  facts.uses_host_page_tables = has(kPageableMemoryAccessUsesHostPageTables);
  facts.direct_access_from_host = has(kDirectManagedMemAccessFromHost);
  facts.host_native_atomics = has(kHostNativeAtomicSupported);
  facts.reads_page_locked_memory = has(kCanUseHostPointerForRegisteredMem);
  facts.kind = kind_of(facts);
  int node = -1;
  const CudaResult code = driver.DeviceGetAttribute(&node, kHostNumaId, ordinal);
  if (code != kInvalidValue) driver.check(code, "cuDeviceGetAttribute");
  facts.host_numa_node = code == kInvalidValue ? -1 : node;
  return facts;
}

}  // namespace offload
