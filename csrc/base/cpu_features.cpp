#include "base/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif

namespace offload {

#if defined(__x86_64__)

namespace {

// F16C is read here because not every supported compiler's __builtin_cpu_supports knows it. The
// builtin's own AVX tests include what the operating system saves, which F16C shares.
bool detect_avx2() noexcept {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return has_f16c && __builtin_cpu_supports("avx2");
}

bool detect_avx512() noexcept {
  return detect_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

// Asked once: in a virtual machine each `cpuid` is a trap of several microseconds.
bool cpu_has_avx2() noexcept {
  static const bool has_avx2 = detect_avx2();
  return has_avx2;
}

bool cpu_has_avx512() noexcept {
  static const bool has_avx512 = detect_avx512();
  return has_avx512;
}

bool cpu_has_crc32c() noexcept {
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2");
  return has_sse42;
}

bool cpu_has_neon() noexcept { return false; }
int cpu_sve_bits() noexcept { return 0; }

#else

#if defined(__aarch64__)
bool cpu_has_crc32c() noexcept { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
bool cpu_has_neon() noexcept { return true; }

int cpu_sve_bits() noexcept {
  if ((getauxval(AT_HWCAP) & HWCAP_SVE) == 0) return 0;
  const int state = prctl(PR_SVE_GET_VL);
  return state < 0 ? 0 : (state & PR_SVE_VL_LEN_MASK) * 8;
}
#else
bool cpu_has_crc32c() noexcept { return false; }
bool cpu_has_neon() noexcept { return false; }
int cpu_sve_bits() noexcept { return 0; }
#endif

bool cpu_has_avx2() noexcept { return false; }
bool cpu_has_avx512() noexcept { return false; }

#endif

}  // namespace offload
