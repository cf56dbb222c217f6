#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "storage/block_file.h"
#include "storage/failing_system_calls.h"
#include "storage/uring.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

DiskBackend backend_of(const std::string& name) {
  for (DiskBackend backend : {DiskBackend::kAuto, DiskBackend::kUring, DiskBackend::kThreads}) {
    if (name == disk_backend_name(backend)) return backend;
  }
  throw Error(ErrorKind::kInvalidArgument,
              "there is no backend '" + name + "'; the backends are 'auto', 'io_uring' and 'threads'");
}

SystemCall call_of(const std::string& name) {
  std::string legal;
  for (size_t index = 0; index < kSystemCallCount; ++index) {
    const char* const known = system_call_name(static_cast<SystemCall>(index));
    if (name == known) return static_cast<SystemCall>(index);
    legal += std::string(legal.empty() ? "" : ", ") + known;
  }
  throw Error(ErrorKind::kInvalidArgument, "there is no call '" + name + "'; the calls are " + legal);
}

py::dict facts_dict(const DiskPathFacts& facts) {
  py::dict result;
  result["directory"] = facts.directory;
  result["file_system"] = facts.file_system;
  result["backend"] = disk_backend_name(facts.backend);
  result["uring_refusal"] = facts.uring_refusal;
  result["direct"] = facts.direct;
  result["direct_refusal"] = facts.direct_refusal;
  result["reserved"] = facts.reserved;
  result["reservation_refusal"] = facts.reservation_refusal;
  result["allocated_bytes"] = facts.allocated_bytes;
  result["read_bytes"] = facts.stats.read_bytes;
  result["written_bytes"] = facts.stats.written_bytes;
  result["failed_count"] = facts.stats.failed_count;
  return result;
}

void bind_failing_system_calls(py::module_& module) {
  py::class_<FailingSystemCalls, std::shared_ptr<FailingSystemCalls>>(module, "FailingSystemCalls")
      .def(py::init<>())
      .def(
          "fail",
          [](FailingSystemCalls& self, const std::string& call, size_t nth, int code, size_t count) {
            self.fail(call_of(call), nth, code, count);
          },
          py::arg("call"), py::arg("nth"), py::arg("code"), py::arg("count") = 1)
      .def(
          "shorten",
          [](FailingSystemCalls& self, const std::string& call, size_t nth, size_t nbytes) {
            self.shorten(call_of(call), nth, nbytes);
          },
          py::arg("call"), py::arg("nth"), py::arg("nbytes"))
      .def("hold_transfers", &FailingSystemCalls::hold_transfers)
      .def("release_transfers", &FailingSystemCalls::release_transfers)
      .def("held_transfers",
           [](const FailingSystemCalls& self) {
             std::vector<std::tuple<bool, off_t, size_t>> found;
             for (const auto& held : self.held_transfers()) {
               found.emplace_back(held.is_write, held.offset, held.bytes);
             }
             return found;
           })
      .def("let_go", &FailingSystemCalls::let_go, py::arg("is_write"), py::arg("offset"))
      .def("pretend_clones", &FailingSystemCalls::pretend_clones)
      .def("pretend_file_system", &FailingSystemCalls::pretend_file_system, py::arg("type"))
      .def(
          "call_count",
          [](const FailingSystemCalls& self, const std::string& call) {
            return self.call_count(call_of(call));
          },
          py::arg("call"));
}

}  // namespace

void bind_storage(py::module_& module) {
  module.attr("DISK_ALIGNMENT") = kDiskAlignment;
  module.def(
      "uring_refusal",
      [](std::shared_ptr<FailingSystemCalls> calls) {
        return calls ? uring_refusal(std::move(calls)) : uring_refusal(SystemCalls::kernel());
      },
      py::arg("calls") = py::none(), py::call_guard<GilReleased>());
  bind_failing_system_calls(module);

  const BlockFileOptions defaults;
  py::class_<BlockFile, std::shared_ptr<BlockFile>>(module, "BlockFile")
      .def(py::init([](std::vector<std::string> directories, size_t block_bytes, size_t queue_depth,
                       size_t thread_count, const std::string& backend, bool direct,
                       std::shared_ptr<FailingSystemCalls> calls) {
             BlockFileOptions options{.directories = std::move(directories),
                                      .block_bytes = block_bytes,
                                      .queue_depth = queue_depth,
                                      .thread_count = thread_count,
                                      .backend = backend_of(backend),
                                      .direct = direct,
                                      .calls = SystemCalls::kernel()};
             if (calls) options.calls = std::move(calls);
             GilReleased released;
             return make_joining<BlockFile>(std::move(options));
           }),
           py::arg("directories"), py::kw_only(), py::arg("block_bytes") = defaults.block_bytes,
           py::arg("queue_depth") = defaults.queue_depth, py::arg("thread_count") = defaults.thread_count,
           py::arg("backend") = "auto", py::arg("direct") = true, py::arg("calls") = py::none())
      .def("allocate", &BlockFile::allocate, py::arg("nbytes"), py::call_guard<GilReleased>())
      .def("clone",
           [](BlockFile& self) {
             GilReleased released;
             return std::shared_ptr<BlockFile>(self.clone().release(), &delete_without_gil<BlockFile>);
           })
      .def(
          "submit_read",
          [](BlockFile& self, uint64_t offset, uintptr_t destination, uint64_t nbytes) {
            return self.submit_read(offset, reinterpret_cast<void*>(destination), nbytes);
          },
          py::arg("offset"), py::arg("destination"), py::arg("nbytes"), py::call_guard<GilReleased>())
      .def(
          "submit_write",
          [](BlockFile& self, uint64_t offset, uintptr_t source, uint64_t nbytes) {
            return self.submit_write(offset, reinterpret_cast<const void*>(source), nbytes);
          },
          py::arg("offset"), py::arg("source"), py::arg("nbytes"), py::call_guard<GilReleased>())
      .def(
          "submit_read_after",
          [](BlockFile& self, const std::vector<Ticket>& after, uint64_t offset, uintptr_t destination,
             uint64_t nbytes) {
            return self.submit_read_after(after, offset, reinterpret_cast<void*>(destination), nbytes);
          },
          py::arg("after"), py::arg("offset"), py::arg("destination"), py::arg("nbytes"),
          py::call_guard<GilReleased>())
      .def(
          "submit_write_after",
          [](BlockFile& self, const Ticket& after, uint64_t offset, uintptr_t source, uint64_t nbytes) {
            const Ticket waited_for = after;  // TransferQueue::submit may change what Python's object holds
            GilReleased released;
            return self.submit_write_after(waited_for, offset, reinterpret_cast<const void*>(source), nbytes);
          },
          py::arg("after"), py::arg("offset"), py::arg("source"), py::arg("nbytes"))
      .def_property_readonly("block_bytes", &BlockFile::block_bytes)
      .def("facts", [](const BlockFile& self) {
        std::vector<DiskPathFacts> all;
        {
          GilReleased released;
          all = self.facts();
        }
        py::list result;
        for (const DiskPathFacts& facts : all) result.append(facts_dict(facts));
        return result;
      });
}

}  // namespace offload::bindings
