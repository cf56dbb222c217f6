// How the states of one parameter lie on disk: in chunks of elements, the arrays of a chunk side by side.
//
// Units: bytes, but for counts of elements. Offsets of chunks are from where the parameter's states begin.
// Invariants: a chunk begins at a multiple of the file's blocks and an array at one of kStateAlignment in its
//             chunk, so chunks are read and written alone and vector code finds its arrays as in memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace offload {

constexpr size_t kStateAlignment = 256;

enum class StateArray : uint8_t { kMaster = 0, kExpAvg = 1, kExpAvgSq = 2 };
constexpr size_t kStateArrayCount = 3;

struct StateChunk {
  size_t begin = 0;  // elements
  size_t count = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
  std::array<uint64_t, kStateArrayCount> array_offsets{};  // in the chunk
};

class StateLayout {
 public:
  // element_bytes: by StateArray, 0 for one that is not on disk. Throws kInvalidArgument for none at all, and
  // for chunks or blocks of nothing.
  StateLayout(std::array<size_t, kStateArrayCount> element_bytes, size_t element_count, size_t chunk_elements,
              size_t block_bytes);

  bool has(StateArray array) const noexcept { return element_bytes_[static_cast<size_t>(array)] != 0; }
  size_t element_count() const noexcept { return element_count_; }
  size_t chunk_count() const noexcept;
  StateChunk chunk(size_t index) const noexcept;

  uint64_t bytes() const noexcept;        // on disk
  uint64_t chunk_bytes() const noexcept;  // of the largest chunk

 private:
  uint64_t record_bytes(size_t count) const noexcept;

  std::array<size_t, kStateArrayCount> element_bytes_;
  size_t element_count_;
  size_t chunk_elements_;
  size_t block_bytes_;
};

}  // namespace offload
