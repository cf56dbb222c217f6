#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "unified/dlpack.h"
#include "unified/torch_allocator.h"
#include "unified/unified_memory.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

Side side_of(const std::string& name) {
  if (name == "host") return Side::kHost;
  if (name == "device") return Side::kDevice;
  throw Error(ErrorKind::kInvalidArgument,
              "there is no side '" + name + "'; the sides are 'host' and 'device'");
}

const char* side_name(Side side) { return side == Side::kHost ? "host" : "device"; }

py::object side_object(const std::optional<Side>& side) {
  return side ? py::object(py::str(side_name(*side))) : py::none();
}

UnifiedKind kind_of(const std::string& name) {
  if (name == "managed") return UnifiedKind::kManaged;
  if (name == "system") return UnifiedKind::kSystem;
  throw Error(ErrorKind::kInvalidArgument,
              "there is no kind '" + name + "' of unified memory; the kinds are 'managed' and 'system'");
}

PlacementHints hints_of(const std::optional<std::string>& preferred_location, bool accessed_by_host,
                        bool accessed_by_device, bool read_mostly) {
  PlacementHints hints;
  if (preferred_location) hints.preferred_location = side_of(*preferred_location);
  hints.accessed_by_host = accessed_by_host;
  hints.accessed_by_device = accessed_by_device;
  hints.read_mostly = read_mostly;
  return hints;
}

CudaStreamHandle stream_of(uintptr_t stream) { return reinterpret_cast<CudaStreamHandle>(stream); }

py::dict memory_facts(int index, const std::string& driver_path) {
  CudaMemoryFacts facts;
  {
    GilReleased released;  // the first use of the driver takes a second
    const CudaDriver& driver = CudaDriver::load(driver_path);
    facts = read_memory_facts(driver, find_cuda_device(driver, index));
  }
  py::dict result;
  result["kind"] = memory_kind_name(facts.kind);
  result["integrated"] = facts.integrated;
  result["managed_memory"] = facts.managed_memory;
  result["concurrent_managed_access"] = facts.concurrent_managed_access;
  result["pageable_memory_access"] = facts.pageable_memory_access;
  result["uses_host_page_tables"] = facts.uses_host_page_tables;
  result["direct_access_from_host"] = facts.direct_access_from_host;
  result["host_native_atomics"] = facts.host_native_atomics;
  result["reads_page_locked_memory"] = facts.reads_page_locked_memory;
  result["host_numa_node"] =
      facts.host_numa_node < 0 ? py::object(py::none()) : py::object(py::int_(facts.host_numa_node));
  return result;
}

// Bytes of a block as a one-dimensional tensor; each one is an owner of the block.
struct Export {
  dlpack::ManagedTensor managed;
  int64_t shape[1];
  std::shared_ptr<UnifiedBlock> block;
};

// torch calls it where the last tensor dies. The end of a block waits for the device.
void delete_export(dlpack::ManagedTensor* managed) {
  delete_without_gil(static_cast<Export*>(managed->owner));
}

// A capsule that nobody took still owns its tensor.
void delete_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, dlpack::kCapsuleName) == 0) return;
  delete_export(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName)));
}

py::capsule capsule_of(const std::shared_ptr<UnifiedBlock>& block, const std::string& side_text) {
  const Side side = side_of(side_text);
  auto exported = std::make_unique<Export>();
  exported->block = block;
  exported->shape[0] = static_cast<int64_t>(block->size_bytes());
  exported->managed = {
      .tensor = {.data = reinterpret_cast<void*>(block->address()),
                 .device_type = side == Side::kHost ? dlpack::kCpu : dlpack::kCuda,
                 .device_id = side == Side::kHost ? 0 : block->index(),
                 .dimension_count = 1,
                 .dtype = {.code = 1, .bits = 8, .lanes = 1},
                 .shape = exported->shape,
                 .strides = nullptr,
                 .byte_offset = 0},
      .owner = exported.get(),
      .deleter = &delete_export,
  };
  py::capsule capsule(static_cast<const void*>(&exported->managed), dlpack::kCapsuleName, &delete_capsule);
  static_cast<void>(exported.release());  // the capsule's from here on
  return capsule;
}

py::dict placement_dict(const UnifiedBlock& block, uintptr_t address, size_t bytes) {
  Placement placement;
  {
    GilReleased released;
    placement = block.placement(address, bytes);
  }
  py::dict result;
  result["preferred_location"] = side_object(placement.hints.preferred_location);
  result["accessed_by_host"] = placement.hints.accessed_by_host;
  result["accessed_by_device"] = placement.hints.accessed_by_device;
  result["read_mostly"] = placement.hints.read_mostly;
  result["last_prefetch"] = side_object(placement.last_prefetch);
  return result;
}

