#include <immintrin.h>

#include "optimizer/update_kernels.h"

namespace offload {
namespace {

#include "optimizer/float_formats.inl"

constexpr size_t kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

inline __m128i load_16bit(const uint16_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
inline void store_16bit(__m128i value, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
}

inline Floats square_root(Floats value) { return _mm256_sqrt_ps(value); }

inline Words widen(const uint16_t* from) {
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(load_16bit(from)));
}

inline Words widen(const uint8_t* from) {
  return reinterpret_cast<Words>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline __m256i packed_to_16bit(Words low, Words high) {
  // The pack works in each 128-bit lane: its four quarters come out as low, high, low, high.
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high));
  return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
}

inline void narrow(Words low, Words high, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed_to_16bit(low, high));
}

inline void narrow(Words low, Words high, uint8_t* to) {
  const __m256i words = packed_to_16bit(low, high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

inline __m128i to_float16(Floats value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
inline Floats load_float16(const uint16_t* from) { return _mm256_cvtph_ps(load_16bit(from)); }
inline Floats round_to_float16(Floats value) { return _mm256_cvtph_ps(to_float16(value)); }
inline void store_float16(Floats low, Floats high, uint16_t* to) {
  store_16bit(to_float16(low), to);
  store_16bit(to_float16(high), to + kLanes);
}

#include "optimizer/lanes.inl"
#include "optimizer/moment_formats.inl"
#include "optimizer/update_body.inl"
#include "optimizer/update_rules.inl"

}  // namespace

const UpdateKernels kernels_avx2 = {update<AdamW>, update<Lion>, update<Adagrad>};

}  // namespace offload
