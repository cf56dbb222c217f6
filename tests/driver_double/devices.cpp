// The entries that need no context: the driver itself, its errors, its devices and its symbols.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "driver_double/state.h"

using namespace driver_double;

namespace {

constexpr size_t kTotalBytes = size_t{8} << 30;

bool is_device(int ordinal) { return ordinal >= 0 && ordinal < state().device_count; }

int attribute(const std::string& kind, int which) {
  const bool ats = kind == "ats";
  const bool integrated = kind == "integrated";
  switch (which) {
    case 16: return 32;                    // MULTIPROCESSOR_COUNT
    case 18: return integrated;            // INTEGRATED
    case 19: return 1;                     // CAN_MAP_HOST_MEMORY
    case 40: return integrated ? 1 : 2;    // ASYNC_ENGINE_COUNT
    case 41: return 1;                     // UNIFIED_ADDRESSING
    case 75: return 9;                     // COMPUTE_CAPABILITY_MAJOR
    case 76: return 0;                     // COMPUTE_CAPABILITY_MINOR
    case 78: return 1;                     // STREAM_PRIORITIES_SUPPORTED
    case 83: return 1;                     // MANAGED_MEMORY
    case 86: return ats;                   // HOST_NATIVE_ATOMIC_SUPPORTED
    case 88: return ats || kind == "hmm";  // PAGEABLE_MEMORY_ACCESS
    case 89: return !integrated;           // CONCURRENT_MANAGED_ACCESS
    case 91: return 1;                     // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    case 99: return 1;                     // HOST_REGISTER_SUPPORTED
    case 100: return ats;                  // PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES
    case 101: return ats;                  // DIRECT_MANAGED_MEM_ACCESS_FROM_HOST
    case 113: return 0;                    // READ_ONLY_HOST_REGISTER_SUPPORTED
    case 134: return state().version >= 12020 ? state().host_numa_node : kUnknown;  // HOST_NUMA_ID
    default: return kUnknown;
  }
}

struct ErrorText {
  int code;
  const char* name;
  const char* text;
};

constexpr ErrorText kErrorTexts[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kDeinitialized, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {kNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kContextIsDestroyed, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {kAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {kNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
     "system has unsupported display driver / cuda driver combination"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

int error_text(const char* entry, int code, const char** result, const char* ErrorText::* member) {
  Call call(entry, Needs::kNothing);
  if (call.refused()) return call.code();
  *result = nullptr;
  for (const ErrorText& known : kErrorTexts) {
    if (known.code == code) *result = known.*member;
  }
  return *result != nullptr ? kSuccess : kInvalidValue;
}

}  // namespace

int driver_double::attribute_of_devices(int which) {
  const auto found = state().attributes.find(which);
  return found != state().attributes.end() ? found->second : attribute(state().kind, which);
}

extern "C" {

// --- the driver and its devices --------------------------------------------------------------------------

int cuInit(unsigned flags) {
  Call call("cuInit", Needs::kNothing);
  if (call.refused()) return call.code();
  if (flags != 0) return kInvalidValue;
  if (state().device_count == 0) return kNoDevice;
  state().initialized_by = getpid();
  return kSuccess;
}

int cuDriverGetVersion(int* version) {
  Call call("cuDriverGetVersion", Needs::kNothing);
  if (call.refused()) return call.code();
  *version = state().version;
  return kSuccess;
}

int cuGetErrorName(int error, const char** name) {
  return error_text("cuGetErrorName", error, name, &ErrorText::name);
}

int cuGetErrorString(int error, const char** text) {
  return error_text("cuGetErrorString", error, text, &ErrorText::text);
}

int cuDeviceGetCount(int* count) {
  Call call("cuDeviceGetCount", Needs::kDriver);
  if (call.refused()) return call.code();
  *count = state().device_count;
  return kSuccess;
}

int cuDeviceGet(int* device, int index) {
  Call call("cuDeviceGet", Needs::kDriver);
  if (call.refused()) return call.code();
  if (!is_device(index)) return kInvalidDevice;
  *device = index;
  return kSuccess;
}

int cuDeviceGetName(char* name, int capacity, int device) {
  Call call("cuDeviceGetName", Needs::kDriver);
  if (call.refused()) return call.code();
  if (!is_device(device)) return kInvalidDevice;
  std::snprintf(name, static_cast<size_t>(capacity), "Driver Double %d", device);
  return kSuccess;
}

int cuDeviceGetUuid_v2(void* uuid, int device) {
  Call call("cuDeviceGetUuid_v2", Needs::kDriver);
  if (call.refused()) return call.code();
  if (!is_device(device)) return kInvalidDevice;
  std::memset(uuid, 0xD0 + device, 16);
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int which, int device) {
  Call call("cuDeviceGetAttribute", Needs::kDriver);
  if (call.refused()) return call.code();
  if (!is_device(device)) return kInvalidDevice;
  const int known = attribute_of_devices(which);
  if (known == kUnknown) return kInvalidValue;
  *value = known;
  return kSuccess;
}

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  Call call("cuDeviceTotalMem_v2", Needs::kDriver);
  if (call.refused()) return call.code();
  if (!is_device(device)) return kInvalidDevice;
  *bytes = kTotalBytes;
  return kSuccess;
}

}  // extern "C"
