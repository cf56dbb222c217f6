#include "base/error.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

const char* python_class(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument: return "InvalidArgument";
    case ErrorKind::kOutOfHostMemory: return "OutOfHostMemory";
    case ErrorKind::kDevice: return "DeviceError";
    case ErrorKind::kStorage: return "StorageError";
    case ErrorKind::kState: return "StateError";
    case ErrorKind::kInternal: break;
  }
  return "InternalError";
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      // Imported here and not at load: offload._errors is plain Python and may import this module.
      py::object errors = py::module_::import("offload._errors");
      const py::object error_class = errors.attr(python_class(error.kind()));
      if (error.kind() == ErrorKind::kStorage && error.system_code() != 0) {
        // The two arguments of an OSError: errno is then set.
        PyErr_SetObject(error_class.ptr(), py::make_tuple(error.system_code(), error.what()).ptr());
      } else {
        PyErr_SetString(error_class.ptr(), error.what());
      }
    }
  });
}

}  // namespace offload::bindings
