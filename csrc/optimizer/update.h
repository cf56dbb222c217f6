// One step of an optimizer over plain spans of host memory, in a single pass.
//
// Ownership: borrows every span for the call.
// Threads: update_states is a pure function of its span; disjoint spans may be updated at once.
//          update_states_parallel cuts a span into blocks for a WorkerPool.
// Units: element counts.
// Invariants: the bits do not depend on the ISA, on the thread count or on where a span is cut (with int8
//             moments at multiples of kMomentBlock).
#pragma once

#include <cstddef>
#include <cstdint>
#include <variant>

#include "optimizer/update_rules.h"

namespace offload {

class WorkerPool;

// The kind of scalars names the optimizer.
using UpdateScalars = std::variant<AdamWScalars, LionScalars, AdagradScalars>;

enum class Isa : uint8_t {
  kScalar = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kNeon = 3,
  kSve128 = 4,
  kSve256 = 5,
  kSve512 = 6,
};
// The better ones of an architecture come later. SVE at NEON's own width has nothing over it here.
inline constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2,   Isa::kAvx512, Isa::kSve128,
                                   Isa::kNeon,   Isa::kSve256, Isa::kSve512};

// The instruction set chosen at load: the best this CPU has, or the one that OFFLOAD_FORCE_ISA names.
Isa active_isa();
// SVE is there at one width, that of the calling thread: Linux lets a thread change its own (PR_SVE_SET_VL),
// and those it starts inherit it. It must not change between the start of a WorkerPool and its updates.
bool isa_available(Isa isa) noexcept;
const char* isa_name(Isa isa) noexcept;

// `flush_denormals`: the calling thread's MXCSR/FPCR is set accordingly for the call and restored. Where
// results are flushed, x86-64 and aarch64 differ in one case: what only rounding makes the least normal
// number is zero on aarch64, which looks before it rounds.
void update_states(const UpdateSpan& span, const UpdateScalars& scalars, const Factor* factors,
                   size_t factor_count, bool flush_denormals, Isa isa);
void update_states_parallel(WorkerPool& pool, const UpdateSpan& span, const UpdateScalars& scalars,
                            const Factor* factors, size_t factor_count, bool flush_denormals, Isa isa);

// Of an element, without the scales of int8 moments.
size_t element_bytes(FloatFormat format) noexcept;
size_t element_bytes(MasterFormat format) noexcept;
size_t element_bytes(MomentFormat format) noexcept;

// Throws kInvalidArgument when the span lacks a state that the optimizer of these scalars keeps.
void require_states(const UpdateSpan& span, const UpdateScalars& scalars);

// The elements [begin, begin + count) of a span; with int8 moments `begin` is a multiple of kMomentBlock.
UpdateSpan slice(const UpdateSpan& span, size_t begin, size_t count) noexcept;

// True when this thread flushes denormals (torch.set_flush_denormal).
bool flush_denormals_enabled() noexcept;

// fp32 -> bf16 + remainder and back, as in [Note: one step].
void split_master(const float* master, uint16_t* weight, int16_t* remainder, size_t count) noexcept;
void join_master(const uint16_t* weight, const int16_t* remainder, float* master, size_t count) noexcept;

}  // namespace offload
