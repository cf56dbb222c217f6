// A device of torch that is not the CPU and lives in host memory: what of a
// card does not need a card.
//
// It takes torch's place for devices from outside (PrivateUse1). Its tensors
// have an allocator and storages of their own, and autograd runs their backward
// in a thread of its own, as it does for CUDA. Every operator computes with the
// CPU's kernels over the same memory, at once: streams are always idle, and tell
// what is ordered after what.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "uses.h"

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Storage;
using c10::Stream;

constexpr c10::DeviceType kCard = c10::DeviceType::PrivateUse1;
constexpr size_t kAlignment = 256;

// --- memory
// ------------------------------------------------------------------------------------------------

std::atomic<size_t> allocated_bytes{0};
std::atomic<size_t> peak_bytes{0};

// In front of every allocation.
struct Header {
  size_t bytes;
  c10::StreamId stream;  // that it was allocated on, and goes back to
};

// The streams that memory was recorded on, by address, until it is freed.
std::mutex recorded_mutex;
std::unordered_map<const void*, std::set<uintptr_t>> recorded_streams;

void record_stream_of(const void* memory, const Stream& stream) {
  const std::lock_guard lock(recorded_mutex);
  recorded_streams[memory].insert(stream.id());
}

std::vector<uintptr_t> take_recorded_streams(const void* memory) {
  const std::lock_guard lock(recorded_mutex);
  const auto recorded = recorded_streams.extract(memory);
  if (recorded.empty()) return {};
  return {recorded.mapped().begin(), recorded.mapped().end()};
}

// What is freed is written over: who goes on reading it sees another value.
void free_memory(void* memory) {
  if (memory == nullptr) return;
  char* begin = static_cast<char*>(memory) - kAlignment;
  const auto [bytes, stream] = *reinterpret_cast<Header*>(begin);
  const std::vector<uintptr_t> used_on = take_recorded_streams(memory);
  const double_span span{reinterpret_cast<uintptr_t>(memory), bytes, card::kFrees};
  card::driver_double().free(stream, used_on.data(), used_on.size(), "memory that nobody refers to", &span);
  std::memset(memory, 0xEE, bytes);
  allocated_bytes -= bytes;
  std::free(begin);
}

class CardAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    if (bytes > 0) {
      void* begin = nullptr;
      TORCH_CHECK(posix_memalign(&begin, kAlignment, bytes + kAlignment) == 0, "no memory for ", bytes,
                  " bytes");
      *static_cast<Header*>(begin) = {bytes, card::current_stream};
      memory = static_cast<char*>(begin) + kAlignment;
      std::memset(memory, 0xFF, bytes);  // NaN in every format
      card::Uses("new memory").add(memory, bytes, card::kAllocates);
      const size_t now = allocated_bytes += bytes;
      size_t peak = peak_bytes;
      while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {
      }
    }
    return {memory, memory, &free_memory, Device(kCard, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_memory; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

CardAllocator allocator;
REGISTER_ALLOCATOR(kCard, &allocator);

// --- the device
// --------------------------------------------------------------------------------------------

Stream stream_of(c10::StreamId id) { return Stream(Stream::UNSAFE, Device(kCard, 0), id); }

struct CardEvent {
  size_t recorded = 0;
  std::chrono::steady_clock::time_point at = {};
};

struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCard; }
  Device exchangeDevice(Device) const override { return Device(kCard, 0); }
  Device getDevice() const override { return Device(kCard, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream_of(card::current_stream); }
  Stream getDefaultStream(Device) const override { return stream_of(0); }
  Stream exchangeStream(Stream stream) const override {
    return stream_of(std::exchange(card::current_stream, stream.id()));
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new CardEvent;
    *static_cast<CardEvent*>(*event) = {card::driver_double().record(stream.id()),
                                        std::chrono::steady_clock::now()};
  }
  void block(void* event, const Stream& stream) const override {
    card::driver_double().wait(stream.id(), recorded_by(event));
  }
  // All that was recorded is over by the time that anybody asks, and is known to be once he has.
  bool queryEvent(void* event) const override {
    card::driver_double().host_waits(recorded_by(event));
    return true;
  }
  void synchronizeEvent(void* event) const override { queryEvent(event); }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    delete static_cast<CardEvent*>(event);
  }
  double elapsedTime(void* begin, void* end, DeviceIndex) const override {
    const auto between = static_cast<CardEvent*>(end)->at - static_cast<CardEvent*>(begin)->at;
    return std::chrono::duration<double, std::milli>(between).count();
  }
  bool queryStream(const Stream& stream) const override {
    card::driver_double().host_waits_for(stream.id());
    return true;
  }
  void synchronizeStream(const Stream& stream) const override { queryStream(stream); }
  void synchronizeDevice(DeviceIndex) const override { card::driver_double().synchronize(); }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const Stream& stream) const override {
    if (memory.get_deleter() == &free_memory) record_stream_of(memory.get(), stream);
  }

 private:
  static size_t recorded_by(void* event) {
    return event == nullptr ? 0 : static_cast<CardEvent*>(event)->recorded;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, CardGuard);

