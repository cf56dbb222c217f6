// As much of libcuda as cuda.core needs to load a binary and to launch what is in it: a launch runs the
// kernel of this library, whatever the binary says, in a thread that has a context. HOST_DRIVER_FAILS=<entry>
// makes that entry return HOST_DRIVER_CODE.
#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "accesses.h"

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500;

// The context that is current in this thread; there is one, that of the one device.
thread_local void* current_context = nullptr;
int context;

struct LaunchConfig {  // CUlaunchConfig of cuda.h
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

using Launch = bool (*)(unsigned blocks, unsigned threads, void** arguments, size_t count);

struct Kernel {
  const char* name;
  size_t argument_count;
};
constexpr Kernel kKernels[] = {
    {"adamw", 23},      {"adamw_bf16", 23}, {"adamw_int8", 23}, {"lion", 22},
    {"lion_bf16", 22},  {"lion_int8", 22},  {"adagrad", 19},    {"encode_int8", 5},
    {"decode_int8", 5}, {"encode_fp8", 5},  {"decode_fp8", 5},
};

// The symbol `name` of this library; of another libcuda it would be the real one.
void* own(const std::string& name) {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&own), &info) == 0) return nullptr;
  void* self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  return self == nullptr ? nullptr : dlsym(self, name.c_str());
}

int outcome(const char* entry) {
  const char* failing = std::getenv("HOST_DRIVER_FAILS");
  if (failing == nullptr || std::strcmp(failing, entry) != 0) return kSuccess;
  return std::atoi(std::getenv("HOST_DRIVER_CODE"));
}

}  // namespace

extern "C" {

int cuGetProcAddress_v2(const char* name, void** address, int, unsigned long long, int* found) {
  *address = own(name);
  if (found != nullptr) *found = *address == nullptr;  // CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND is 1
  return *address == nullptr ? kNotFound : kSuccess;
}

int cuInit(unsigned) { return kSuccess; }

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

int cuGetErrorName(int, const char** name) {
  *name = std::getenv("HOST_DRIVER_CODE");
  return kSuccess;
}

int cuGetErrorString(int, const char** text) {
  *text = "as the test wanted";
  return kSuccess;
}

// NVRTC asks a libcuda that is there, and goes on without.
int cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return kNotFound;
}

int cuDeviceGetCount(int* count) {
  *count = 1;
  return kSuccess;
}

int cuDeviceGet(int* device, int) {
  *device = 0;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** retained, int) {
  *retained = &context;
  return kSuccess;
}

int cuDevicePrimaryCtxRelease(int) { return kSuccess; }

int cuCtxSetCurrent(void* wanted) {
  current_context = wanted;
  return kSuccess;
}

int cuCtxGetCurrent(void** current) {
  *current = current_context;
  return kSuccess;
}

int cuMemcpyAsync(void* destination, const void* source, size_t bytes, void*) {
  std::memcpy(destination, source, bytes);
  return kSuccess;
}

int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  if (std::memcmp(code,
                  "\x7f"
                  "ELF",
                  4) != 0)
    return kInvalidValue;
  *library = own("cuInit");  // any address
  return outcome("cuLibraryLoadData");
}

int cuLibraryUnload(void*) { return kSuccess; }

int cuLibraryGetKernel(const void** kernel, void*, const char* name) {
  for (const Kernel& known : kKernels) {
    if (std::strcmp(known.name, name) != 0) continue;
    *kernel = &known;
    return outcome("cuLibraryGetKernel");
  }
  return kNotFound;
}

int cuLaunchKernelEx(const LaunchConfig* config, const Kernel* kernel, void** arguments, void**) {
  if (current_context == nullptr) return kInvalidContext;
  std::printf("%s on %zu\n", kernel->name, reinterpret_cast<size_t>(config->stream));
  std::fflush(stdout);
  const auto launch = reinterpret_cast<Launch>(own(std::string("launch_") + kernel->name));
  const bool flat = config->grid[1] * config->grid[2] * config->block[1] * config->block[2] == 1;
  if (!flat || config->shared_bytes != 0 || config->attribute_count != 0) return kInvalidValue;
  if (!launch(config->grid[0], config->block[0], arguments, kernel->argument_count)) return kInvalidValue;
  note_launch(config->stream, kernel->name, arguments);
  return outcome("cuLaunchKernelEx");
}

}  // extern "C"
