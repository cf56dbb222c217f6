// What the vectors of every instruction set do alike.
//
// Before it is included inside an anonymous namespace, the ISA's file includes float_formats.inl and defines
//   kLanes, and Floats and Words: vectors of kLanes float and uint32_t
//   Floats square_root(Floats)                               IEEE
//   Words  widen(const uint16_t*), widen(const uint8_t*)     kLanes patterns, zero-extended
//   void   narrow(Words low, Words high, uint16_t*)          the other way, 2 * kLanes words below 2^16
//   void   narrow(Words low, Words high, uint8_t*)           likewise, words below 2^8
//   Floats load_float16(const uint16_t*)
//   Floats round_to_float16(Floats)                          to nearest even, and back
//   void   store_float16(Floats low, Floats high, uint16_t*) to nearest even

// For what runs once a vector: gcc's budget of inlining for one file does not reach for three optimizers. And
// nothing throws: else a local variable in a loop would refer to the weak personality.
#define ALWAYS_INLINE __attribute__((always_inline, nothrow)) inline

constexpr size_t kPairLanes = 2 * kLanes;  // narrow arrays are stored a full pair of vectors at a time

typedef Floats UnalignedFloats __attribute__((aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
inline void store(Floats value, float* to) { *reinterpret_cast<UnalignedFloats*>(to) = value; }
inline Words bits_of(Floats value) { return reinterpret_cast<Words>(value); }
inline Words canonical_bits(Floats value) { return canonical_bits(value, bits_of(value)); }
inline Floats floats_of(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Floats broadcast(float value) { return Floats{} + value; }
inline Words broadcast(uint32_t value) { return Words{} + value; }

inline Words larger(Words a, Words b) { return a > b ? a : b; }
inline Words smaller(Words a, Words b) { return a < b ? a : b; }

// first, first + 1, ...
inline Words count_from(uint32_t first) {
  Words words;
  for (size_t i = 0; i < kLanes; ++i) words[i] = static_cast<uint32_t>(i);
  return words + first;
}