void resize_storage(const Storage& storage, size_t bytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  c10::DataPtr memory = allocator.allocate(bytes);
  if (const size_t kept = std::min(bytes, impl->nbytes()); kept > 0) {
    std::memcpy(memory.get(), impl->data(), kept);
    card::Uses uses("a storage that is resized");
    uses.add(impl->data(), kept, card::kReads);
    uses.add(memory.get(), kept, card::kWrites);
  }
  impl->set_data_ptr_noswap(std::move(memory));
  impl->set_nbytes(bytes);
}

// Page-locked memory of the host, as torch's loaders ask for; nothing here
// copies it any faster.
std::mutex pinned_mutex;
std::set<const void*> pinned;

void free_pinned(void* memory) {
  {
    const std::lock_guard lock(pinned_mutex);
    pinned.erase(memory);
  }
  std::free(memory);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, kAlignment, bytes) == 0, "no memory for ", bytes, " bytes");
    const std::lock_guard lock(pinned_mutex);
    pinned.insert(memory);
    return {memory, memory, &free_pinned, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

struct CardHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Device getDeviceFromPtr(void*) const override { return Device(kCard, 0); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator of_host;
    return &of_host;
  }
  bool isPinnedPtr(const void* memory) const override {
    const std::lock_guard lock(pinned_mutex);
    return pinned.contains(memory);
  }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

[[maybe_unused]] const bool has_hooks = [] {
  static CardHooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// --- operators
// ---------------------------------------------------------------------------------------------

Storage cpu_storage_over(const Storage& card) {
  return Storage(Storage::use_byte_size_t(), card.nbytes(),
                 c10::DataPtr(card.mutable_data(), Device(c10::kCPU)), nullptr, false);
}

at::Tensor tensor_over(const Storage& storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  // As a view, which takes its keys as they are, also in inference mode.
  auto tensor =
      at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, Storage(storage), keys, like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return tensor;
}

at::Tensor new_on_card(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType dtype) {
  const auto type = c10::scalarTypeToTypeMeta(dtype);
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, type.itemsize());
  Storage storage(Storage::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return tensor;
}

// The arguments of one call as tensors of the CPU over the same memory, and its
// results as tensors of the card.
class OverCpu {
 public:
  explicit OverCpu(std::string name) : uses_(std::move(name)) {}

  at::Tensor argument(const at::Tensor& card, card::Use use = card::kReads) {
    if (!card.defined() || card.device().type() != kCard) return card;
    TORCH_CHECK(card.layout() == c10::kStrided, "this device has dense tensors only, got ", card.layout());
    uses_.add(card, use);
    at::Tensor cpu;
    if (use == card::kWrites && card.numel() == 0) {  // an `out=` that the operator gives its size
      cpu = at::empty(card.sizes(), card.options().device(c10::kCPU));
    } else {
      cpu = tensor_over(cpu_storage_of(card), c10::DispatchKeySet(c10::DispatchKey::CPU), card);
    }
    cpu._set_conj(card.is_conj());
    tensors_.emplace_back(cpu, card);
    return cpu;
  }

  // What operators in place have done to sizes.
  void take_sizes() {
    for (const auto& [cpu, card] : tensors_) {
      if (card_storage_of(cpu) == nullptr) {
        if (cpu.sizes() != card.sizes()) card.resize_(cpu.sizes()).copy_(cpu);
      } else if (cpu.sizes() != card.sizes() || cpu.strides() != card.strides()) {
        card.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      }
    }
  }

  at::Tensor result(const at::Tensor& cpu) {
    if (!cpu.defined() || cpu.device().type() != c10::kCPU) return cpu;
    for (const auto& [argument, card] : tensors_) {
      if (argument.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) return card;
    }
    if (cpu.is_sparse()) {
      return at::_sparse_coo_tensor_unsafe(result(cpu._indices()), result(cpu._values()), cpu.sizes(),
                                           cpu.options().device(kCard), cpu.is_coalesced());
    }
    if (const at::Tensor* base = card_storage_of(cpu))
      return tensor_over(base->storage(), base->key_set(), cpu);
    at::Tensor card = new_on_card(cpu.sizes(), cpu.strides(), cpu.scalar_type());
    tensor_over(cpu_storage_over(card.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), card)
        .copy_(cpu);
    uses_.add(card, card::kWrites);
    if (cpu.unsafeGetTensorImpl()->is_wrapped_number()) card.unsafeGetTensorImpl()->set_wrapped_number(true);
    return card;
  }

 private:
  const Storage& cpu_storage_of(const at::Tensor& card) {
    for (const auto& [cpu, known] : storages_) {
      if (known.unsafeGetStorageImpl() == card.storage().unsafeGetStorageImpl()) return cpu;
    }
    return storages_.emplace_back(cpu_storage_over(card.storage()), card.storage()).first;
  }

  // The argument whose memory this tensor of the CPU is over; null where it has
  // memory of its own.
  const at::Tensor* card_storage_of(const at::Tensor& cpu) const {
    if (!cpu.has_storage()) return nullptr;
    for (const auto& [argument, card] : tensors_) {
      const auto* storage = argument.storage().unsafeGetStorageImpl();
      const bool is_over = std::any_of(storages_.begin(), storages_.end(), [&](const auto& pair) {
        return pair.first.unsafeGetStorageImpl() == storage;
      });
      if (is_over && storage == cpu.storage().unsafeGetStorageImpl()) return &card;
    }
    return nullptr;
  }

  // In inference mode and in torch.func, too, nothing below is a step of autograd.
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // of the CPU, of the card
  std::vector<std::pair<Storage, Storage>> storages_;
  card::Uses uses_;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  OverCpu over(name);
  const auto& arguments = op.schema().arguments();
  const size_t begin = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[begin + i];
    const c10::AliasInfo* alias = arguments[i].alias_info();
    const bool is_viewed = alias != nullptr && !alias->isWrite();
    const card::Use use = is_viewed || card::only_looks(name) ? card::kLooks
                          : alias == nullptr                  ? card::kReads
                                                              : card::kWrites;
    if (value.isTensor()) {
      value = over.argument(value.toTensor(), use);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(over.argument(tensor, use));
      value = std::move(tensors);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        tensors.push_back(tensor ? std::optional(over.argument(*tensor)) : std::nullopt);
      }
      value = std::move(tensors);
    } else if (value.isDevice() && value.toDevice().type() == kCard) {
      value = Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  over.take_sizes();
  bool waits = card::waits_for_size(name);
  const size_t first = stack->size() - op.schema().returns().size();
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    waits |= i == first && !value.isTensor() && !value.isTensorList();  // the host has the value
    if (value.isTensor()) {
      value = over.result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(over.result(tensor));
      value = std::move(tensors);
    }
  }
  if (waits) card::host_waits();
}

c10::ScalarType or_default(std::optional<c10::ScalarType> dtype) {
  return dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
}

std::vector<int64_t> strides_of(c10::IntArrayRef sizes, std::optional<c10::MemoryFormat> format = {}) {
  return at::empty(sizes, at::TensorOptions().device(c10::kMeta), format).strides().vec();
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<Device>, std::optional<bool>) {
  return new_on_card(sizes, strides, or_default(dtype));
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return new_on_card(sizes, strides_of(sizes, format), or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  {
    OverCpu over("aten::copy_");
    over.argument(to, card::kWrites).copy_(over.argument(from));
  }
  if (!non_blocking && from.device() != to.device()) card::host_waits();
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  return copy_from(from, to.resize_(from.sizes()), false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef sizes,
                        c10::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      sizes, strides.size() == sizes.size() ? strides.vec() : strides_of(sizes), offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const int64_t count = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& other) {
  return set_storage(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, new_on_card({0}, {1}, self.scalar_type()).storage(), 0, {0}, {1});
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef sizes, std::optional<c10::MemoryFormat>) {
  const auto strides = strides_of(sizes);
  const size_t bytes =
      at::detail::computeStorageNbytes(sizes, strides, self.dtype().itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) resize_storage(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, self.storage_offset());
  return self;
}

void record_stream(at::Tensor& self, at::Stream stream) {
  CardGuard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// `parameter.data = ` a tensor of the CPU, or the reverse, which torch asks of
// CPU and CUDA alone to be the same kind of tensor.
bool may_replace(const at::Tensor& self, const at::Tensor& from) {
  return self.layout() == c10::kStrided && from.layout() == c10::kStrided;
}

using Ints = c10::SymIntArrayRef;

// torch asks devices from outside for these two, and for no others of their
// kind.
at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, Ints stride, Ints padding, Ints dilation,
                       bool transposed, Ints output_padding, c10::SymInt groups) {
  OverCpu over("aten::convolution");
  const std::optional<at::Tensor> of_cpu = bias ? std::optional(over.argument(*bias)) : std::nullopt;
  return over.result(at::convolution_symint(over.argument(input), over.argument(weight), of_cpu, stride,
                                            padding, dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, Ints stride, Ints padding,
    Ints dilation, bool transposed, Ints output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  OverCpu over("aten::convolution_backward");
  const c10::SymInt channels = gradient.sym_size(1);
  const at::OptionalSymIntArrayRef bias_sizes =
      mask[2] ? at::OptionalSymIntArrayRef(Ints(&channels, 1)) : std::nullopt;
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      over.argument(gradient), over.argument(input), over.argument(weight), bias_sizes, stride, padding,
      dilation, transposed, output_padding, groups, mask);
  return {over.result(of_input), over.result(of_weight), over.result(of_bias)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_", set_nothing);
  library.impl("resize_", resize);
  library.impl("record_stream", record_stream);
  library.impl("_has_compatible_shallow_copy_type", may_replace);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

// Copies read and write conjugated tensors; what resolves them first is a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace

// torch's macros name what they need without its namespace.
namespace at::autocast {

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FP32_SET_OPT_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FP32_SET_OPT_DTYPE)
  AT_FORALL_PROMOTE(PROMOTE)
}

}  // namespace at::autocast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("allocated_bytes", [] { return allocated_bytes.load(); });
  module.def("compute_stream", [] { return card::driver_double().compute_stream(); });
  module.def("current_stream", [] { return card::current_stream; });
  module.def("exchange_stream",
             [](c10::StreamId stream) { return std::exchange(card::current_stream, stream); });
  module.def("peak_bytes", [] { return peak_bytes.load(); });
  module.def("reset_peak_bytes", [] { peak_bytes = allocated_bytes.load(); });
}
