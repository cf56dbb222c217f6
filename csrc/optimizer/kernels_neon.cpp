#include <arm_neon.h>

#include "optimizer/update_kernels.h"

namespace offload {
namespace {

#include "optimizer/float_formats.inl"

constexpr size_t kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

inline Floats square_root(Floats value) { return vsqrtq_f32(value); }

inline Words widen(const uint16_t* from) { return vmovl_u16(vld1_u16(from)); }

inline Words widen(const uint8_t* from) {
  uint32_t bytes;  // the least load of a vector would take twice as many
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
}

inline uint16x8_t packed_to_16bit(Words low, Words high) { return vmovn_high_u32(vmovn_u32(low), high); }

inline void narrow(Words low, Words high, uint16_t* to) { vst1q_u16(to, packed_to_16bit(low, high)); }
inline void narrow(Words low, Words high, uint8_t* to) { vst1_u8(to, vmovn_u16(packed_to_16bit(low, high))); }

inline Floats load_float16(const uint16_t* from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
}
inline Floats round_to_float16(Floats value) { return vcvt_f32_f16(vcvt_f16_f32(value)); }
inline void store_float16(Floats low, Floats high, uint16_t* to) {
  vst1q_u16(to, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high)));
}

#include "optimizer/lanes.inl"
#include "optimizer/moment_formats.inl"
#include "optimizer/update_body.inl"
#include "optimizer/update_rules.inl"

}  // namespace

const UpdateKernels kernels_neon = {update<AdamW>, update<Lion>, update<Adagrad>};

}  // namespace offload
