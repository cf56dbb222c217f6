// What a step reads and writes, and the arithmetic of each optimizer.
//
// Ownership: an UpdateSpan borrows its memory.
// Units: element counts. All arrays of an UpdateSpan have `count` elements.
// Invariants: includes nothing but <cstddef> and <cstdint>: the files compiled for an ISA see it, see
//             update_kernels.h.
// Sources: Adam, arXiv 1412.6980; AdamW, arXiv 1711.05101; Lion, arXiv 2302.06675; Adagrad, JMLR 12 (2011).
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

enum class FloatFormat : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// kFloat32: `master` holds fp32. kSplit: the fp32 master is the bf16 working weight plus the signed
// 16-bit remainder in `master`; bits(master) = (weight << 16) + remainder. kBFloat16: `master` is the bf16
// working weight, and all there is of it: rounded stochastically, it changes the arithmetic.
enum class MasterFormat : uint8_t { kFloat32 = 0, kSplit = 1, kBFloat16 = 2 };

// How the moments lie in memory: fp32, bf16, or a byte each with a scale for every kMomentBlock elements.
// The small ones change the arithmetic: [Note: small moments].
enum class MomentFormat : uint8_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };
constexpr size_t kMomentBlock = 256;

// A pending scale of the gradient, applied as torch would have: in fp32, then rounded to nearest even
// in the gradient's dtype. kMultiplyReciprocal multiplies by 1/value rounded to fp32; kMultiplyWide leaves
// the product in fp32: what a loss scale kept above zero in fp16 would be lost again in fp16.
enum class FactorKind : uint8_t { kMultiply = 0, kDivide = 1, kMultiplyReciprocal = 2, kMultiplyWide = 3 };
struct Factor {
  FactorKind kind;
  float value;
};

struct UpdateSpan {
  const void* gradient;  // in gradient_format
  void* master;          // float[count]; 16-bit patterns when master_format is kSplit or kBFloat16
  void* weight;          // working weight in weight_format; null when the master is the weight itself
  void* exp_avg;         // first moment, in moment_format; not read by Adagrad
  void* exp_avg_sq;      // second moment, and Adagrad's sum of squares; not read by Lion
  size_t count;
  FloatFormat gradient_format;
  FloatFormat weight_format;
  MasterFormat master_format;
  MomentFormat moment_format = MomentFormat::kFloat32;
  float* exp_avg_scales = nullptr;  // of int8 moments: one for each block
  float* exp_avg_sq_scales = nullptr;
  // Which random bits the small formats are rounded with: [Note: stochastic rounding].
  uint32_t rounding_seed = 0;
  // The index of the first element in its parameter; int8: a multiple of kMomentBlock.
  size_t first_element = 0;
};

// [Note: one step] What every sequence below begins and ends with, every operation rounded to fp32, none
// fused:
//   g = float(gradient); for each factor: g = round_to_gradient_format(g * value), a wide one not rounded
//   if maximize: g = -g
//   ... the optimizer's own lines, which leave the new master in p ...
// and the working weight is p rounded half up in magnitude for bf16 (bits + 0x8000 >> 16; NaN becomes
// the canonical quiet NaN of its sign, remainder 0), to nearest even for fp16. A bf16 master is rounded
// stochastically instead.
// The scalars of one step are rounded to fp32 from the double expressions in parentheses.

// [Note: stochastic rounding] A moment that moves by less than half a unit in its last place would never move
// under rounding to nearest: with beta2 = 0.999 a bf16 second moment would not decay, and a bf16 weight would
// stand still under a small learning rate. So small formats round up with the probability of what is left
// out. With key = hash(seed + hash(step)), element i of a parameter takes the word hash(i + key), all modulo
// 2^32, its low half for the first moment, its high half for the second, and the low half of hash(i +
// hash(key)) for a bf16 master. Neither threads nor chunks nor the place of a state change it. hash is
// scrambled() of float_formats.inl.

// [Note: small moments] The step computes with fp32 moments and only then rounds what it keeps.
//   bf16   both moments, rounded stochastically
//   int8   levels of a block's scale, finer towards zero (the mu-law of telephony). A level L of M mantissa
//          bits has the code (bits(L + 2^M) - bits(2^M)) >> (23 - M); code 0 is zero. The first moment is a
//          sign and 7 bits with M = 4, of the second the square root has 8 bits with M = 5. A block's scale
//          is its largest magnitude over the level of the largest code, cut to 16 significant bits: so every
//          value of a block is exact in fp32, and encoding what was decoded gives it again.
// A block with something that is not finite decodes to NaN, one of next to nothing (below kLeastFirst,
// kLeastRoot of moment_formats.inl) to zero.

// [Note: the AdamW sequence]
//   if l2 != 0:  g = g + l2 * p            else: p = p * weight_scale
//   m = m + (g - m) * one_minus_beta1
//   v = v * beta2 + (one_minus_beta2 * g) * g
//   p = p - (step_size * m) / (sqrt(v) + eps)
struct AdamWScalars {
  float weight_scale;     // (1 - lr * weight_decay) for AdamW, 1 for Adam
  float l2;               // (weight_decay) for Adam, 0 for AdamW; not applied when 0
  float one_minus_beta1;  // (1 - beta1)
  float beta2;            // (beta2)
  float one_minus_beta2;  // (1 - beta2)
  float step_size;        // (lr * sqrt(1 - beta2^t) / (1 - beta1^t))
  float eps;              // (eps * sqrt(1 - beta2^t))
  bool maximize;
  uint32_t step = 0;  // the number of the step: [Note: stochastic rounding]

  bool operator==(const AdamWScalars&) const = default;
};

// [Note: the Lion sequence]
//   p = p * weight_scale
//   p = p - step_size * sign(m * beta1 + g * one_minus_beta1)     sign is 0 of zeros and of NaN, as in torch
//   m = m * beta2 + g * one_minus_beta2
struct LionScalars {
  float weight_scale;     // (1 - lr * weight_decay)
  float beta1;            // (beta1)
  float one_minus_beta1;  // (1 - beta1)
  float beta2;            // (beta2)
  float one_minus_beta2;  // (1 - beta2)
  float step_size;        // (lr)
  bool maximize;
  uint32_t step = 0;  // the number of the step: [Note: stochastic rounding]

  bool operator==(const LionScalars&) const = default;
};

// [Note: the Adagrad sequence]
//   if l2 != 0:  g = g + l2 * p
//   v = v + g * g
//   p = p - (step_size * g) / (sqrt(v) + eps)
struct AdagradScalars {
  float l2;         // (weight_decay); not applied when 0
  float step_size;  // (lr / (1 + (t - 1) * lr_decay))
  float eps;        // (eps)
  bool maximize;
  uint32_t step = 0;  // the number of the step: [Note: stochastic rounding]

  bool operator==(const AdagradScalars&) const = default;
};

}  // namespace offload
