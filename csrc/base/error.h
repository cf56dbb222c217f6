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
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace offload
