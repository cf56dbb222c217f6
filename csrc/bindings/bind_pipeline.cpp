#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "pipeline/step_pipeline.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

// Jobs are read field by field: generic conversion of nested tuples would cost more than the submission.
[[noreturn]] void refuse(size_t job, const std::string& what) {
  throw Error(ErrorKind::kInvalidArgument, "job " + std::to_string(job) + ": " + what);
}

template <typename T>
T read_integer(PyObject* value) {
  const long long integer = PyLong_AsLongLong(value);
  if (integer == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return static_cast<T>(integer);
}

// An enumerator, which must be one of 0 .. last.
template <typename Enum>
Enum read_code(PyObject* value, Enum last, size_t job, const char* name) {
  const auto code = read_integer<long long>(value);
  if (code < 0 || code > static_cast<long long>(last)) {
    refuse(job, std::string(name) + " is " + std::to_string(code) + "; it must be 0 to " +
                    std::to_string(static_cast<int>(last)));
  }
  return static_cast<Enum>(code);
}

template <typename T>
const T& read_object(PyObject* value, size_t job, const char* name) {
  py::detail::make_caster<T> caster;
  if (value == Py_None || !caster.load(value, false)) {
    refuse(job, std::string("a ") + name + " is needed, got " + Py_TYPE(value)->tp_name);
  }
  return py::detail::cast_op<const T&>(caster);  // lives in the Python object
}

// Adds the scalars to `found` when `value` is of their class.
template <typename Scalars>
bool read_scalars_of(PyObject* value, std::optional<UpdateScalars>& found) {
  py::detail::make_caster<Scalars> caster;
  if (value == Py_None || !caster.load(value, false)) return false;
  found = py::detail::cast_op<const Scalars&>(caster);
  return true;
}

UpdateScalars read_scalars(PyObject* value, size_t job) {
  std::optional<UpdateScalars> found;
  if (read_scalars_of<AdamWScalars>(value, found) || read_scalars_of<LionScalars>(value, found) ||
      read_scalars_of<AdagradScalars>(value, found)) {
    return *found;
  }
  refuse(job, std::string("AdamWScalars, LionScalars or AdagradScalars are needed, got ") +
                  Py_TYPE(value)->tp_name);
}

py::object read_sequence(PyObject* value) {
  auto items = py::reinterpret_steal<py::object>(PySequence_Fast(value, "a sequence is needed"));
  if (!items) throw py::error_already_set();
  return items;
}

PendingFactor read_factor(PyObject* value, size_t job) {
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 3) {
    refuse(job, "a factor is a tuple (kind, address, value)");
  }
  PendingFactor factor;
  factor.kind = read_code(PyTuple_GET_ITEM(value, 0), FactorKind::kMultiplyWide, job, "a factor's kind");
  factor.address = reinterpret_cast<const float*>(read_integer<uintptr_t>(PyTuple_GET_ITEM(value, 1)));
  const double number = PyFloat_AsDouble(PyTuple_GET_ITEM(value, 2));
  if (number == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  factor.value = static_cast<float>(number);
  return factor;
}

std::vector<Ticket> read_tickets(PyObject* value) {
  if (!PyTuple_Check(value) && !PyList_Check(value)) {
    throw Error(ErrorKind::kInvalidArgument,
                std::string("tickets are a list or tuple of Ticket, got ") + Py_TYPE(value)->tp_name);
  }
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
  std::vector<Ticket> tickets;
  tickets.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    tickets.push_back(
        read_object<Ticket>(PySequence_Fast_GET_ITEM(value, i), static_cast<size_t>(i), "Ticket"));
  }
  return tickets;
}

StepJob read_job(PyObject* value, size_t index, bool flush_denormals) {
  const Py_ssize_t size = PyTuple_Check(value) ? PyTuple_GET_SIZE(value) : 0;
  if (size != 6 && size != 7) {
    refuse(index, "a job is a tuple (slot, gradient, gradient_format, tickets, scalars, factors[, weight])");
  }
  StepJob job{.slot = read_integer<int64_t>(PyTuple_GET_ITEM(value, 0)),
              .gradient = reinterpret_cast<const void*>(read_integer<uintptr_t>(PyTuple_GET_ITEM(value, 1))),
              .gradient_format =
                  read_code(PyTuple_GET_ITEM(value, 2), FloatFormat::kFloat16, index, "gradient_format"),
              .tickets = read_tickets(PyTuple_GET_ITEM(value, 3)),
              .scalars = read_scalars(PyTuple_GET_ITEM(value, 4), index),
              .factors = {},
              .flush_denormals = flush_denormals};
  const py::object factors = read_sequence(PyTuple_GET_ITEM(value, 5));
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(factors.ptr());
  job.factors.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    job.factors.push_back(read_factor(PySequence_Fast_GET_ITEM(factors.ptr(), i), index));
  }
  if (size == 7) job.weight = reinterpret_cast<void*>(read_integer<uintptr_t>(PyTuple_GET_ITEM(value, 6)));
  return job;
}

