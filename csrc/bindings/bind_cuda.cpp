#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "device/cuda_device.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

py::dict facts_dict(const CudaDevice& device) {
  CudaFacts facts;
  {
    GilReleased released;
    facts = device.facts();
  }
  py::dict result;
  result["name"] = facts.name;
  result["uuid"] = facts.uuid;
  result["index"] = facts.index;
  result["memory_kind"] = memory_kind_name(facts.memory_kind);
  result["compute_capability"] =
      py::make_tuple(facts.compute_capability_major, facts.compute_capability_minor);
  result["multiprocessor_count"] = facts.multiprocessor_count;
  result["copy_engine_count"] = facts.copy_engine_count;
  result["total_bytes"] = facts.total_bytes;
  result["free_bytes"] = facts.free_bytes;
  result["driver_version"] = facts.driver_version;
  result["can_pin"] = facts.can_pin;
  result["pageable_copy_count"] = facts.pageable_copy_count;
  return result;
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::class_<CudaDevice, Device, std::shared_ptr<CudaDevice>>(module, "CudaDevice")
      .def(py::init([](int index, const std::string& driver_path, bool takes_batches) {
             GilReleased released;  // the first use of a device takes a second
             CudaDeviceOptions options;
             options.index = index;
             options.driver_path = driver_path;
             options.takes_batches = takes_batches;
             return make_joining<CudaDevice>(options);
           }),
           py::arg("index") = 0, py::kw_only(), py::arg("driver_path") = "", py::arg("takes_batches") = true)
      .def(
          "load_copy_kernel",
          [](CudaDevice& device, std::string_view cubin) {
            GilReleased released;
            device.load_copy_kernel(std::as_bytes(std::span(cubin)));
          },
          py::arg("cubin"))
      .def("facts", &facts_dict)
      .def_property_readonly("pinned_bytes", &CudaDevice::pinned_bytes);
}

}  // namespace offload::bindings
