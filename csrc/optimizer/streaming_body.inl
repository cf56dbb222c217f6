// The streaming loop over vectors `Line`, once. Before it is included inside a namespace of its own, the
// includer defines the type Line, the attribute STREAMING_TARGET of every function that touches one, and
//   void store_non_temporal(Line* to, Line value)

// One stride of one array, unrolled: a loop's own instructions would count against the ceiling. `zero` is
// 0, but the compiler does not know: an update stores what it loaded. Returns a mix of what was read.
template <bool kNonTemporal, bool kPrefetch, size_t kElementBytes>
STREAMING_TARGET inline Line stream_stride(char* start, Access access, Line seen, Line zero) {
  constexpr size_t kBytes = kStride * kElementBytes;
  constexpr size_t kLines = kBytes / sizeof(Line);
  if (kPrefetch) {
    for (size_t at = 0; at < kBytes; at += kCacheLineBytes)
      __builtin_prefetch(start + kPrefetchAheadBytes + at);
  }
  Line* const lines = reinterpret_cast<Line*>(start);
  if (access == Access::kRead) {
#pragma GCC unroll 8
    for (size_t i = 0; i < kLines; ++i) seen ^= lines[i];
    return seen;
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kLines; ++i) {
    const Line value = access == Access::kUpdate ? lines[i] ^ zero : zero;
    if (kNonTemporal) {
      store_non_temporal(lines + i, value);
    } else {
      lines[i] = value;
    }
  }
  return seen;
}

template <bool kNonTemporal, bool kPrefetch>
STREAMING_TARGET void stream_block(const StreamedArray* arrays, size_t array_count, size_t from,
                                   size_t count) {
  Line zero = {};
  asm volatile("" : "+m"(zero));
  Line seen = zero;
  for (size_t at = from; at < from + count; at += kStride) {
    for (size_t i = 0; i < array_count; ++i) {
      const StreamedArray& array = arrays[i];
      char* const start = static_cast<char*>(array.address) + at * array.element_bytes;
      switch (array.element_bytes) {
        case 4: seen = stream_stride<kNonTemporal, kPrefetch, 4>(start, array.access, seen, zero); break;
        case 2: seen = stream_stride<kNonTemporal, kPrefetch, 2>(start, array.access, seen, zero); break;
        default: seen = stream_stride<kNonTemporal, kPrefetch, 1>(start, array.access, seen, zero);
      }
    }
  }
  asm volatile("" ::"m"(seen));  // the reads have a use
}

inline StreamBlock* choose_block(StreamingMode mode) {
  if (mode.non_temporal) return mode.prefetch ? stream_block<true, true> : stream_block<true, false>;
  return mode.prefetch ? stream_block<false, true> : stream_block<false, false>;
}
