// The checksum of a block on disk, kept in memory and compared when the block is read back.
//
// Threads: pure functions; callable from any thread.
// Invariants: four CRC-32C chains over interleaved 8-byte words, and the CRC-32C of their results: one chain
//             would wait for its own latency. A changed burst of up to 32 bits in one chain always shows; any
//             other damage is missed once in 2^32. The same value on every CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

uint32_t block_checksum(const void* data, size_t bytes) noexcept;

// The same by tables: for CPUs without the instruction, and to compare with.
uint32_t block_checksum_by_table(const void* data, size_t bytes) noexcept;

}  // namespace offload
