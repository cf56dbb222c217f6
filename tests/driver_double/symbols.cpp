// cuGetProcAddress, and the names of all entries.
#include <algorithm>
#include <cstring>
#include <string>

#include "driver_double/state.h"

using namespace driver_double;

// X(the name that cuGetProcAddress takes, exported symbol, the first version that gives it)
#define DOUBLE_ENTRIES(X)                                                          \
  X("cuInit", cuInit, 2000)                                                        \
  X("cuDriverGetVersion", cuDriverGetVersion, 2020)                                \
  X("cuGetErrorName", cuGetErrorName, 6000)                                        \
  X("cuGetErrorString", cuGetErrorString, 6000)                                    \
  X("cuDeviceGetCount", cuDeviceGetCount, 2000)                                    \
  X("cuDeviceGet", cuDeviceGet, 2000)                                              \
  X("cuDeviceGetName", cuDeviceGetName, 2000)                                      \
  X("cuDeviceGetUuid", cuDeviceGetUuid_v2, 11040)                                  \
  X("cuDeviceGetAttribute", cuDeviceGetAttribute, 2000)                            \
  X("cuDeviceTotalMem", cuDeviceTotalMem_v2, 3020)                                 \
  X("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain, 7000)                    \
  X("cuDevicePrimaryCtxRelease", cuDevicePrimaryCtxRelease_v2, 11000)              \
  X("cuCtxPushCurrent", cuCtxPushCurrent_v2, 4000)                                 \
  X("cuCtxPopCurrent", cuCtxPopCurrent_v2, 4000)                                   \
  X("cuCtxGetStreamPriorityRange", cuCtxGetStreamPriorityRange, 5050)              \
  X("cuThreadExchangeStreamCaptureMode", cuThreadExchangeStreamCaptureMode, 10010) \
  X("cuMemGetInfo", cuMemGetInfo_v2, 3020)                                         \
  X("cuMemHostRegister", cuMemHostRegister_v2, 6050)                               \
  X("cuMemHostUnregister", cuMemHostUnregister, 4000)                              \
  X("cuStreamCreateWithPriority", cuStreamCreateWithPriority, 5050)                \
  X("cuStreamDestroy", cuStreamDestroy_v2, 4000)                                   \
  X("cuStreamWaitEvent", cuStreamWaitEvent, 3020)                                  \
  X("cuStreamWaitValue32", cuStreamWaitValue32_v2, 11070)                          \
  X("cuEventCreate", cuEventCreate, 2000)                                          \
  X("cuEventRecord", cuEventRecord, 2000)                                          \
  X("cuEventQuery", cuEventQuery, 2000)                                            \
  X("cuEventSynchronize", cuEventSynchronize, 2000)                                \
  X("cuEventDestroy", cuEventDestroy_v2, 4000)                                     \
  X("cuEventElapsedTime", cuEventElapsedTime, 2000)                                \
  X("cuMemcpyHtoDAsync", cuMemcpyHtoDAsync_v2, 3020)                               \
  X("cuMemcpyDtoHAsync", cuMemcpyDtoHAsync_v2, 3020)                               \
  X("cuMemcpyBatchAsync", cuMemcpyBatchAsync, 12080)                               \
  X("cuModuleLoadData", cuModuleLoadData, 2000)                                    \
  X("cuModuleGetFunction", cuModuleGetFunction, 2000)                              \
  X("cuModuleUnload", cuModuleUnload, 2000)                                        \
  X("cuLaunchKernel", cuLaunchKernel, 4000)                                        \
  X("cuCtxSynchronize", cuCtxSynchronize, 2000)                                    \
  X("cuMemAllocManaged", cuMemAllocManaged, 6000)                                  \
  X("cuMemFree", cuMemFree_v2, 3020)                                               \
  X("cuMemAdvise", cuMemAdvise, 8000)                                              \
  X("cuMemPrefetchAsync", cuMemPrefetchAsync, 8000)                                \
  X("cuMemRangeGetAttribute", cuMemRangeGetAttribute, 8000)                        \
  X("cuMemDiscardBatchAsync", cuMemDiscardBatchAsync, 13000)

extern "C" {
// The addresses alone are wanted here; the real parameters are where each one is defined.
#define DOUBLE_DECLARE(name, symbol, version) int symbol();
DOUBLE_ENTRIES(DOUBLE_DECLARE)
#undef DOUBLE_DECLARE
}

namespace {

struct Symbol {
  const char* name;
  const char* exported;
  int version;
  void* address;
};

const Symbol kSymbols[] = {
#define DOUBLE_ROW(name, symbol, version) {name, #symbol, version, reinterpret_cast<void*>(&symbol)},
    DOUBLE_ENTRIES(DOUBLE_ROW)
#undef DOUBLE_ROW
};

enum QueryResult { kFound = 0, kNotKnown = 1, kVersionTooOld = 2 };

// Null in `address` for what is not there. Returns kInvalidValue for a version that is newer than the driver.
int find(const char* name, void** address, int version, QueryResult& result) {
  *address = nullptr;
  result = kNotKnown;
  if (version > state().version) return kInvalidValue;
  const std::vector<std::string>& hidden = state().hidden;
  for (const Symbol& symbol : kSymbols) {
    if (std::strcmp(symbol.name, name) != 0) continue;
    if (std::ranges::find(hidden, symbol.exported) != hidden.end()) break;
    result = version >= symbol.version ? kFound : kVersionTooOld;
    if (result == kFound) *address = symbol.address;
  }
  return kSuccess;
}

}  // namespace

namespace driver_double {

std::vector<std::string> entry_names() {
  std::vector<std::string> names = {"cuGetProcAddress", "cuGetProcAddress_v2"};
  for (const Symbol& symbol : kSymbols) names.emplace_back(symbol.exported);
  return names;
}

}  // namespace driver_double

extern "C" {

int cuGetProcAddress(const char* name, void** address, int version, unsigned long long) {
  Call call("cuGetProcAddress", Needs::kNothing);
  if (call.refused()) return call.code();
  if (state().proc_address_level < 1) return kNotSupported;
  QueryResult result;
  const int code = find(name, address, version, result);
  return code == kSuccess && result != kFound ? kNotFound : code;
}

// Success for what it does not find, too: the address is null then.
int cuGetProcAddress_v2(const char* name, void** address, int version, unsigned long long, int* result) {
  Call call("cuGetProcAddress_v2", Needs::kNothing);
  if (call.refused()) return call.code();
  if (state().proc_address_level < 2) return kNotSupported;
  QueryResult found;
  const int code = find(name, address, version, found);
  if (result != nullptr) *result = found;
  return code;
}

}  // extern "C"
