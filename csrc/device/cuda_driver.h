// The CUDA driver API as a table of functions, loaded from libcuda.so.1 when a CUDA device is first asked
// for.
//
// Ownership: a table is never unloaded: streams may outlive every device, and the driver its own exit.
// Threads: immutable once loaded.
// Invariants: no CUDA header and no toolkit is needed to build; nothing is loaded at import. Every entry is
//             the exact version named here, whatever newer ones the driver has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/error.h"

namespace offload {

// The driver's own types, as its ABI has them.
using CudaResult = int;
using CudaOrdinal = int;
using CudaContext = struct CudaContextOpaque*;
using CudaStreamHandle = struct CudaStreamOpaque*;  // null: the legacy default stream
using CudaEventHandle = struct CudaEventOpaque*;
using CudaModule = struct CudaModuleOpaque*;
using CudaFunction = struct CudaFunctionOpaque*;
using CudaAddress = unsigned long long;

struct CudaUuid {
  unsigned char bytes[16];
};

struct CudaMemoryLocation {  // CUmemLocation
  int type;
  int id;
};

struct CudaCopyAttributes {  // CUmemcpyAttributes
  int source_access_order;
  CudaMemoryLocation source_hint;
  CudaMemoryLocation destination_hint;
  unsigned flags;
};

// X(name, exported symbol, the CUDA version whose cuGetProcAddress gives that symbol, parameters)
#define OFFLOAD_CUDA_ENTRIES(X)                                                                          \
  X(Init, cuInit, 2000, (unsigned flags))                                                                \
  X(DriverGetVersion, cuDriverGetVersion, 2020, (int* version))                                          \
  X(GetErrorName, cuGetErrorName, 6000, (CudaResult error, const char** name))                           \
  X(GetErrorString, cuGetErrorString, 6000, (CudaResult error, const char** text))                       \
  X(DeviceGetCount, cuDeviceGetCount, 2000, (int* count))                                                \
  X(DeviceGet, cuDeviceGet, 2000, (CudaOrdinal * device, int index))                                     \
  X(DeviceGetName, cuDeviceGetName, 2000, (char* name, int capacity, CudaOrdinal device))                \
  X(DeviceGetUuid, cuDeviceGetUuid_v2, 11040, (CudaUuid * uuid, CudaOrdinal device))                     \
  X(DeviceGetAttribute, cuDeviceGetAttribute, 2000, (int* value, int attribute, CudaOrdinal device))     \
  X(DeviceTotalMem, cuDeviceTotalMem_v2, 3020, (size_t* bytes, CudaOrdinal device))                      \
  X(DevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, 7000, (CudaContext * context, CudaOrdinal device)) \
  X(DevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, 11000, (CudaOrdinal device))                  \
  X(CtxPushCurrent, cuCtxPushCurrent_v2, 4000, (CudaContext context))                                    \
  X(CtxPopCurrent, cuCtxPopCurrent_v2, 4000, (CudaContext * context))                                    \
  X(CtxGetStreamPriorityRange, cuCtxGetStreamPriorityRange, 5050, (int* least, int* greatest))           \
  X(ThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, 10010, (int* mode))              \
  X(MemGetInfo, cuMemGetInfo_v2, 3020, (size_t* free_bytes, size_t* total_bytes))                        \
  X(MemHostRegister, cuMemHostRegister_v2, 6050, (void* address, size_t bytes, unsigned flags))          \
  X(MemHostUnregister, cuMemHostUnregister, 4000, (void* address))                                       \
  X(StreamCreateWithPriority, cuStreamCreateWithPriority, 5050,                                          \
    (CudaStreamHandle * stream, unsigned flags, int priority))                                           \
  X(StreamDestroy, cuStreamDestroy_v2, 4000, (CudaStreamHandle stream))                                  \
  X(StreamWaitEvent, cuStreamWaitEvent, 3020,                                                            \
    (CudaStreamHandle stream, CudaEventHandle event, unsigned flags))                                    \
  X(StreamWaitValue32, cuStreamWaitValue32_v2, 11070,                                                    \
    (CudaStreamHandle stream, CudaAddress address, uint32_t value, unsigned flags))                      \
  X(EventCreate, cuEventCreate, 2000, (CudaEventHandle * event, unsigned flags))                         \
  X(EventRecord, cuEventRecord, 2000, (CudaEventHandle event, CudaStreamHandle stream))                  \
  X(EventQuery, cuEventQuery, 2000, (CudaEventHandle event))                                             \
  X(EventSynchronize, cuEventSynchronize, 2000, (CudaEventHandle event))                                 \
  X(EventDestroy, cuEventDestroy_v2, 4000, (CudaEventHandle event))                                      \
  X(EventElapsedTime, cuEventElapsedTime, 2000,                                                          \
    (float* milliseconds, CudaEventHandle begin, CudaEventHandle end))                                   \
  X(MemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, 3020,                                                         \
    (CudaAddress destination, const void* source, size_t bytes, CudaStreamHandle stream))                \
  X(MemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, 3020,                                                         \
    (void* destination, CudaAddress source, size_t bytes, CudaStreamHandle stream))                      \
  X(ModuleLoadData, cuModuleLoadData, 2000, (CudaModule * module, const void* image))                    \
  X(ModuleGetFunction, cuModuleGetFunction, 2000,                                                        \
    (CudaFunction * function, CudaModule module, const char* function_name))                             \
  X(ModuleUnload, cuModuleUnload, 2000, (CudaModule module))                                             \
  X(LaunchKernel, cuLaunchKernel, 4000,                                                                  \
    (CudaFunction function, unsigned blocks_x, unsigned blocks_y, unsigned blocks_z, unsigned threads_x, \
     unsigned threads_y, unsigned threads_z, unsigned shared_bytes, CudaStreamHandle stream,             \
     void** arguments, void** extra))                                                                    \
  X(CtxSynchronize, cuCtxSynchronize, 2000, ())                                                          \
  X(MemAllocManaged, cuMemAllocManaged, 6000, (CudaAddress * address, size_t bytes, unsigned flags))     \
  X(MemFree, cuMemFree_v2, 3020, (CudaAddress address))                                                  \
  X(MemAdvise, cuMemAdvise, 8000, (CudaAddress address, size_t bytes, int advice, int location))         \
  X(MemPrefetchAsync, cuMemPrefetchAsync, 8000,                                                          \
    (CudaAddress address, size_t bytes, int location, CudaStreamHandle stream))                          \
  X(MemRangeGetAttribute, cuMemRangeGetAttribute, 8000,                                                  \
    (void* value, size_t value_bytes, int attribute, CudaAddress address, size_t bytes))

// Those that came after kOldestVersion: null in a driver that is older than they are.
#define OFFLOAD_CUDA_LATER_ENTRIES(X)                                                      \
  X(MemcpyBatchAsync, cuMemcpyBatchAsync, 12080,                                           \
    (CudaAddress * destinations, CudaAddress * sources, size_t* sizes_bytes, size_t count, \
     CudaCopyAttributes* attributes, size_t* first_of_attributes, size_t attribute_count,  \
     size_t* failed_index, CudaStreamHandle stream))                                       \
  X(MemDiscardBatchAsync, cuMemDiscardBatchAsync, 13000,                                   \
    (CudaAddress * addresses, size_t* sizes_bytes, size_t count, unsigned long long flags, \
     CudaStreamHandle stream))

class CudaDriver {
 public:
  // The table of `path` (empty: OFFLOAD_CUDA_DRIVER, or else libcuda.so.1), loaded and initialised at the
  // first call for that path. Throws kDevice, and tries again at the next call, when there is no driver, it
  // is older than kOldestVersion, lacks an entry, or refuses to initialise; kState in a child that was forked
  // after that, or during it.
  static const CudaDriver& load(const std::string& path = "");

  // cuGetProcAddress came with 11.3 and cuDeviceGetUuid_v2 with 11.4; torch 2.6 needs 11.8.
  static constexpr int kOldestVersion = 11080;

  const std::string& path() const noexcept { return path_; }
  int version() const noexcept { return version_; }  // 12040 is CUDA 12.4

  // "<doing> failed: CUDA_ERROR_X (the driver's text, code N). <what to do>". `remedy` says it better than
  // the code alone would, and does not count where the code means that everything is lost.
  Error error(CudaResult code, const std::string& doing, const std::string& remedy = "") const;

  // Throws error(code, doing) unless the code is 0.
  void check(CudaResult code, const char* doing) const {
    if (code != 0) throw error(code, doing);
  }

#define OFFLOAD_DECLARE_ENTRY(name, symbol, version, parameters) CudaResult(*name) parameters = nullptr;
  OFFLOAD_CUDA_ENTRIES(OFFLOAD_DECLARE_ENTRY)
  OFFLOAD_CUDA_LATER_ENTRIES(OFFLOAD_DECLARE_ENTRY)
#undef OFFLOAD_DECLARE_ENTRY

 private:
  explicit CudaDriver(const std::string& path);

  std::string path_;
  int version_ = 0;
};

}  // namespace offload
