#include "device/cuda_driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "base/fork_guard.h"

namespace offload {
namespace {

constexpr const char* kDefaultPath = "libcuda.so.1";
constexpr const char* kPathVariable = "OFFLOAD_CUDA_DRIVER";

constexpr const char* kInstallRemedy =
    "Install the NVIDIA driver; start a container with `--gpus all` (NVIDIA Container Toolkit); without a "
    "GPU, use the device 'cpu'";
constexpr const char* kLostRemedy =
    "The context of this device is lost, no CUDA call of this process works any more: restart the process "
    "and go on from a checkpoint; compute-sanitizer, or `dmesg | grep Xid`, tells whose access or which part "
    "failed";

constexpr CudaResult kDeinitialized = 4;  // CUDA_ERROR_DEINITIALIZED

// What the codes of cuda.h ask for; empty where only the place of the call can say it.
const char* remedy_of(CudaResult code) {
  switch (code) {
    case 2:  // OUT_OF_MEMORY
      return "Memory of the device, or of the driver, is exhausted: lower device_budget, or end other "
             "processes on the device (nvidia-smi shows them)";
    case 3:  // NOT_INITIALIZED
      return "CUDA does not survive fork(): start processes that use the GPU with the 'spawn' method";
    case kDeinitialized:
      return "The process is exiting and the driver has shut down: end training before the interpreter exits";
    case 34:  // STUB_LIBRARY
      return "This is the toolkit's stub and no driver: remove its 'stubs' folder from LD_LIBRARY_PATH";
    case 46:  // DEVICE_UNAVAILABLE
      return "Another process owns the device, or its compute mode forbids use: see nvidia-smi";
    case 100:  // NO_DEVICE
      return "No CUDA device is visible: check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's --gpus";
    case 101:  // INVALID_DEVICE
      return "Check the device's index and CUDA_VISIBLE_DEVICES";
    case 802:  // SYSTEM_NOT_READY
      return "The system is not ready for CUDA: start nvidia-fabricmanager, then try again";
    case 803:  // SYSTEM_DRIVER_MISMATCH
      return "libcuda and the kernel module are of different versions: reboot after the driver's update, or "
             "give the container the host's driver";
    case 804:  // COMPAT_NOT_SUPPORTED_ON_DEVICE
      return "This device does not support the forward-compatible libcuda: remove cuda-compat from "
             "LD_LIBRARY_PATH";
    case 999:  // UNKNOWN
      return "`dmesg | grep -i nvrm` may tell more; a reload of the driver or a reboot often helps";
    default: return "";
  }
}

// After these every later call of the context returns the same error (cuda.h: "the process must be
// terminated and relaunched").
bool loses_context(CudaResult code) {
  switch (code) {
    case 214:  // ECC_UNCORRECTABLE
    case 220:  // NVLINK_UNCORRECTABLE
    case 226:  // CONTAINED
    case 700:  // ILLEGAL_ADDRESS
    case 702:  // LAUNCH_TIMEOUT
    case 709:  // CONTEXT_IS_DESTROYED
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case 719:  // LAUNCH_FAILED
    case 721:  // TENSOR_MEMORY_LEAK
    case 810:  // MPS_CLIENT_TERMINATED
    case 911:  // EXTERNAL_DEVICE
      return true;
    default: return false;
  }
}

std::string version_text(int version) {  // 12040 is CUDA 12.4
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The ways to an entry, the newest that the library has.
class EntryFinder {
 public:
  explicit EntryFinder(void* library)
      : library_(library),
        newest_(reinterpret_cast<Newest>(dlsym(library, "cuGetProcAddress_v2"))),
        older_(reinterpret_cast<Older>(dlsym(library, "cuGetProcAddress"))) {}

  // Null when neither cuGetProcAddress nor the dynamic linker knows it.
  void* find(const std::string& symbol, int version) const {
    // cuGetProcAddress takes the name without its suffix: the version says which one is meant.
    const std::string name = symbol.substr(0, symbol.rfind("_v"));
    void* entry = nullptr;
    int status = 0;
    if (newest_ != nullptr && newest_(name.c_str(), &entry, version, kLegacyStream, &status) == 0 &&
        entry != nullptr) {
      return entry;
    }
    if (older_ != nullptr && older_(name.c_str(), &entry, version, kLegacyStream) == 0 && entry != nullptr) {
      return entry;
    }
    return dlsym(library_, symbol.c_str());
  }

 private:
  // Stream 0 is the legacy one, as torch's is.
  static constexpr uint64_t kLegacyStream = 1;  // CU_GET_PROC_ADDRESS_LEGACY_STREAM
  using Newest = CudaResult (*)(const char*, void**, int, uint64_t, int*);  // 12.0
  using Older = CudaResult (*)(const char*, void**, int, uint64_t);         // 11.3

  void* library_;
  Newest newest_;
  Older older_;
};

}  // namespace

CudaDriver::CudaDriver(const std::string& path) : path_(path) {
  // Never closed, also not after a refusal: the driver may have started threads of its own.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw Error(ErrorKind::kDevice, "cannot load the CUDA driver '" + path + "' (" +
                                        (reason != nullptr ? reason : "no reason given") + "). " +
                                        kInstallRemedy);
  }
  const EntryFinder finder(library);
  std::string missing;
#define OFFLOAD_FIND_ENTRY(name, symbol, since, parameters)             \
  name = reinterpret_cast<decltype(name)>(finder.find(#symbol, since)); \
  if (name == nullptr && missing.empty()) missing = #symbol;
  OFFLOAD_CUDA_ENTRIES(OFFLOAD_FIND_ENTRY)
#undef OFFLOAD_FIND_ENTRY
  // The version first: it is why entries are missing in an old driver.
  if (DriverGetVersion != nullptr) check(DriverGetVersion(&version_), "cuDriverGetVersion");
  if (version_ > 0 && version_ < kOldestVersion) {
    throw Error(ErrorKind::kDevice, "the CUDA driver '" + path + "' is too old: it supports CUDA " +
                                        version_text(version_) + ", offload needs " +
                                        version_text(kOldestVersion) +
                                        " or newer. Update the NVIDIA driver (R520 or newer)");
  }
  if (!missing.empty()) {
    throw Error(ErrorKind::kDevice, "the CUDA driver '" + path + "' (version " +
                                        (version_ > 0 ? version_text(version_) : "unknown") + ") has no " +
                                        missing + ". " + kInstallRemedy);
  }
#define OFFLOAD_FIND_LATER_ENTRY(name, symbol, since, parameters) \
  if (version_ >= since) name = reinterpret_cast<decltype(name)>(finder.find(#symbol, since));
  OFFLOAD_CUDA_LATER_ENTRIES(OFFLOAD_FIND_LATER_ENTRY)
#undef OFFLOAD_FIND_LATER_ENTRY
  check(Init(0), "cuInit");
}

const CudaDriver& CudaDriver::load(const std::string& path) {
  struct Tables {
    const ForkGuard owner;
    std::mutex mutex;
    std::map<std::string, std::unique_ptr<CudaDriver>> by_path;  // guarded by mutex
  };
  static OnePerProcess<Tables> tables_of_process;
  // Who has initialised a driver, or is about to: CUDA does not survive fork(), and a thread of the parent
  // may hold the mutex, or the driver's own, for good.
  static std::atomic<const ForkGuard*> initialised_by{nullptr};
  if (const ForkGuard* owner = initialised_by.load()) owner->require_owner("the CUDA driver");
  Tables& tables = tables_of_process.get();

  const char* variable = std::getenv(kPathVariable);
  const std::string chosen = !path.empty()                                ? path
                             : variable != nullptr && variable[0] != '\0' ? variable
                                                                          : kDefaultPath;
  std::lock_guard lock(tables.mutex);
  std::unique_ptr<CudaDriver>& table = tables.by_path[chosen];
  if (!table) {
    const ForkGuard* const before = initialised_by.exchange(&tables.owner);
    try {
      table.reset(new CudaDriver(chosen));
    } catch (...) {
      initialised_by = before;
      throw;
    }
  }
  return *table;
}

Error CudaDriver::error(CudaResult code, const std::string& doing, const std::string& remedy) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (GetErrorName == nullptr || GetErrorName(code, &name) != 0 || name == nullptr) name = "an unknown error";
  if (GetErrorString == nullptr || GetErrorString(code, &text) != 0 || text == nullptr) text = "no text";
  std::string advice = remedy.empty() || code == kDeinitialized ? remedy_of(code) : remedy;
  if (loses_context(code)) advice = kLostRemedy;
  return Error(ErrorKind::kDevice, doing + " failed: " + name + " (" + text + ", code " +
                                       std::to_string(code) + ")" + (advice.empty() ? "" : ". " + advice));
}

}  // namespace offload
