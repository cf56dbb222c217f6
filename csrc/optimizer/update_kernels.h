// The loops as each instruction set has them: update_body.inl, compiled once a file.
//
// Threads: pure functions of their spans.
// Invariants: formats and states were checked by the caller; no factor is kMultiplyReciprocal; the same bits
//             from every kernel on finite data. A file compiled for an ISA includes nothing from std but
//             <cstddef> and <cstdint>, keeps all but its one entry in an anonymous namespace and throws
//             nothing (no noexcept either: it would refer to the weak personality): the linker would
//             otherwise be free to keep its copy of a shared (weak) function for everybody, and a CPU without
//             that ISA would die in it.
#pragma once

#include "optimizer/update_rules.h"

namespace offload {

template <typename Scalars>
using UpdateKernel = void(const UpdateSpan& span, const Scalars& scalars, const Factor* factors,
                          size_t factor_count);

struct UpdateKernels {
  UpdateKernel<AdamWScalars>* adamw;
  UpdateKernel<LionScalars>* lion;
  UpdateKernel<AdagradScalars>* adagrad;
};

extern const UpdateKernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_neon, kernels_sve128,
    kernels_sve256, kernels_sve512;

}  // namespace offload
