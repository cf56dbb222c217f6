// The message of a failed operation on a file: what was done to which file, why it failed, what to do.
//
// Threads: pure functions; callable from any thread.
// Units: `code` is an errno, positive.
#pragma once

#include <string>

#include "base/error.h"

namespace offload {

// "ENOSPC" and the like; the number for codes without a name here.
std::string error_name(int code);

// "<doing> failed: <the system's text> (<name>). <what to do>", with kind kStorage and the code.
Error storage_error(int code, const std::string& doing);

}  // namespace offload
