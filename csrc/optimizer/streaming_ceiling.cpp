#include "optimizer/streaming_ceiling.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/worker_pool.h"

namespace offload {
namespace {

constexpr size_t kBlockElements = size_t{32} << 10;  // as update_states_parallel
constexpr size_t kStride = 64;                       // elements of one array before the next array's turn
constexpr size_t kPrefetchAheadBytes = 1536;
constexpr size_t kCacheLineBytes = 64;

using StreamBlock = void(const StreamedArray* arrays, size_t array_count, size_t from, size_t count);

namespace baseline {

typedef long long Line __attribute__((vector_size(16), may_alias));
#define STREAMING_TARGET

inline void store_non_temporal(Line* to, Line value) {
#if defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), value);
#else
  *to = value;
#endif
}

#include "optimizer/streaming_body.inl"

#undef STREAMING_TARGET

}  // namespace baseline

#if defined(__x86_64__)
// Narrow stores cannot fill the memory bus of every CPU: where there are wide ones, the ceiling is theirs.
namespace wide {

typedef long long Line __attribute__((vector_size(64), may_alias));
#define STREAMING_TARGET __attribute__((target("avx512f")))

STREAMING_TARGET inline void store_non_temporal(Line* to, Line value) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value);
}

#include "optimizer/streaming_body.inl"

#undef STREAMING_TARGET

}  // namespace wide
#endif

StreamBlock* block_for(StreamingMode mode) {
#if defined(__x86_64__)
  if (cpu_has_avx512()) return wide::choose_block(mode);
#endif
  return baseline::choose_block(mode);
}

}  // namespace

void streaming_pass(WorkerPool& pool, const std::vector<StreamedArray>& arrays, size_t count,
                    StreamingMode mode) {
  for (const StreamedArray& array : arrays) {
    const bool known_size = array.element_bytes == 1 || array.element_bytes == 2 || array.element_bytes == 4;
    const bool aligned = reinterpret_cast<uintptr_t>(array.address) % kCacheLineBytes == 0;
    if (array.address == nullptr || !known_size || !aligned || count % kStride != 0) {
      throw Error(ErrorKind::kInvalidArgument,
                  "streaming_pass: elements have 1, 2 or 4 bytes, addresses are multiples of 64 and not 0, "
                  "and count is a multiple of 64");
    }
  }
  StreamBlock* const stream = block_for(mode);
  pool.parallel_for((count + kBlockElements - 1) / kBlockElements, [&](size_t block) {
    const size_t at = block * kBlockElements;
    stream(arrays.data(), arrays.size(), at, std::min(kBlockElements, count - at));
#if defined(__x86_64__)
    if (mode.non_temporal) _mm_sfence();  // the stores belong to this pass, not to what is timed after it
#endif
  });
}

}  // namespace offload
