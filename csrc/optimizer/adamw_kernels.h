// The AdamW loop as each instruction set has it: adamw_body.inl, compiled once a file.
//
// Threads: pure functions of their spans.
// Invariants: formats were checked by the caller; no factor is kMultiplyReciprocal; the same bits from
//             every kernel on finite data. A file compiled for an ISA includes nothing from std but
//             <cstddef> and <cstdint>, keeps all but its one entry in an anonymous namespace and throws
//             nothing (no noexcept either: it would refer to the weak personality): the linker would
//             otherwise be free to keep its copy of a shared (weak) function for everybody, and a CPU without
//             that ISA would die in it.
#pragma once

#include "optimizer/adamw.h"

namespace offload {

using AdamWKernel = void(const AdamWSpan& span, const AdamWScalars& scalars, const Factor* factors,
                         size_t factor_count);

AdamWKernel adamw_scalar;
AdamWKernel adamw_avx2;
AdamWKernel adamw_avx512;

}  // namespace offload
