#include <arm_sve.h>

#include "optimizer/update_kernels.h"

namespace offload {
namespace {

#include "optimizer/float_formats.inl"
#include "optimizer/sve_lanes.inl"
static_assert(__ARM_FEATURE_SVE_BITS == 128);

#include "optimizer/lanes.inl"
#include "optimizer/moment_formats.inl"
#include "optimizer/update_body.inl"
#include "optimizer/update_rules.inl"

}  // namespace

const UpdateKernels kernels_sve128 = {update<AdamW>, update<Lion>, update<Adagrad>};

}  // namespace offload
