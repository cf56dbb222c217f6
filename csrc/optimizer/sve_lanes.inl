// The lanes of SVE at the one width that the file is compiled for (-msve-vector-bits): what lanes.inl asks of
// an instruction set. Include after <arm_sve.h> and float_formats.inl.

constexpr size_t kLanes = __ARM_FEATURE_SVE_BITS / 32;
typedef svfloat32_t Floats __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef svuint32_t Words __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));

inline Floats square_root(Floats value) { return svsqrt_f32_x(svptrue_b32(), value); }

inline Words widen(const uint16_t* from) { return svld1uh_u32(svptrue_b32(), from); }
inline Words widen(const uint8_t* from) { return svld1ub_u32(svptrue_b32(), from); }

inline void narrow(Words low, Words high, uint16_t* to) {
  svst1h_u32(svptrue_b32(), to, low);
  svst1h_u32(svptrue_b32(), to + kLanes, high);
}
inline void narrow(Words low, Words high, uint8_t* to) {
  svst1b_u32(svptrue_b32(), to, low);
  svst1b_u32(svptrue_b32(), to + kLanes, high);
}

// fp16 lies in the low half of each word, where the conversions take and leave it.
inline Words to_float16(Floats value) { return svreinterpret_u32_f16(svcvt_f16_f32_x(svptrue_b32(), value)); }
inline Floats from_float16(Words halves) {
  return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_u32(halves));
}
inline Floats load_float16(const uint16_t* from) { return from_float16(widen(from)); }
inline Floats round_to_float16(Floats value) { return from_float16(to_float16(value)); }
inline void store_float16(Floats low, Floats high, uint16_t* to) {
  narrow(to_float16(low), to_float16(high), to);
}
