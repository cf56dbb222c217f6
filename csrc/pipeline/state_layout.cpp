#include "pipeline/state_layout.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace offload {
namespace {

uint64_t rounded_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

}  // namespace

StateLayout::StateLayout(std::array<size_t, kStateArrayCount> element_bytes, size_t element_count,
                         size_t chunk_elements, size_t block_bytes)
    : element_bytes_(element_bytes),
      element_count_(element_count),
      chunk_elements_(chunk_elements),
      block_bytes_(block_bytes) {
  if (chunk_elements == 0 || block_bytes == 0) {
    throw Error(ErrorKind::kInvalidArgument, "chunk_elements=" + std::to_string(chunk_elements) +
                                                 " and block_bytes=" + std::to_string(block_bytes) +
                                                 " must be above 0");
  }
  if (std::all_of(element_bytes.begin(), element_bytes.end(), [](size_t bytes) { return bytes == 0; })) {
    throw Error(ErrorKind::kInvalidArgument, "element_bytes names no array that is on disk");
  }
}

uint64_t StateLayout::record_bytes(size_t count) const noexcept {
  uint64_t bytes = 0;
  for (size_t element : element_bytes_) bytes += rounded_up(uint64_t{element} * count, kStateAlignment);
  return bytes;
}

size_t StateLayout::chunk_count() const noexcept {
  return element_count_ / chunk_elements_ + (element_count_ % chunk_elements_ != 0 ? 1 : 0);
}

StateChunk StateLayout::chunk(size_t index) const noexcept {
  StateChunk chunk;
  chunk.begin = index * chunk_elements_;
  chunk.count = std::min(chunk_elements_, element_count_ - chunk.begin);
  chunk.offset = index * rounded_up(record_bytes(chunk_elements_), block_bytes_);
  for (size_t array = 0; array < kStateArrayCount; ++array) {
    chunk.array_offsets[array] = chunk.bytes;
    chunk.bytes += rounded_up(uint64_t{element_bytes_[array]} * chunk.count, kStateAlignment);
  }
  return chunk;
}

uint64_t StateLayout::bytes() const noexcept {
  if (element_count_ == 0) return 0;
  const StateChunk last = chunk(chunk_count() - 1);
  return last.offset + last.bytes;
}

uint64_t StateLayout::chunk_bytes() const noexcept {
  return record_bytes(std::min(chunk_elements_, element_count_));
}

}  // namespace offload
