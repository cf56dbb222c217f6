#include <cstring>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/trace_ring.h"
#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "memory/host_pool.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

py::bytes read() {
  std::vector<TraceRecord> records;
  {
    GilReleased released;
    std::vector<TraceRecord> part(4096);
    size_t count = 0;
    do {  // not until there is none: others go on writing
      count = read_trace(part);
      records.insert(records.end(), part.begin(), part.begin() + static_cast<ptrdiff_t>(count));
    } while (count == part.size());
  }
  return {reinterpret_cast<const char*>(records.data()), records.size() * sizeof(TraceRecord)};
}

}  // namespace

void bind_trace(py::module_& module) {
  module.attr("TRACE_LANES") =
      py::make_tuple("to_host", "to_device", "host_update", "disk_read", "disk_write", "wait", "host_memory");
  py::list tags;
  for (size_t tag = 0; tag < kTagCount; ++tag) tags.append(tag_name(static_cast<Tag>(tag)));
  module.attr("TRACE_TAGS") = py::tuple(tags);
  module.attr("TRACE_RECORD_BYTES") = sizeof(TraceRecord);
  module.def("trace_start", &start_trace, py::call_guard<GilReleased>());
  module.def("trace_stop", &stop_trace);
  module.def("trace_is_on", &trace_is_on);
  module.def("trace_read", &read);
  module.def("trace_lost_count", &trace_lost_count);
  module.def("trace_label", [] {
    const TraceLabel label = trace_label();
    return py::make_tuple(label.name, label.kind);
  });
  module.def(
      "set_trace_label", [](uint32_t name, uint8_t kind) { set_trace_label({.name = name, .kind = kind}); },
      py::arg("name"), py::arg("kind") = 0);
}

}  // namespace offload::bindings