void bind_block(py::module_& module) {
  py::class_<UnifiedBlock, std::shared_ptr<UnifiedBlock>>(module, "UnifiedBlock")
      .def_static(
          "find",
          [](uintptr_t address, size_t bytes) {
            return let_go_without_gil(UnifiedBlock::find(address, bytes));
          },
          py::arg("address"), py::arg("nbytes"))
      .def_property_readonly("address", &UnifiedBlock::address)
      .def_property_readonly("nbytes", &UnifiedBlock::size_bytes)
      .def_property_readonly("index", &UnifiedBlock::index)
      .def_property_readonly("kind",
                             [](const UnifiedBlock& self) {
                               return self.kind() == UnifiedKind::kManaged ? "managed" : "system";
                             })
      .def("dlpack", &capsule_of, py::arg("side"))
      .def(
          "advise",
          [](const UnifiedBlock& self, uintptr_t address, size_t bytes,
             const std::optional<std::string>& preferred_location, bool accessed_by_host,
             bool accessed_by_device, bool read_mostly) {
            const PlacementHints hints =
                hints_of(preferred_location, accessed_by_host, accessed_by_device, read_mostly);
            GilReleased released;
            self.advise(address, bytes, hints);
          },
          py::arg("address"), py::arg("nbytes"), py::kw_only(), py::arg("preferred_location"),
          py::arg("accessed_by_host"), py::arg("accessed_by_device"), py::arg("read_mostly"))
      .def("placement", &placement_dict, py::arg("address"), py::arg("nbytes"))
      .def(
          "prefetch",
          [](const UnifiedBlock& self, uintptr_t address, size_t bytes, const std::string& side_text,
             uintptr_t stream) {
            const Side side = side_of(side_text);
            GilReleased released;
            self.prefetch(address, bytes, side, stream_of(stream));
          },
          py::arg("address"), py::arg("nbytes"), py::arg("side"), py::arg("stream"))
      .def(
          "discard",
          [](const UnifiedBlock& self, uintptr_t address, size_t bytes, uintptr_t stream) {
            GilReleased released;
            return self.discard(address, bytes, stream_of(stream));
          },
          py::arg("address"), py::arg("nbytes"), py::arg("stream"));
}

}  // namespace

void bind_unified(py::module_& module) {
  bind_block(module);
  py::class_<UnifiedMemory, std::shared_ptr<UnifiedMemory>>(module, "UnifiedMemory")
      .def(py::init([](int index, const std::string& driver_path) {
             GilReleased released;  // the first context of a device takes a second, its end too
             return make_joining<UnifiedMemory>(index, driver_path);
           }),
           py::arg("index") = 0, py::kw_only(), py::arg("driver_path") = "")
      .def_property_readonly("live_managed_bytes", &UnifiedMemory::live_managed_bytes)
      .def(
          "allocate",
          [](const UnifiedMemory& self, size_t bytes, const std::string& kind_text,
             const std::optional<std::string>& preferred_location, bool accessed_by_host,
             bool accessed_by_device, bool read_mostly, size_t host_bytes) {
            const UnifiedKind kind = kind_of(kind_text);
            const PlacementHints hints =
                hints_of(preferred_location, accessed_by_host, accessed_by_device, read_mostly);
            std::shared_ptr<UnifiedBlock> block;
            {
              GilReleased released;  // touches the pages of the kind 'system'
              block = self.allocate(bytes, kind, hints, host_bytes);
            }
            return let_go_without_gil(std::move(block));
          },
          py::arg("nbytes"), py::arg("kind"), py::kw_only(), py::arg("preferred_location") = py::none(),
          py::arg("accessed_by_host") = false, py::arg("accessed_by_device") = false,
          py::arg("read_mostly") = false, py::arg("host_bytes"));

  module.def("unified_memory_facts", &memory_facts, py::arg("index"), py::kw_only(),
             py::arg("driver_path") = "");
  module.def("open_torch_allocator", &open_torch_allocator, py::arg("index"), py::kw_only(),
             py::arg("driver_path") = "", py::arg("host_bytes"), py::call_guard<GilReleased>());
  module.def("torch_allocator_refusal", &last_refusal, py::arg("index"));
  // References that keep the functions in the module: only torch calls them, by name.
  module.attr("TORCH_ALLOC_ADDRESS") = reinterpret_cast<uintptr_t>(&offload_unified_alloc);
  module.attr("TORCH_FREE_ADDRESS") = reinterpret_cast<uintptr_t>(&offload_unified_free);
}

}  // namespace offload::bindings