py::list submit(StepPipeline& self, const py::object& sequence, uintptr_t compute_stream, bool backwards) {
  const bool flush_denormals = flush_denormals_enabled();  // as the calling thread computes, so does the step
  const py::object items = read_sequence(sequence.ptr());
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
  std::vector<StepJob> jobs;
  jobs.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    jobs.push_back(
        read_job(PySequence_Fast_GET_ITEM(items.ptr(), i), static_cast<size_t>(i), flush_denormals));
  }
  std::vector<Ticket> tickets;
  {
    GilReleased released;
    tickets = self.submit(std::move(jobs), compute_stream, backwards);
  }
  py::list result(tickets.size());
  for (size_t i = 0; i < tickets.size(); ++i) {
    PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i),
                    py::cast(std::move(tickets[i])).release().ptr());
  }
  return result;
}

Ticket speculate(StepPipeline& self, const py::tuple& job, uintptr_t backup) {
  StepJob read = read_job(job.ptr(), 0, flush_denormals_enabled());
  GilReleased released;
  return self.speculate(std::move(read), reinterpret_cast<void*>(backup));
}

int64_t add_slot(StepPipeline& self, std::string name, uintptr_t master, int master_format, uintptr_t weight,
                 int weight_format, uintptr_t exp_avg, uintptr_t exp_avg_sq, size_t count,
                 uintptr_t upload_source, uintptr_t device_weight, size_t weight_bytes, int moment_format,
                 uintptr_t exp_avg_scales, uintptr_t exp_avg_sq_scales, uint32_t rounding_seed,
                 const StateLayout* layout, uint64_t disk_offset, uint32_t trace_name) {
  if (moment_format < 0 || moment_format > static_cast<int>(MomentFormat::kInt8)) {
    throw Error(
        ErrorKind::kInvalidArgument,
        "slot '" + name + "': moment_format must be a MOMENTS_ code, got " + std::to_string(moment_format));
  }
  if (master_format < 0 || master_format > static_cast<int>(MasterFormat::kBFloat16) || weight_format < 0 ||
      weight_format > static_cast<int>(FloatFormat::kFloat16)) {
    throw Error(ErrorKind::kInvalidArgument,
                "slot '" + name +
                    "': master_format must be a MASTER_ code and weight_format a float format, got " +
                    std::to_string(master_format) + " and " + std::to_string(weight_format));
  }
  return self.add_slot(
      {.name = std::move(name),
       .span = {.gradient = nullptr,
                .master = reinterpret_cast<void*>(master),
                .weight = reinterpret_cast<void*>(weight),
                .exp_avg = reinterpret_cast<void*>(exp_avg),
                .exp_avg_sq = reinterpret_cast<void*>(exp_avg_sq),
                .count = count,
                .gradient_format = FloatFormat::kFloat32,
                .weight_format = static_cast<FloatFormat>(weight_format),
                .master_format = static_cast<MasterFormat>(master_format),
                .moment_format = static_cast<MomentFormat>(moment_format),
                .exp_avg_scales = reinterpret_cast<float*>(exp_avg_scales),
                .exp_avg_sq_scales = reinterpret_cast<float*>(exp_avg_sq_scales),
                .rounding_seed = rounding_seed},
       .upload_source = reinterpret_cast<const void*>(upload_source),
       .device_weight = reinterpret_cast<void*>(device_weight),
       .weight_bytes = weight_bytes,
       .on_disk = layout == nullptr ? std::nullopt : std::optional(StatesOnDisk{*layout, disk_offset}),
       .trace_name = trace_name});
}

