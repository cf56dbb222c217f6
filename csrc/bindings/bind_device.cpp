#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/ticket.h"
#include "base/trace_ring.h"
#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "device/host_device.h"
#include "memory/host_pool.h"
#include "transfer/transfer_queue.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

const char* name_of(CopiesTogether way) {
  switch (way) {
    case CopiesTogether::kInOneCall: return "in one call";
    case CopiesTogether::kByKernel: return "by a kernel";
    case CopiesTogether::kOneByOne: return "one by one";
  }
  return "";
}

int64_t timeout_ns(std::optional<double> timeout_s) {
  if (!timeout_s) return -1;
  if (!(*timeout_s >= 0)) {
    throw Error(ErrorKind::kInvalidArgument, "timeout_s is " + std::to_string(*timeout_s) +
                                                 "; give seconds >= 0, or None to wait for ever");
  }
  constexpr double kLongestSeconds = 9e9;  // what fits into 63 bits of nanoseconds
  return static_cast<int64_t>(std::fmin(*timeout_s, kLongestSeconds) * 1e9);
}

Direction direction_of(const std::string& lane) {
  if (lane == "to_host") return Direction::kToHost;
  if (lane == "to_device") return Direction::kToDevice;
  throw Error(ErrorKind::kInvalidArgument,
              "there is no lane '" + lane + "'; the lanes are 'to_host' and 'to_device'");
}

// nullptr for None. pybind11 takes None as such a pointer too, but first asks its class for an attribute that
// it does not have, which costs more than the copy of a small weight.
template <typename Pointer>
Pointer optional(const py::object& object) {
  return object.is_none() ? nullptr : object.cast<Pointer>();
}

// Signal handlers of Python run between two calls, never within one. So what has to follow a submission,
// whatever a handler raises, is done here: `ticket` becomes the copy's, and the block of `buffer` waits for
// it.
template <Direction direction>
py::object submit(TransferQueue& self, uintptr_t destination, uintptr_t source, size_t bytes,
                  uintptr_t compute_stream, const py::object& after_or_none, const py::object& ticket_or_none,
                  const py::object& buffer_or_none) {
  const auto* after = optional<const Ticket*>(after_or_none);
  auto* ticket = optional<Ticket*>(ticket_or_none);
  auto* buffer = optional<HostBuffer*>(buffer_or_none);
  // A copy of the handle: submit() of another thread may change what Python's object holds.
  const Ticket waited_for = after != nullptr ? *after : Ticket();
  Ticket submitted;
  {
    TraceLabel label = trace_label();
    if (buffer != nullptr) label.kind = traced_kind(buffer->tag());
    const TraceLabelled traced(label);
    GilReleased released;
    submitted = self.submit(direction, reinterpret_cast<void*>(destination),
                            reinterpret_cast<const void*>(source), bytes, compute_stream, waited_for);
  }
  if (ticket != nullptr) *ticket = submitted;
  if (buffer != nullptr) buffer->release_after(submitted);
  // The same object of Python's where one was given.
  return ticket != nullptr ? ticket_or_none : py::cast(std::move(submitted));
}

// The same for a list of (destination, source, bytes, ticket, buffer), which is empty afterwards: the copies
// have one submission, under `trace_name` in traces. A refused one puts them back, before what came
// meanwhile.
void submit_all_to_host(TransferQueue& self, py::list copies, uintptr_t compute_stream, uint32_t trace_name) {
  using Item = std::tuple<uintptr_t, uintptr_t, size_t, Ticket*, HostBuffer*>;
  const py::tuple taken(copies);
  std::vector<Item> items;
  std::vector<CopySpan> spans;
  for (const py::handle each : taken) {
    const auto& [destination, source, bytes, ticket, buffer] = items.emplace_back(each.cast<Item>());
    spans.push_back({reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes});
  }
  if (items.empty()) return;
  copies.attr("clear")();  // no other thread sends them again
  Ticket submitted;
  try {
    const Tag tag = std::get<HostBuffer*>(items.front())->tag();
    const TraceLabelled traced({.name = trace_name, .kind = traced_kind(tag)});
    GilReleased released;
    submitted = self.submit(Direction::kToHost, spans, compute_stream);
  } catch (...) {
    copies[py::slice(0, 0, 1)] = taken;
    throw;
  }
  for (const auto& [destination, source, bytes, ticket, buffer] : items) {
    *ticket = submitted;
    buffer->release_after(submitted);
  }
}

Ticket submit_batch(TransferQueue& self, const std::string& lane,
                    const std::vector<std::tuple<uintptr_t, uintptr_t, size_t>>& copies,
                    uintptr_t compute_stream) {
  std::vector<CopySpan> spans;
  for (const auto& [destination, source, bytes] : copies) {
    spans.push_back({reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes});
  }
  GilReleased released;
  return self.submit(direction_of(lane), spans, compute_stream);
}

