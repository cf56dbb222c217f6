#include "storage/checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define OFFLOAD_CRC32C_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__)
#include <arm_acle.h>
#define OFFLOAD_CRC32C_TARGET __attribute__((target("+crc")))
#endif

#include "base/cpu_features.h"

namespace offload {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // Castagnoli, bits reversed
constexpr size_t kChainCount = 4;
constexpr size_t kWordBytes = sizeof(uint64_t);

// kTables[k][b]: what byte b does to the checksum when k more bytes follow it.
using Tables = std::array<std::array<uint32_t, 256>, kWordBytes>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = value;
  }
  for (size_t k = 1; k < kWordBytes; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t add_word_by_table(uint32_t checksum, uint64_t word) noexcept {
  word ^= checksum;
  uint32_t result = 0;
  for (size_t k = 0; k < kWordBytes; ++k) result ^= kTables[kWordBytes - 1 - k][(word >> (8 * k)) & 0xFF];
  return result;
}

// One body for every way to add a word. A macro, for a function cannot be inlined into one that is compiled
// for more instructions unless it is compiled for them too.
#define OFFLOAD_DEFINE_CHECKSUM(name, target, add_word)                                   \
  target uint32_t name(const void* data, size_t bytes) noexcept {                         \
    const char* const from = static_cast<const char*>(data);                              \
    uint32_t chains[kChainCount] = {~0u, ~0u, ~0u, ~0u};                                  \
    uint64_t words[kChainCount];                                                          \
    size_t done = 0;                                                                      \
    for (; done + sizeof(words) <= bytes; done += sizeof(words)) {                        \
      std::memcpy(words, from + done, sizeof(words));                                     \
      for (size_t i = 0; i < kChainCount; ++i) chains[i] = add_word(chains[i], words[i]); \
    }                                                                                     \
    if (done < bytes) {                                                                   \
      std::memset(words, 0, sizeof(words));                                               \
      std::memcpy(words, from + done, bytes - done);                                      \
      for (size_t i = 0; i < kChainCount; ++i) chains[i] = add_word(chains[i], words[i]); \
    }                                                                                     \
    uint32_t checksum = add_word(~0u, bytes);                                             \
    for (uint32_t chain : chains) checksum = add_word(checksum, chain);                   \
    return checksum;                                                                      \
  }

#if defined(__x86_64__)
#define OFFLOAD_ADD_WORD(checksum, word) static_cast<uint32_t>(_mm_crc32_u64(checksum, word))
OFFLOAD_DEFINE_CHECKSUM(checksum_by_instruction, OFFLOAD_CRC32C_TARGET, OFFLOAD_ADD_WORD)
#elif defined(__aarch64__)
OFFLOAD_DEFINE_CHECKSUM(checksum_by_instruction, OFFLOAD_CRC32C_TARGET, __crc32cd)
#else
OFFLOAD_DEFINE_CHECKSUM(checksum_by_instruction, , add_word_by_table)
#endif

}  // namespace

OFFLOAD_DEFINE_CHECKSUM(block_checksum_by_table, , add_word_by_table)

uint32_t block_checksum(const void* data, size_t bytes) noexcept {
  return cpu_has_crc32c() ? checksum_by_instruction(data, bytes) : block_checksum_by_table(data, bytes);
}

}  // namespace offload
