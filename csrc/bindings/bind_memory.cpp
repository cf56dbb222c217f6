#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "memory/host_pool.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

// A buffer may be the last owner of the pool's pages, and unmapping them is slow.
struct DeleteWithoutGil {
  void operator()(HostBuffer* buffer) const { delete_without_gil(buffer); }
};
using HostBufferHolder = std::unique_ptr<HostBuffer, DeleteWithoutGil>;

constexpr std::array<Tag, kTagCount> kTags = {Tag::kWeights,   Tag::kMaster,      Tag::kMoments,
                                              Tag::kGradients, Tag::kActivations, Tag::kStaging,
                                              Tag::kWindow,    Tag::kBackups};

Tag tag_of(const std::string& name) {
  for (Tag tag : kTags) {
    if (name == tag_name(tag)) return tag;
  }
  std::string legal;
  for (Tag tag : kTags) legal += std::string(legal.empty() ? "" : ", ") + tag_name(tag);
  throw Error(ErrorKind::kInvalidArgument, "there is no tag '" + name + "'; the tags are " + legal);
}

// Python integers have signs: a negative size must not become a huge one.
size_t size_of(int64_t value, const char* name) {
  if (value >= 0) return static_cast<size_t>(value);
  throw Error(ErrorKind::kInvalidArgument,
              std::string(name) + "=" + std::to_string(value) + " is negative; give a number of bytes");
}

HostPoolOptions options_of(std::optional<int64_t> budget_bytes, int64_t slab_bytes, bool pin, bool huge_pages,
                           int numa_node, bool poison) {
  HostPoolOptions options;
  if (budget_bytes) options.budget_bytes = size_of(*budget_bytes, "budget_bytes");
  options.slab_bytes = size_of(slab_bytes, "slab_bytes");
  options.pin = pin;
  options.huge_pages = huge_pages;
  options.numa_node = numa_node;
  options.poison = poison;
  return options;
}

HostBufferHolder acquire(HostPool& pool, int64_t nbytes, const std::string& tag_text, int64_t alignment) {
  const size_t bytes = size_of(nbytes, "nbytes");
  const size_t alignment_bytes = size_of(alignment, "alignment");
  const Tag tag = tag_of(tag_text);
  std::optional<HostBuffer> buffer;
  wait_interruptibly([&](int64_t slice_ns) {
    buffer = pool.acquire_within(bytes, tag, slice_ns, alignment_bytes);
    return buffer.has_value();
  });
  return HostBufferHolder(new HostBuffer(std::move(*buffer)));
}

py::dict stats_dict(const HostPoolStats& stats) {
  py::dict by_tag, peak_by_tag;
  for (Tag tag : kTags) {
    by_tag[tag_name(tag)] = stats.tag_bytes[static_cast<size_t>(tag)];
    peak_by_tag[tag_name(tag)] = stats.tag_peak_bytes[static_cast<size_t>(tag)];
  }
  py::dict result;
  result["budget_bytes"] = stats.budget_bytes;
  result["mapped_bytes"] = stats.mapped_bytes;
  result["pinned_bytes"] = stats.pinned_bytes;
  result["used_bytes"] = stats.used_bytes;
  result["requested_bytes"] = stats.requested_bytes;
  result["peak_used_bytes"] = stats.peak_used_bytes;
  result["waiting_bytes"] = stats.waiting_bytes;
  result["live_count"] = stats.live_count;
  result["tag_bytes"] = by_tag;
  result["tag_peak_bytes"] = peak_by_tag;
  result["pin_refused"] = stats.pin_refused;
  result["pin_refusal"] = stats.pin_refusal;
  return result;
}

void bind_host_buffer(py::module_& module) {
  py::class_<HostBuffer, HostBufferHolder>(module, "HostBuffer", py::buffer_protocol())
      .def_buffer([](HostBuffer& self) {
        return py::buffer_info(static_cast<uint8_t*>(self.address()),
                               static_cast<py::ssize_t>(self.size_bytes()));
      })
      .def_property_readonly(
          "address", [](const HostBuffer& self) { return reinterpret_cast<uintptr_t>(self.address()); })
      .def_property_readonly("nbytes", &HostBuffer::size_bytes)
      .def_property_readonly("tag", [](const HostBuffer& self) { return tag_name(self.tag()); })
      .def("release_after", &HostBuffer::release_after, py::arg("ticket"));
}

void bind_host_pool(py::module_& module) {
  constexpr auto kDefaultSlabBytes = static_cast<int64_t>(HostPoolOptions{}.slab_bytes);
  py::class_<HostPool, std::shared_ptr<HostPool>>(module, "HostPool")
      .def(py::init([](std::shared_ptr<Device> device, std::optional<int64_t> budget_bytes,
                       int64_t slab_bytes, bool pin, bool huge_pages, int numa_node, bool poison) {
             return make_joining<HostPool>(
                 std::move(device), options_of(budget_bytes, slab_bytes, pin, huge_pages, numa_node, poison));
           }),
           py::arg("device") = py::none(), py::kw_only(), py::arg("budget_bytes") = py::none(),
           py::arg("slab_bytes") = kDefaultSlabBytes, py::arg("pin") = false, py::arg("huge_pages") = true,
           py::arg("numa_node") = -1, py::arg("poison") = false)
      .def(
          "reserve",
          [](HostPool& self, int64_t nbytes) {
            const size_t bytes = size_of(nbytes, "nbytes");
            GilReleased released;
            self.reserve(bytes);
          },
          py::arg("nbytes"))
      .def("acquire", &acquire, py::arg("nbytes"), py::arg("tag"), py::arg("alignment") = 1)
      .def("trim", &HostPool::trim, py::call_guard<GilReleased>())
      .def("trace_sample", &HostPool::trace_sample, py::call_guard<GilReleased>())
      .def("stats", [](const HostPool& self) {
        HostPoolStats stats;
        {
          GilReleased released;
          stats = self.stats();
        }
        return stats_dict(stats);
      });

  module.def(
      "pool_layout",
      [](const std::vector<size_t>& sizes_bytes, bool reserve_first) {
        HostPoolStats stats;
        {
          GilReleased released;
          stats = layout_stats(sizes_bytes, reserve_first, HostPoolOptions{});
        }
        return stats_dict(stats);
      },
      py::arg("sizes_bytes"), py::kw_only(), py::arg("reserve_first") = true);
}

}  // namespace

void bind_memory(py::module_& module) {
  bind_host_buffer(module);
  bind_host_pool(module);
}

}  // namespace offload::bindings