void bind_state_layout(py::module_& module) {
  py::class_<StateLayout>(module, "StateLayout")
      .def(py::init([](size_t master, size_t exp_avg, size_t exp_avg_sq, size_t element_count,
                       size_t chunk_elements, size_t block_bytes) {
             return StateLayout({master, exp_avg, exp_avg_sq}, element_count, chunk_elements, block_bytes);
           }),
           py::kw_only(), py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
           py::arg("element_count"), py::arg("chunk_elements"), py::arg("block_bytes"))
      .def_property_readonly("nbytes", &StateLayout::bytes)
      .def("chunks", [](const StateLayout& self) {
        py::list result;
        for (size_t index = 0; index < self.chunk_count(); ++index) {
          const StateChunk chunk = self.chunk(index);
          result.append(py::make_tuple(
              chunk.begin, chunk.count, chunk.offset, chunk.bytes,
              py::make_tuple(chunk.array_offsets[0], chunk.array_offsets[1], chunk.array_offsets[2])));
        }
        return result;
      });

  py::class_<StateWindow, std::shared_ptr<StateWindow>>(module, "StateWindow")
      .def(py::init(
               [](std::shared_ptr<BlockFile> file, HostPool& pool, size_t frame_bytes, size_t frame_count) {
                 GilReleased released;
                 return make_joining<StateWindow>(std::move(file), pool, frame_bytes, frame_count);
               }),
           py::arg("file"), py::arg("pool"), py::kw_only(), py::arg("frame_bytes"), py::arg("frame_count"));
}

}  // namespace

void bind_pipeline(py::module_& module) {
  bind_state_layout(module);
  py::class_<StepPipeline, std::shared_ptr<StepPipeline>>(module, "StepPipeline")
      .def(py::init([](std::shared_ptr<TransferQueue> transfers, size_t chunk_elements,
                       std::shared_ptr<StateWindow> window, bool run_ahead) {
             GilReleased released;  // may register memory
             return make_joining<StepPipeline>(std::move(transfers), chunk_elements, std::move(window),
                                               run_ahead);
           }),
           py::arg("transfers"), py::kw_only(), py::arg("chunk_elements") = kDefaultChunkElements,
           py::arg("window") = py::none(), py::arg("run_ahead") = false)
      .def_property_readonly("run_ahead_refusal", &StepPipeline::run_ahead_refusal)
      .def("add_slot", &add_slot, py::kw_only(), py::arg("name"), py::arg("master"), py::arg("master_format"),
           py::arg("weight"), py::arg("weight_format"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
           py::arg("count"), py::arg("upload_source"), py::arg("device_weight"), py::arg("weight_bytes"),
           py::arg("moment_format") = 0, py::arg("exp_avg_scales") = 0, py::arg("exp_avg_sq_scales") = 0,
           py::arg("rounding_seed") = 0, py::arg("layout") = static_cast<const StateLayout*>(nullptr),
           py::arg("disk_offset") = 0, py::arg("trace_name") = 0)
      .def("submit", &submit, py::arg("jobs"), py::arg("compute_stream") = 0, py::arg("backwards") = false)
      .def("backup_bytes", &StepPipeline::backup_bytes, py::arg("slot"))
      .def("speculate", &speculate, py::arg("job"), py::arg("backup"))
      .def("discard", &StepPipeline::discard, py::arg("slots"), py::call_guard<GilReleased>())
      .def("states_written", &StepPipeline::states_written, py::arg("slot"))
      .def(
          "wait",
          [](StepPipeline& self, const py::object& sequence) {
            const std::vector<Ticket> tickets = read_tickets(sequence.ptr());
            wait_interruptibly([&](int64_t slice_ns) { return self.wait(tickets, slice_ns); });
          },
          py::arg("tickets"))
      .def_static("weight", &StepPipeline::weight, py::arg("ticket"))
      .def("stats",
           [](const StepPipeline& self) {
             const StepStats stats = self.stats();
             py::dict result;
             result["job_count"] = stats.job_count;
             result["update_ns"] = stats.update_ns;
             result["blocked_ns"] = stats.blocked_ns;
             result["exposed_ns"] = stats.exposed_ns;
             result["kept_count"] = stats.kept_count;
             result["discarded_count"] = stats.discarded_count;
             result["disk_read_bytes"] = stats.window.read_bytes;
             result["disk_kept_bytes"] = stats.window.kept_bytes;
             result["disk_written_bytes"] = stats.window.written_bytes;
             result["disk_wait_ns"] = stats.window.wait_ns;
             return result;
           })
      .def("hold", &StepPipeline::hold, py::call_guard<GilReleased>())
      .def("release", &StepPipeline::release, py::call_guard<GilReleased>());
}

}  // namespace offload::bindings
