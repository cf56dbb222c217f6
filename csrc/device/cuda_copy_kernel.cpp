#include "device/cuda_copy_kernel.h"

#include <algorithm>

namespace offload {
namespace {

// As in kernels/copies.cu.
constexpr size_t kThreads = 256;
constexpr size_t kBlocksPerSpan = 4;
constexpr size_t kSpansAtMost = 64;

struct Spans {
  CopySpan at[kSpansAtMost];  // addresses and bytes are 64-bit on both sides
};
static_assert(sizeof(CopySpan) == 24 && sizeof(Spans) <= 4096, "what a launch takes by value");

}  // namespace

CudaCopyKernel::CudaCopyKernel(const CudaDriver& driver, std::span<const std::byte> cubin) : driver_(driver) {
  driver_.check(driver_.ModuleLoadData(&module_, cubin.data()), "cuModuleLoadData");
  if (const CudaResult code = driver_.ModuleGetFunction(&function_, module_, "copy_spans"); code != 0) {
    static_cast<void>(driver_.ModuleUnload(module_));
    throw driver_.error(code, "cuModuleGetFunction");
  }
}

CudaCopyKernel::~CudaCopyKernel() {
  // Refused only where the context is lost or the process exiting, and the module gone with it.
  static_cast<void>(driver_.ModuleUnload(module_));
}

CudaResult CudaCopyKernel::launch(std::span<const CopySpan> copies, CudaStreamHandle stream) const noexcept {
  while (!copies.empty()) {
    const size_t count = std::min(copies.size(), kSpansAtMost);
    Spans spans{};
    std::copy_n(copies.begin(), count, spans.at);
    void* arguments[] = {&spans};
    const auto blocks = static_cast<unsigned>(count * kBlocksPerSpan);
    if (const CudaResult code =
            driver_.LaunchKernel(function_, blocks, 1, 1, kThreads, 1, 1, 0, stream, arguments, nullptr)) {
      return code;
    }
    copies = copies.subspan(count);
  }
  return 0;
}

}  // namespace offload