void bind_base(py::module_& module) {
  py::class_<Ticket>(module, "Ticket")
      .def(py::init<>())
      .def_static("pending", [] { return Ticket::pending(); })
      .def_property_readonly("done", &Ticket::done)
      .def(
          "wait",
          [](const Ticket& self, std::optional<double> timeout_s) {
            const int64_t limit_ns = timeout_ns(timeout_s);
            if (self.done()) return self.wait();  // at once: raises the error of failed work
            return wait_interruptibly([ticket = self](int64_t slice_ns) { return ticket.wait(slice_ns); },
                                      limit_ns);
          },
          py::arg("timeout_s") = py::none())
      // Copies of the handles: submit() of another thread may change what Python's objects hold.
      .def("complete",
           [](const Ticket& self) {
             const Ticket ticket = self;
             GilReleased released;
             ticket.complete();
           })
      .def(
          "end_with",
          [](const Ticket& self, const Ticket& other) {
            const Ticket ticket = self, followed = other;
            GilReleased released;
            followed.on_end([ticket](const std::exception_ptr& error) { ticket.fail(error); });
          },
          py::arg("other"))
      .def(
          "fail",
          [](const Ticket& self, const std::string& message) {
            const Ticket ticket = self;
            GilReleased released;
            ticket.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, message)));
          },
          py::arg("message"));

  py::class_<ManualClock, std::shared_ptr<ManualClock>>(module, "ManualClock")
      .def(py::init<>())
      .def("now_ns", &ManualClock::now_ns)
      .def("advance", &ManualClock::advance, py::arg("delta_ns"))
      .def("deadlines_ns", &ManualClock::deadlines_ns);
}

void bind_host_device(py::module_& module) {
  py::class_<Device, std::shared_ptr<Device>>(module, "Device")
      .def_property_readonly("kind", &Device::kind)
      .def_property_readonly("copies_together",
                             [](const Device& device) { return name_of(device.copies_together()); });

  py::class_<HostDevice, Device, std::shared_ptr<HostDevice>>(module, "HostDevice")
      .def(py::init([](std::shared_ptr<ManualClock> clock, double to_host_rate, double to_device_rate) {
             return make_joining<HostDevice>(HostDeviceOptions{.clock = std::move(clock),
                                                               .to_host_bytes_per_s = to_host_rate,
                                                               .to_device_bytes_per_s = to_device_rate});
           }),
           py::kw_only(), py::arg("clock") = py::none(), py::arg("to_host_bytes_per_s") = 0.0,
           py::arg("to_device_bytes_per_s") = 0.0)
      .def(
          "hold", [](HostDevice& self, const std::string& lane) { self.hold(direction_of(lane)); },
          py::arg("lane"))
      .def(
          "release", [](HostDevice& self, const std::string& lane) { self.release(direction_of(lane)); },
          py::arg("lane"))
      .def(
          "limit",
          [](HostDevice& self, const std::string& lane, double bytes_per_s) {
            self.limit(direction_of(lane), bytes_per_s);
          },
          py::arg("lane"), py::arg("bytes_per_s"))
      .def(
          "fail_copy",
          [](HostDevice& self, const std::string& lane, size_t nth) {
            self.fail_copy(direction_of(lane), nth);
          },
          py::arg("lane"), py::arg("nth"))
      .def("fail_pin", &HostDevice::fail_pin, py::arg("nth"))
      .def(
          "pending_count",
          [](const HostDevice& self, const std::string& lane) {
            return self.pending_count(direction_of(lane));
          },
          py::arg("lane"))
      .def_property_readonly("pinned_bytes", &HostDevice::pinned_bytes);
}

void bind_transfer_queue(py::module_& module) {
  py::class_<TransferQueue, std::shared_ptr<TransferQueue>>(module, "TransferQueue")
      .def(py::init([](std::shared_ptr<Device> device) {
             GilReleased released;  // makes two streams of the driver
             return make_joining<TransferQueue>(std::move(device));
           }),
           py::arg("device"))
      .def("submit_to_host", &submit<Direction::kToHost>, py::arg("destination"), py::arg("source"),
           py::arg("nbytes"), py::arg("compute_stream") = 0, py::arg("after") = py::none(),
           py::arg("ticket") = py::none(), py::arg("buffer") = py::none())
      .def("submit_to_device", &submit<Direction::kToDevice>, py::arg("destination"), py::arg("source"),
           py::arg("nbytes"), py::arg("compute_stream") = 0, py::arg("after") = py::none(),
           py::arg("ticket") = py::none(), py::arg("buffer") = py::none())
      .def("submit_all_to_host", &submit_all_to_host, py::arg("copies"), py::arg("compute_stream") = 0,
           py::arg("trace_name") = 0)
      .def("submit_batch", &submit_batch, py::arg("lane"), py::arg("copies"), py::arg("compute_stream") = 0)
      .def(
          "wait_on_stream",
          [](TransferQueue& self, uintptr_t compute_stream, const Ticket& ticket) {
            wait_interruptibly([&self, compute_stream, ticket](int64_t slice_ns) {
              return self.wait_on_stream(compute_stream, ticket, slice_ns);
            });
          },
          py::arg("compute_stream"), py::arg("ticket"))
      .def("end", &TransferQueue::end, py::call_guard<GilReleased>())
      .def("stats", [](const TransferQueue& self) {
        const TransferStats stats = self.stats();
        py::dict result;
        result["to_host_bytes"] = stats.to_host_bytes;
        result["to_device_bytes"] = stats.to_device_bytes;
        result["to_host_count"] = stats.to_host_count;
        result["to_device_count"] = stats.to_device_count;
        return result;
      });
}

}  // namespace

void bind_device(py::module_& module) {
  bind_base(module);
  bind_host_device(module);
  bind_transfer_queue(module);
}

}  // namespace offload::bindings
