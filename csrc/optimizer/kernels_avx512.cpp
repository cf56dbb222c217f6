#if !defined(__clang__)
// gcc 12's own intrinsics start from an undefined vector and warn about it (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "optimizer/update_kernels.h"

namespace offload {
namespace {

#include "optimizer/float_formats.inl"

constexpr size_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline __m256i load_16bit(const uint16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline void store_16bit(__m256i value, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}

inline Floats square_root(Floats value) { return _mm512_sqrt_ps(value); }

inline Words widen(const uint16_t* from) {
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(load_16bit(from)));
}

inline Words widen(const uint8_t* from) {
  return reinterpret_cast<Words>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline void narrow(Words low, Words high, uint16_t* to) {
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30,
                                        28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  _mm512_storeu_si512(
      to, _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(low), even, reinterpret_cast<__m512i>(high)));
}

inline void narrow(Words low, Words high, uint8_t* to) {
  const __m128i low_bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(low));
  const __m128i high_bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_bytes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kLanes), high_bytes);
}

inline __m256i to_float16(Floats value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
inline Floats load_float16(const uint16_t* from) { return _mm512_cvtph_ps(load_16bit(from)); }
inline Floats round_to_float16(Floats value) { return _mm512_cvtph_ps(to_float16(value)); }
inline void store_float16(Floats low, Floats high, uint16_t* to) {
  store_16bit(to_float16(low), to);
  store_16bit(to_float16(high), to + kLanes);
}

#include "optimizer/lanes.inl"
#include "optimizer/moment_formats.inl"
#include "optimizer/update_body.inl"
#include "optimizer/update_rules.inl"

}  // namespace

const UpdateKernels kernels_avx512 = {update<AdamW>, update<Lion>, update<Adagrad>};

}  // namespace offload
