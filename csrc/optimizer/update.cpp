#include "optimizer/update.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/worker_pool.h"
#include "optimizer/update_kernels.h"

namespace offload {
namespace {

#include "optimizer/float_formats.inl"

// Elements a worker takes at a time: 128 KiB of each fp32 array. Large against the cost of handing it
// out, small against the imbalance at the end.
constexpr size_t kBlockElements = size_t{32} << 10;
static_assert(kBlockElements % kMomentBlock == 0);

const UpdateKernels& kernels_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2: return kernels_avx2;
    case Isa::kAvx512: return kernels_avx512;
#elif defined(__aarch64__)
    case Isa::kNeon: return kernels_neon;
    case Isa::kSve128: return kernels_sve128;
    case Isa::kSve256: return kernels_sve256;
    case Isa::kSve512: return kernels_sve512;
#endif
    default: return kernels_scalar;
  }
}

void run(const UpdateKernels& kernels, const UpdateSpan& span, const UpdateScalars& scalars,
         const std::vector<Factor>& factors) {
  struct {
    UpdateKernel<AdamWScalars>* operator()(const AdamWScalars&) const { return kernels.adamw; }
    UpdateKernel<LionScalars>* operator()(const LionScalars&) const { return kernels.lion; }
    UpdateKernel<AdagradScalars>* operator()(const AdagradScalars&) const { return kernels.adagrad; }
    const UpdateKernels& kernels;
  } const kernel_of{kernels};
  std::visit([&](const auto& own) { kernel_of(own)(span, own, factors.data(), factors.size()); }, scalars);
}

Isa choose_isa() {
  const char* forced = std::getenv("OFFLOAD_FORCE_ISA");
  Isa best = Isa::kScalar;
  std::string available;
  for (Isa isa : kAllIsas) {
    if (!isa_available(isa)) continue;
    best = isa;
    if (!available.empty()) available += ", ";
    available += isa_name(isa);
    if (forced != nullptr && std::string(forced) == isa_name(isa)) return isa;
  }
  if (forced == nullptr || *forced == '\0') return best;
  throw Error(ErrorKind::kInvalidArgument, "OFFLOAD_FORCE_ISA=" + std::string(forced) +
                                               ": this CPU and build have " + available +
                                               "; name one of them or unset it");
}

// The floating-point mode of the calling thread while it updates: round to nearest, no traps, and
// denormals as asked for. Worker threads would otherwise keep whatever mode their creator had.
class FloatingPointMode {
 public:
#if defined(__x86_64__)
  explicit FloatingPointMode(bool flush_denormals) noexcept : previous_(_mm_getcsr()) {
    _mm_setcsr(kMaskAllExceptions | (flush_denormals ? kFlushDenormals : 0));
  }
  ~FloatingPointMode() { _mm_setcsr(previous_); }
  static bool flushes_denormals() noexcept { return (_mm_getcsr() & kFlushToZero) != 0; }

 private:
  static constexpr unsigned kMaskAllExceptions = 0x1f80;
  static constexpr unsigned kFlushToZero = 0x8000;
  static constexpr unsigned kFlushDenormals = kFlushToZero | 0x0040;  // results and inputs
  unsigned previous_;
#elif defined(__aarch64__)
  explicit FloatingPointMode(bool flush_denormals) noexcept : previous_(read()) {
    write(flush_denormals ? kFlushDenormals : 0);
  }
  ~FloatingPointMode() { write(previous_); }
  static bool flushes_denormals() noexcept { return (read() & kFlushDenormals) != 0; }

 private:
  static constexpr uint64_t kFlushDenormals = uint64_t{1} << 24;
  static uint64_t read() noexcept {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void write(uint64_t value) noexcept { asm volatile("msr fpcr, %0" ::"r"(value) : "memory"); }
  uint64_t previous_;
#else
#error "offload supports x86-64 and aarch64"
#endif

 public:
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;
};

void require(bool holds, const char* message) {
  if (!holds) throw Error(ErrorKind::kInvalidArgument, message);
}

void check(const UpdateSpan& span, const UpdateScalars& scalars, const Factor* factors, size_t factor_count,
           Isa isa) {
  require(isa_available(isa),
          "this CPU, build or thread (SVE: its vector length) has not the instruction set asked for: "
          "see available_isas()");
  require(factors != nullptr || factor_count == 0, "factors is null but factor_count is not 0");
  require(span.gradient_format <= FloatFormat::kFloat16,
          "gradient_format must be FLOAT32, BFLOAT16 or FLOAT16");
  if (span.master_format == MasterFormat::kSplit) {
    require(span.weight_format == FloatFormat::kBFloat16, "a split master needs a BFLOAT16 weight");
    require(span.weight != nullptr || span.count == 0,
            "a split master needs a weight: half of it lies there");
  } else if (span.master_format == MasterFormat::kBFloat16) {
    require(span.weight == nullptr, "a bf16 master is the weight itself: weight must be null");
  } else {
    require(span.master_format == MasterFormat::kFloat32,
            "master_format must be MASTER_FLOAT32, MASTER_SPLIT or MASTER_BFLOAT16");
    require(span.weight == nullptr || span.weight_format == FloatFormat::kBFloat16 ||
                span.weight_format == FloatFormat::kFloat16,
            "beside a fp32 master the weight must be BFLOAT16 or FLOAT16, or null: the master is the weight");
  }
  require(span.moment_format <= MomentFormat::kInt8,
          "moment_format must be MOMENTS_FLOAT32, MOMENTS_BFLOAT16 or MOMENTS_INT8");
  require(span.moment_format != MomentFormat::kInt8 || span.first_element % kMomentBlock == 0,
          "int8 moments: first_element must be a multiple of 256, where a block begins");
  if (span.count == 0) return;
  require(span.gradient != nullptr, "gradient is null");
  require(span.master != nullptr, "master is null");
  require_states(span, scalars);
}

// Kernels know multiplication and division only: the reciprocal is the same for every element.
std::vector<Factor> without_reciprocals(const Factor* factors, size_t factor_count) {
  std::vector<Factor> result(factors, factors + factor_count);
  for (Factor& factor : result) {
    if (factor.kind == FactorKind::kMultiplyReciprocal) factor = {FactorKind::kMultiply, 1.0f / factor.value};
  }
  return result;
}

// The address `bytes` further on; null stays null: a state that is not kept.
template <typename Element>
Element* advanced(Element* address, size_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<Element>, const char, char>;
  return address == nullptr ? nullptr : reinterpret_cast<Element*>(reinterpret_cast<Byte*>(address) + bytes);
}

uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

}  // namespace

