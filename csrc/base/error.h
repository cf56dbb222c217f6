// The one error type that crosses from C++ to Python.
//
// Ownership: a value; owns its message.
// Threads: immutable, so any thread may hold or rethrow it.
// Invariants: bindings/bind_errors.cpp maps each ErrorKind to the class of the same name in offload._errors.
#pragma once

#include <stdexcept>
#include <string>

namespace offload {

enum class ErrorKind { kInvalidArgument, kOutOfHostMemory, kDevice, kStorage, kState, kInternal };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message, int system_code = 0)
      : std::runtime_error(message), kind_(kind), system_code_(system_code) {}
  ErrorKind kind() const noexcept { return kind_; }

  // The errno behind it (Python's OSError.errno); 0 when the system did not refuse anything.
  int system_code() const noexcept { return system_code_; }

 private:
  ErrorKind kind_;
  int system_code_;
};

}  // namespace offload
