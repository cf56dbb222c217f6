// A thread is found by its name as soon as it is started.
#include "base/thread.h"

#include <pthread.h>

#include "check.h"

namespace offload {
namespace {

std::string name_of(std::jthread& thread) {
  char name[16] = "";
  pthread_getname_np(thread.native_handle(), name, sizeof name);
  return name;
}

void a_thread_has_its_name_before_it_has_run() {
  for (int i = 0; i < 500; ++i) {  // most of them have not run when their name is asked for
    std::jthread thread = start_thread("offload-one-with-a-long-name", [](const std::stop_token& stop) {
      while (!stop.stop_requested()) std::this_thread::yield();
    });
    CHECK_EQ(name_of(thread), std::string("offload-one-wit"));
  }
}

}  // namespace
}  // namespace offload

int main() {
  offload::a_thread_has_its_name_before_it_has_run();
  return offload::test::result();
}
