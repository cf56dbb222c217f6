// Many small copies in one launch: csrc/device/cuda_copy_kernel.h says when, [Note: copies by a kernel].
//
// Includes nothing, and is compiled as update.cu is: prelude.inl stands before it.

namespace {

// csrc/device/cuda_copy_kernel.cpp makes grid and argument by these.
constexpr int kThreads = 256;
constexpr int kBlocksPerSpan = 4;
constexpr int kSpansAtMost = 64;
constexpr int kChunksAtOnce =
    4;  // loads on their way before the first is stored: the link answers in a microsecond

struct Span {
  unsigned char* destination;
  const unsigned char* source;
  long long bytes;
};
struct Spans {
  Span at[kSpansAtMost];
};

// As much as a thread can load at once.
struct alignas(16) Chunk {
  unsigned words[4];
};

__device__ bool is_aligned(const void* address) {
  return reinterpret_cast<unsigned long long>(address) % sizeof(Chunk) == 0;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) copy_spans(Spans spans) {
  const Span span = spans.at[blockIdx.x / kBlocksPerSpan];
  constexpr long long kStride = kBlocksPerSpan * kThreads;
  const long long first = blockIdx.x % kBlocksPerSpan * kThreads + threadIdx.x;
  long long chunks = 0;
  if (is_aligned(span.destination) && is_aligned(span.source)) {
    chunks = span.bytes / static_cast<long long>(sizeof(Chunk));
    const auto* from = reinterpret_cast<const Chunk*>(span.source);
    auto* to = reinterpret_cast<Chunk*>(span.destination);
    for (long long at = first; at < chunks; at += kChunksAtOnce * kStride) {
      Chunk held[kChunksAtOnce];
#pragma unroll
      for (int i = 0; i < kChunksAtOnce; ++i)
        if (at + i * kStride < chunks) held[i] = from[at + i * kStride];
#pragma unroll
      for (int i = 0; i < kChunksAtOnce; ++i)
        if (at + i * kStride < chunks) to[at + i * kStride] = held[i];
    }
  }
  const long long rest = chunks * static_cast<long long>(sizeof(Chunk));
  for (long long at = rest + first; at < span.bytes; at += kStride) span.destination[at] = span.source[at];
}
