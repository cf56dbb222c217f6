// The driver table: how it is loaded, and what its errors say.
#include "device/cuda_driver.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>

#include "check.h"
#include "driver_double/driver_double.h"

namespace offload {
namespace {

// A path that no table was loaded from, to the same library.
std::string fresh_path() {
  static std::string detour = "/";
  detour += "./";
  std::string path = DRIVER_DOUBLE_PATH;
  return path.replace(path.rfind('/'), 1, detour);
}

void entries_are_found_by_every_way() {
  for (const int level : {2, 1, 0}) {
    double_reset();
    double_set_proc_address(level);
    double_set_version(12040);
    const CudaDriver& driver = CudaDriver::load(fresh_path());
    CHECK_EQ(driver.version(), 12040);
    int count = 0;
    driver.check(driver.DeviceGetCount(&count), "cuDeviceGetCount");
    CHECK_EQ(count, 1);
  }
  double_reset();
  double_hide("cuEventRecord");  // the dynamic linker still knows it
  CHECK(CudaDriver::load(fresh_path()).EventRecord != nullptr);
  const std::string path = fresh_path();
  CHECK(&CudaDriver::load(path) == &CudaDriver::load(path));
  CHECK(CudaDriver::load(path).MemDiscardBatchAsync != nullptr);
  double_set_version(12090);  // before that entry came
  const std::string before_13 = fresh_path();
  CHECK(CudaDriver::load(before_13).MemDiscardBatchAsync == nullptr);
  CHECK(CudaDriver::load(before_13).MemcpyBatchAsync != nullptr);
  double_set_version(12070);
  CHECK(CudaDriver::load(fresh_path()).MemcpyBatchAsync == nullptr);
}

void what_is_no_usable_driver_is_refused() {
  double_reset();
  CHECK_THROWS(ErrorKind::kDevice, "--gpus all", CudaDriver::load("/nowhere/libcuda.so.1"));
  CHECK_THROWS(ErrorKind::kDevice, "has no cuInit", CudaDriver::load("libm.so.6"));
  const std::string path = fresh_path();
  double_set_version(11040);
  CHECK_THROWS(ErrorKind::kDevice, "supports CUDA 11.4, offload needs 11.8", CudaDriver::load(path));
  double_set_version(13000);
  double_fail("cuDriverGetVersion", 1, 999, 0);
  CHECK_THROWS(ErrorKind::kDevice, "cuDriverGetVersion failed", CudaDriver::load(path));
  struct Refusal {
    int code;
    const char* part;
  };
  for (const Refusal& refusal :
       {Refusal{3, "'spawn'"}, Refusal{34, "stubs"}, Refusal{46, "compute mode"},
        Refusal{100, "CUDA_VISIBLE_DEVICES"}, Refusal{802, "fabricmanager"}, Refusal{803, "reboot"},
        Refusal{804, "cuda-compat"}, Refusal{999, "dmesg"}}) {
    double_fail("cuInit", 1, refusal.code, 0);
    CHECK_THROWS(ErrorKind::kDevice, refusal.part, CudaDriver::load(path));
  }
  CHECK_EQ(CudaDriver::load(path).version(), 13000);  // a refusal is not remembered
}

void a_forked_child_is_refused() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // for a hang
    CHECK_THROWS(ErrorKind::kState, "the CUDA driver belongs to the parent process",
                 CudaDriver::load(DRIVER_DOUBLE_PATH));
    _exit(test::result());
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

// Where the loader reads a library from a pipe that has a writer, a thread is in load() for as long as we
// like.
void a_child_that_is_forked_during_the_first_use_is_refused() {
  const std::string pipe = "driver_of_" + std::to_string(getpid());
  CHECK_EQ(mkfifo(pipe.c_str(), 0600), 0);
  std::thread loading([&] {
    CHECK_THROWS(ErrorKind::kDevice, "cannot load the CUDA driver", CudaDriver::load("./" + pipe));
  });
  int writer = -1;
  while (writer < 0) writer = open(pipe.c_str(), O_WRONLY | O_NONBLOCK);  // there is a reader
  a_forked_child_is_refused();
  close(writer);
  loading.join();
  unlink(pipe.c_str());
}

void errors_say_what_to_do() {
  double_reset();
  const CudaDriver& driver = CudaDriver::load(fresh_path());
  const auto text = [&](CudaResult code, const std::string& remedy = "") {
    return std::string(driver.error(code, "copying", remedy).what());
  };
  const auto says = [](const std::string& whole, const char* part) {
    return whole.find(part) != std::string::npos;
  };
  CHECK(says(text(2), "copying failed: CUDA_ERROR_OUT_OF_MEMORY ("));
  CHECK(says(text(2), "code 2). Memory of the device"));
  CHECK(says(text(2, "Buy more"), "code 2). Buy more"));
  for (const CudaResult code : {214, 700, 709, 719}) {
    CHECK(says(text(code, "Buy more"), "go on from a checkpoint"));
    CHECK(!says(text(code, "Buy more"), "Buy more"));
  }
  CHECK(says(text(4, "Buy more"), "The process is exiting"));
  CHECK_EQ(text(123456), "copying failed: an unknown error (no text, code 123456)");
  double_fail("cuGetErrorName", 1, 1, 0);
  double_fail("cuGetErrorString", 1, 1, 0);
  CHECK(says(text(700), "copying failed: an unknown error (no text, code 700). The context"));
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  a_child_that_is_forked_during_the_first_use_is_refused();
  entries_are_found_by_every_way();
  a_forked_child_is_refused();
  what_is_no_usable_driver_is_refused();
  errors_say_what_to_do();
  return test::result();
}