Isa active_isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

bool isa_available(Isa isa) noexcept {
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return cpu_has_avx2();
    case Isa::kAvx512: return cpu_has_avx512();
    case Isa::kNeon: return cpu_has_neon();
    case Isa::kSve128: return cpu_sve_bits() == 128;
    case Isa::kSve256: return cpu_sve_bits() == 256;
    case Isa::kSve512: return cpu_sve_bits() == 512;
  }
  return false;
}

const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kNeon: return "neon";
    case Isa::kSve128: return "sve128";
    case Isa::kSve256: return "sve256";
    case Isa::kSve512: return "sve512";
  }
  return "unknown";
}

size_t element_bytes(FloatFormat format) noexcept { return format == FloatFormat::kFloat32 ? 4 : 2; }

size_t element_bytes(MasterFormat format) noexcept { return format == MasterFormat::kFloat32 ? 4 : 2; }

size_t element_bytes(MomentFormat format) noexcept {
  switch (format) {
    case MomentFormat::kFloat32: return 4;
    case MomentFormat::kBFloat16: return 2;
    case MomentFormat::kInt8: return 1;
  }
  return 0;
}

void require_states(const UpdateSpan& span, const UpdateScalars& scalars) {
  const bool has_scales = span.moment_format == MomentFormat::kInt8;
  if (!std::holds_alternative<AdagradScalars>(scalars)) {
    require(span.exp_avg != nullptr, "exp_avg is null");
    require(!has_scales || span.exp_avg_scales != nullptr, "exp_avg_scales is null");
  }
  if (!std::holds_alternative<LionScalars>(scalars)) {
    require(span.exp_avg_sq != nullptr, "exp_avg_sq is null");
    require(!has_scales || span.exp_avg_sq_scales != nullptr, "exp_avg_sq_scales is null");
  }
}

UpdateSpan slice(const UpdateSpan& span, size_t begin, size_t count) noexcept {
  const size_t moment_bytes = begin * element_bytes(span.moment_format);
  const size_t scale_bytes = begin / kMomentBlock * sizeof(float);
  UpdateSpan part = span;
  part.gradient = advanced(span.gradient, begin * element_bytes(span.gradient_format));
  part.master = advanced(span.master, begin * element_bytes(span.master_format));
  part.weight = advanced(span.weight, begin * element_bytes(span.weight_format));
  part.exp_avg = advanced(span.exp_avg, moment_bytes);
  part.exp_avg_sq = advanced(span.exp_avg_sq, moment_bytes);
  part.exp_avg_scales = advanced(span.exp_avg_scales, scale_bytes);
  part.exp_avg_sq_scales = advanced(span.exp_avg_sq_scales, scale_bytes);
  part.first_element += begin;
  part.count = count;
  return part;
}

void update_states(const UpdateSpan& span, const UpdateScalars& scalars, const Factor* factors,
                   size_t factor_count, bool flush_denormals, Isa isa) {
  check(span, scalars, factors, factor_count, isa);
  const std::vector<Factor> plain_factors = without_reciprocals(factors, factor_count);
  FloatingPointMode mode(flush_denormals);
  run(kernels_for(isa), span, scalars, plain_factors);
}

void update_states_parallel(WorkerPool& pool, const UpdateSpan& span, const UpdateScalars& scalars,
                            const Factor* factors, size_t factor_count, bool flush_denormals, Isa isa) {
  check(span, scalars, factors, factor_count, isa);
  const std::vector<Factor> plain_factors = without_reciprocals(factors, factor_count);
  const UpdateKernels& kernels = kernels_for(isa);
  const size_t block_count = (span.count + kBlockElements - 1) / kBlockElements;
  pool.parallel_for(block_count, [&](size_t block) {
    const size_t at = block * kBlockElements;
    FloatingPointMode mode(flush_denormals);
    run(kernels, slice(span, at, std::min(kBlockElements, span.count - at)), scalars, plain_factors);
  });
}

bool flush_denormals_enabled() noexcept { return FloatingPointMode::flushes_denormals(); }

void split_master(const float* master, uint16_t* weight, int16_t* remainder, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bits = canonical_bits(master[i], bits_of(master[i]));
    weight[i] = static_cast<uint16_t>(rounded_half_up(bits) >> 16);
    remainder[i] = static_cast<int16_t>(bits & 0xffffu);
  }
}

void join_master(const uint16_t* weight, const int16_t* remainder, float* master, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bits = (uint32_t{weight[i]} << 16) + static_cast<uint32_t>(int32_t{remainder[i]});
    master[i] = __builtin_bit_cast(float, bits);
  }
}

}  // namespace offload
