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

typedef int32_t SignedWords __attribute__((vector_size(sizeof(Words))));
typedef Words UnalignedWords __attribute__((aligned(2), may_alias));

inline Words load_words(const uint16_t* from) { return *reinterpret_cast<const UnalignedWords*>(from); }
inline void store_words(Words words, uint16_t* to) { *reinterpret_cast<UnalignedWords*>(to) = words; }
// The lower half is the upper one, with its sign.
inline Words sign_extended(Words words) {
  return reinterpret_cast<Words>(reinterpret_cast<SignedWords>(words) >> 16);
}

inline Words larger(Words a, Words b) { return a > b ? a : b; }
inline Words smaller(Words a, Words b) { return a < b ? a : b; }

// first, first + 1, ...
inline Words count_from(uint32_t first) {
  Words words;
  for (size_t i = 0; i < kLanes; ++i) words[i] = static_cast<uint32_t>(i);
  return words + first;
}

// The two vectors of kPairLanes elements that lie side by side in memory.
template <typename Vector>
struct Pair {
  Vector left, right;
};

inline Pair<Words> bits_of(Pair<Floats> pair) { return {bits_of(pair.left), bits_of(pair.right)}; }
inline Pair<Floats> floats_of(Pair<Words> pair) { return {floats_of(pair.left), floats_of(pair.right)}; }
inline Pair<Words> canonical_bits(Pair<Floats> pair) {
  return {canonical_bits(pair.left), canonical_bits(pair.right)};
}

// Which elements of a pair its vectors hold, and how narrow arrays come and go in that order. `upper` are
// 16-bit patterns as the upper halves of words: zeros below when loaded, anything when stored; `lower`
// likewise. Bytes are words below 2^8, stored two pairs at a time.
//
// One half, then the other: the order of fp32 arrays.
struct InHalves {
  static ALWAYS_INLINE Pair<Words> count_from(uint32_t first) {
    return {::offload::count_from(first), ::offload::count_from(first + kLanes)};
  }
  static ALWAYS_INLINE Pair<Words> load_upper(const uint16_t* from) {
    return {widen(from) << 16, widen(from + kLanes) << 16};
  }
  static ALWAYS_INLINE Pair<Words> load_signed(const uint16_t* from) {
    const Pair<Words> upper = load_upper(from);
    return {sign_extended(upper.left), sign_extended(upper.right)};
  }
  static ALWAYS_INLINE void store_upper(Pair<Words> words, uint16_t* to) {
    narrow(words.left >> 16, words.right >> 16, to);
  }
  static ALWAYS_INLINE void store_lower(Pair<Words> words, uint16_t* to) {
    narrow(words.left & 0xffffu, words.right & 0xffffu, to);
  }
  static ALWAYS_INLINE Pair<Words> load_bytes(const uint8_t* from) {
    return {widen(from), widen(from + kLanes)};
  }
  static ALWAYS_INLINE void store_bytes(Pair<Words> low, Pair<Words> high, uint8_t* to) {
    narrow(low.left, low.right, to);
    narrow(high.left, high.right, to + kPairLanes);
  }
};

// The even elements, then the odd ones: where no array is wider than 16 bits. A word in memory is an element
// of each vector then, and nothing is moved between lanes.
struct EvenAndOdd {
  static ALWAYS_INLINE Pair<Words> count_from(uint32_t first) {
    const Words even = ::offload::count_from(0) * 2 + first;
    return {even, even + 1};
  }
  static ALWAYS_INLINE Pair<Words> load_upper(const uint16_t* from) {
    const Words words = load_words(from);
    return {words << 16, words & 0xffff0000u};
  }
  static ALWAYS_INLINE Pair<Words> load_signed(const uint16_t* from) {
    const Words words = load_words(from);
    return {sign_extended(words << 16), sign_extended(words)};
  }
  static ALWAYS_INLINE void store_upper(Pair<Words> words, uint16_t* to) {
    store_words((words.left >> 16) | (words.right & 0xffff0000u), to);
  }
  static ALWAYS_INLINE void store_lower(Pair<Words> words, uint16_t* to) {
    store_words((words.left & 0xffffu) | (words.right << 16), to);
  }
  // Through a copy: bytes need not be aligned as halves are.
  static ALWAYS_INLINE Pair<Words> load_bytes(const uint8_t* from) {
    uint16_t halves[kLanes];
    __builtin_memcpy(halves, from, sizeof(halves));
    const Words both = widen(halves);
    return {both & 0xffu, both >> 8};
  }
  static ALWAYS_INLINE void store_bytes(Pair<Words> low, Pair<Words> high, uint8_t* to) {
    uint16_t halves[kPairLanes];
    narrow(low.left | (low.right << 8), high.left | (high.right << 8), halves);
    __builtin_memcpy(to, halves, sizeof(halves));
  }
};

template <bool kNarrow>
struct OrderOf {
  using Type = InHalves;
};
template <>
struct OrderOf<true> {
  using Type = EvenAndOdd;
};
