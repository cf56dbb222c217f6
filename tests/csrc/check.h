// The checks of the C++ tests: plain executables without a framework, so that every sanitizer runs them.
//
// A failed check prints its place and what it saw, and the test goes on; main() returns test::result().
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

#include "base/error.h"

namespace offload::test {

inline int failure_count = 0;

inline void report_failure(const char* file, int line, const std::string& text) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, text.c_str());
  ++failure_count;
}

template <typename Left, typename Right>
void check_equal(const Left& left, const Right& right, const char* text, const char* file, int line) {
  if (left == right) return;
  std::ostringstream seen;
  seen << text << ", saw " << left << " and " << right;
  report_failure(file, line, seen.str());
}

// Runs `body`, which must throw an Error of `kind` whose message contains `part`.
template <typename Body>
void check_throws(ErrorKind kind, const std::string& part, Body body, const char* file, int line) {
  try {
    body();
  } catch (const Error& error) {
    if (error.kind() != kind) {
      report_failure(file, line, std::string("an error of another kind: ") + error.what());
    } else if (std::string(error.what()).find(part) == std::string::npos) {
      report_failure(file, line, "the message lacks \"" + part + "\": " + error.what());
    }
    return;
  }
  report_failure(file, line, "nothing was thrown");
}

inline int result() { return failure_count == 0 ? 0 : 1; }

}  // namespace offload::test

#define CHECK(condition) \
  ((condition) ? void() : ::offload::test::report_failure(__FILE__, __LINE__, #condition))
#define CHECK_EQ(left, right) \
  ::offload::test::check_equal((left), (right), #left " == " #right, __FILE__, __LINE__)
#define CHECK_THROWS(kind, part, ...) \
  ::offload::test::check_throws((kind), (part), [&] { __VA_ARGS__; }, __FILE__, __LINE__)
