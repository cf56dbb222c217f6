// Conversions between fp32 and the 16-bit formats as integer arithmetic on bit patterns.
//
// Where `Words` is a template parameter it is uint32_t, or a vector of it and `Floats` a vector of float:
// the same expressions serve both. Integer arithmetic, because it does not depend on the flush-denormals
// mode. Include inside an anonymous namespace.

// `bits` are those of `value`. A NaN becomes the quiet NaN without payload of its sign.
template <typename Floats, typename Words>
inline Words canonical_bits(Floats value, Words bits) {
  return value != value ? (bits & 0x80000000u) | 0x7fc00000u : bits;
}

// Canonical fp32 bits -> bf16 in the upper half, rounded half up in magnitude. What that leaves out is the
// lower half of the bits, read as a signed number: the remainder of a split master.
template <typename Words>
inline Words rounded_half_up(Words bits) {
  return bits + 0x8000u;
}

// Canonical fp32 bits -> the fp32 bits of the nearest bf16, ties to even, as torch rounds.
template <typename Words>
inline Words round_to_bfloat16(Words bits) {
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

// Canonical fp32 bits -> bf16 in the upper half, rounded up in magnitude where `random`, below 2^16, says so.
template <typename Words>
inline Words rounded_stochastically(Words bits, Words random) {
  return bits + random;
}

// A bijection on words whose every bit depends on every bit of the word: two rounds of multiplication and
// shift, with constants found by search (C. Wellons, "Prospecting for hash functions", 2018).
template <typename Words>
inline Words scrambled(Words word) {
  word = (word ^ (word >> 16)) * 0x7feb352du;
  word = (word ^ (word >> 15)) * 0x846ca68bu;
  return word ^ (word >> 16);
}

// fp16 -> fp32 bits, exact; NaNs are quieted, as the instruction does.
[[maybe_unused]] inline uint32_t float16_to_float32(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  uint32_t magnitude = half & 0x7fffu;
  if (magnitude > 0x7c00u) return sign | 0x7fc00000u | (magnitude << 13);
  if (magnitude == 0x7c00u) return sign | 0x7f800000u;
  if (magnitude >= 0x0400u) return sign | ((magnitude << 13) + 0x38000000u);  // bias 127 - 15, in place
  if (magnitude == 0) return sign;
  const auto shift =
      static_cast<uint32_t>(__builtin_clz(magnitude)) - 8;        // leading bit to the implicit one's place
  return sign | ((magnitude << shift) + ((125u - shift) << 23));  // a unit is 2^-24
}

// fp32 bits -> fp16, to nearest even; NaNs are quieted, as the instruction does.
[[maybe_unused]] inline uint32_t float32_to_float16(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and above
  if (magnitude >= 0x38800000u) {                       // normal: 2^-14 and above; may carry into infinity
    const uint32_t rebiased = magnitude - 0x38000000u;
    return sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13);
  }
  if (magnitude < 0x33000000u) return sign;  // below half of the smallest subnormal
  const uint32_t shift = 126u - (magnitude >> 23);
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t half_unit = 1u << (shift - 1);
  const uint32_t odd = (significand >> shift) & 1u;
  return sign | ((significand + half_unit - 1 + odd) >> shift);
}
