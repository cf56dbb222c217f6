// What the CPU and the operating system let this process execute.
//
// Threads: pure functions; callable from any thread.
#pragma once

namespace offload {

bool cpu_has_crc32c() noexcept;  // the instruction for CRC-32C: SSE4.2, or CRC32 of Armv8
bool cpu_has_avx2() noexcept;    // AVX2 and F16C: what kernels_avx2.cpp is compiled for
bool cpu_has_avx512() noexcept;  // AVX-512 F, BW, VL, DQ and F16C: what kernels_avx512.cpp is compiled for
bool cpu_has_neon() noexcept;    // Advanced SIMD: every aarch64
int cpu_sve_bits() noexcept;     // the width of the calling thread's SVE vectors; 0: no SVE

}  // namespace offload
