#include <memory>
#include <string>

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
      .def(py::init([](int index, const std::string& driver_path) {
             GilReleased released;  // the first use of a device takes a second
             CudaDeviceOptions options;
             options.index = index;
             options.driver_path = driver_path;
             return make_joining<CudaDevice>(options);
           }),
           py::arg("index") = 0, py::kw_only(), py::arg("driver_path") = "")
      .def("facts", &facts_dict)
      .def_property_readonly("pinned_bytes", &CudaDevice::pinned_bytes);
}

}  // namespace offload::bindings
