// One Adam or AdamW step over plain spans of host memory, in a single pass.
//
// Ownership: borrows every span for the call.
// Threads: adamw_update is a pure function of its spans; disjoint spans may be updated at once.
//          adamw_update_parallel cuts a span into blocks for a WorkerPool.
// Units: element counts. All spans of an AdamWSpan have `count` elements.
// Invariants: the bits do not depend on the ISA, on the thread count or on where a span is cut.
// Sources: Adam, arXiv 1412.6980; AdamW, arXiv 1711.05101.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload {

class WorkerPool;

enum class FloatFormat : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// kFloat32: `master` holds fp32. kSplit: the fp32 master is the bf16 working weight plus the signed
// 16-bit remainder in `master`; bits(master) = (weight << 16) + remainder.
enum class MasterFormat : uint8_t { kFloat32 = 0, kSplit = 1 };

// A pending scale of the gradient, applied as torch would have: in fp32, then rounded to nearest even
// in the gradient's dtype. kMultiplyReciprocal multiplies by 1/value rounded to fp32; kMultiplyWide leaves
// the product in fp32: what a loss scale kept above zero in fp16 would be lost again in fp16.
enum class FactorKind : uint8_t { kMultiply = 0, kDivide = 1, kMultiplyReciprocal = 2, kMultiplyWide = 3 };
struct Factor {
  FactorKind kind;
  float value;
};

struct AdamWSpan {
  const void* gradient;  // in gradient_format
  void* master;          // float[count], or int16_t[count] when master_format is kSplit
  void* weight;          // working weight in weight_format; null when the fp32 master is the weight itself
  float* exp_avg;        // first moment
  float* exp_avg_sq;     // second moment
  size_t count;
  FloatFormat gradient_format;
  FloatFormat weight_format;
  MasterFormat master_format;
};

// The scalars of one step, rounded to fp32 from the double expressions in parentheses.
struct AdamWScalars {
  float weight_scale;     // (1 - lr * weight_decay) for AdamW, 1 for Adam
  float l2;               // (weight_decay) for Adam, 0 for AdamW; not applied when 0
  float one_minus_beta1;  // (1 - beta1)
  float beta2;            // (beta2)
  float one_minus_beta2;  // (1 - beta2)
  float step_size;        // (lr * sqrt(1 - beta2^t) / (1 - beta1^t))
  float eps;              // (eps * sqrt(1 - beta2^t))
  bool maximize;
};

// [Note: the AdamW sequence] Per element, every operation rounded to fp32, none fused:
//   g = float(gradient); for each factor: g = round_to_gradient_format(g * value), a wide one not rounded
//   if maximize: g = -g
//   if l2 != 0:  g = g + l2 * p            else: p = p * weight_scale
//   m = m + (g - m) * one_minus_beta1
//   v = v * beta2 + (one_minus_beta2 * g) * g
//   p = p - (step_size * m) / (sqrt(v) + eps)
// and the working weight is p rounded half up in magnitude for bf16 (bits + 0x8000 >> 16; NaN becomes
// the canonical quiet NaN of its sign, remainder 0), to nearest even for fp16.
enum class Isa : uint8_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction set chosen at load: the best this CPU has, or OFFLOAD_FORCE_ISA=scalar|avx2|avx512.
Isa active_isa();
bool isa_available(Isa isa) noexcept;
const char* isa_name(Isa isa) noexcept;

// `flush_denormals`: the calling thread's MXCSR/FPCR is set accordingly for the call and restored.
void adamw_update(const AdamWSpan& span, const AdamWScalars& scalars, const Factor* factors,
                  size_t factor_count, bool flush_denormals, Isa isa);
void adamw_update_parallel(WorkerPool& pool, const AdamWSpan& span, const AdamWScalars& scalars,
                           const Factor* factors, size_t factor_count, bool flush_denormals, Isa isa);

// True when this thread flushes denormals (torch.set_flush_denormal).
bool flush_denormals_enabled() noexcept;

// fp32 -> bf16 + remainder and back, as in [Note: the AdamW sequence].
void split_master(const float* master, uint16_t* weight, int16_t* remainder, size_t count) noexcept;
void join_master(const uint16_t* weight, const int16_t* remainder, float* master, size_t count) noexcept;

}  // namespace offload
