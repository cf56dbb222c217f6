#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/worker_pool.h"
#include "bindings/bindings.h"
#include "bindings/blocking.h"
#include "optimizer/streaming_ceiling.h"
#include "optimizer/update.h"

namespace py = pybind11;

namespace offload::bindings {
namespace {

// A format code of the module (FLOAT32, ...): a number below `count`.
template <typename Format>
Format format_of(int code, int count, const char* argument) {
  if (code < 0 || code >= count) {
    throw Error(ErrorKind::kInvalidArgument, std::string(argument) + " is " + std::to_string(code) +
                                                 "; give one of the module's codes, 0 to " +
                                                 std::to_string(count - 1));
  }
  return static_cast<Format>(code);
}

FloatFormat float_format(int code, const char* argument) { return format_of<FloatFormat>(code, 3, argument); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAllIsas) {
    if (isa_available(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

Isa isa_of(const std::optional<std::string>& name) {
  if (!name) return active_isa();
  for (Isa isa : kAllIsas) {
    if (*name == isa_name(isa) && isa_available(isa)) return isa;
  }
  throw Error(ErrorKind::kInvalidArgument,
              "isa is '" + *name + "'; available_isas() lists what this CPU and build have");
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

void require_addresses(bool all_given, const char* function) {
  if (all_given) return;
  throw Error(ErrorKind::kInvalidArgument,
              std::string(function) + ": an address is 0; give the address of `count` elements for each");
}

// Runs `body` with the pool that `threads` asks for: 0 is the shared one. Call without the GIL.
template <typename Body>
void with_pool(size_t threads, const Body& body) {
  if (threads == 0) return body(WorkerPool::shared());
  WorkerPool pool(threads);
  body(pool);
}

void update(uintptr_t gradient, int gradient_format, uintptr_t master, int master_format, uintptr_t weight,
            int weight_format, uintptr_t exp_avg, uintptr_t exp_avg_sq, size_t count,
            const UpdateScalars& scalars, const std::vector<std::pair<int, double>>& factors,
            const std::optional<std::string>& isa, size_t threads, int moment_format,
            uintptr_t exp_avg_scales, uintptr_t exp_avg_sq_scales, uint32_t rounding_seed,
            size_t first_element) {
  const UpdateSpan span = {.gradient = pointer(gradient),
                           .master = pointer(master),
                           .weight = pointer(weight),
                           .exp_avg = pointer(exp_avg),
                           .exp_avg_sq = pointer(exp_avg_sq),
                           .count = count,
                           .gradient_format = float_format(gradient_format, "gradient_format"),
                           .weight_format = float_format(weight_format, "weight_format"),
                           .master_format = format_of<MasterFormat>(master_format, 3, "master_format"),
                           .moment_format = format_of<MomentFormat>(moment_format, 3, "moment_format"),
                           .exp_avg_scales = static_cast<float*>(pointer(exp_avg_scales)),
                           .exp_avg_sq_scales = static_cast<float*>(pointer(exp_avg_sq_scales)),
                           .rounding_seed = rounding_seed,
                           .first_element = first_element};
  std::vector<Factor> plain_factors;
  for (const auto& [kind, value] : factors) {
    plain_factors.push_back({format_of<FactorKind>(kind, 4, "factor kind"), static_cast<float>(value)});
  }
  const Isa chosen = isa_of(isa);
  const bool flush_denormals = flush_denormals_enabled();
  GilReleased released;
  with_pool(threads, [&](WorkerPool& pool) {
    update_states_parallel(pool, span, scalars, plain_factors.data(), plain_factors.size(), flush_denormals,
                           chosen);
  });
}

size_t parallel_sum_for_test(size_t count) {
  std::vector<size_t> values(count);
  WorkerPool::shared().parallel_for(count, [&](size_t i) { values[i] = i; });
  size_t sum = 0;
  for (size_t value : values) sum += value;
  return sum;
}

void bind_worker_pool(py::module_& module) {
  module.def("default_thread_count", &WorkerPool::default_thread_count);
  module.def("shared_thread_count", [] { return WorkerPool::shared().thread_count(); });
  module.def("end_shared_threads", [] { WorkerPool::shared().end_threads(); }, py::call_guard<GilReleased>());
  module.def("parallel_sum_for_test", &parallel_sum_for_test, py::arg("count"),
             py::call_guard<GilReleased>());
}

void bind_scalars(py::module_& module) {
  py::class_<AdamWScalars>(module, "AdamWScalars")
      .def(py::init([](double weight_scale, double l2, double one_minus_beta1, double beta2,
                       double one_minus_beta2, double step_size, double eps, bool maximize, uint32_t step) {
             return AdamWScalars{.weight_scale = static_cast<float>(weight_scale),
                                 .l2 = static_cast<float>(l2),
                                 .one_minus_beta1 = static_cast<float>(one_minus_beta1),
                                 .beta2 = static_cast<float>(beta2),
                                 .one_minus_beta2 = static_cast<float>(one_minus_beta2),
                                 .step_size = static_cast<float>(step_size),
                                 .eps = static_cast<float>(eps),
                                 .maximize = maximize,
                                 .step = step};
           }),
           py::kw_only(), py::arg("weight_scale"), py::arg("l2"), py::arg("one_minus_beta1"),
           py::arg("beta2"), py::arg("one_minus_beta2"), py::arg("step_size"), py::arg("eps"),
           py::arg("maximize") = false, py::arg("step") = 0);
  py::class_<LionScalars>(module, "LionScalars")
      .def(py::init([](double weight_scale, double beta1, double one_minus_beta1, double beta2,
                       double one_minus_beta2, double step_size, bool maximize, uint32_t step) {
             return LionScalars{.weight_scale = static_cast<float>(weight_scale),
                                .beta1 = static_cast<float>(beta1),
                                .one_minus_beta1 = static_cast<float>(one_minus_beta1),
                                .beta2 = static_cast<float>(beta2),
                                .one_minus_beta2 = static_cast<float>(one_minus_beta2),
                                .step_size = static_cast<float>(step_size),
                                .maximize = maximize,
                                .step = step};
           }),
           py::kw_only(), py::arg("weight_scale"), py::arg("beta1"), py::arg("one_minus_beta1"),
           py::arg("beta2"), py::arg("one_minus_beta2"), py::arg("step_size"), py::arg("maximize") = false,
           py::arg("step") = 0);
  py::class_<AdagradScalars>(module, "AdagradScalars")
      .def(py::init([](double l2, double step_size, double eps, bool maximize, uint32_t step) {
             return AdagradScalars{.l2 = static_cast<float>(l2),
                                   .step_size = static_cast<float>(step_size),
                                   .eps = static_cast<float>(eps),
                                   .maximize = maximize,
                                   .step = step};
           }),
           py::kw_only(), py::arg("l2"), py::arg("step_size"), py::arg("eps"), py::arg("maximize") = false,
           py::arg("step") = 0);
}

void bind_update(py::module_& module) {
  module.attr("FLOAT32") = static_cast<int>(FloatFormat::kFloat32);
  module.attr("BFLOAT16") = static_cast<int>(FloatFormat::kBFloat16);
  module.attr("FLOAT16") = static_cast<int>(FloatFormat::kFloat16);
  module.attr("MASTER_FLOAT32") = static_cast<int>(MasterFormat::kFloat32);
  module.attr("MASTER_SPLIT") = static_cast<int>(MasterFormat::kSplit);
  module.attr("MASTER_BFLOAT16") = static_cast<int>(MasterFormat::kBFloat16);
  module.attr("MOMENTS_FLOAT32") = static_cast<int>(MomentFormat::kFloat32);
  module.attr("MOMENTS_BFLOAT16") = static_cast<int>(MomentFormat::kBFloat16);
  module.attr("MOMENTS_INT8") = static_cast<int>(MomentFormat::kInt8);
  module.attr("MOMENT_BLOCK") = kMomentBlock;
  module.attr("FACTOR_MULTIPLY") = static_cast<int>(FactorKind::kMultiply);
  module.attr("FACTOR_DIVIDE") = static_cast<int>(FactorKind::kDivide);
  module.attr("FACTOR_MULTIPLY_RECIPROCAL") = static_cast<int>(FactorKind::kMultiplyReciprocal);
  module.attr("FACTOR_MULTIPLY_WIDE") = static_cast<int>(FactorKind::kMultiplyWide);

  module.def("active_isa", [] { return isa_name(active_isa()); });
  module.def("available_isas", &available_isas);
  module.def("flush_denormals_enabled", &flush_denormals_enabled);

  module.def("update_states", &update, py::kw_only(), py::arg("gradient"), py::arg("gradient_format"),
             py::arg("master"), py::arg("master_format"), py::arg("weight"), py::arg("weight_format"),
             py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("count"), py::arg("scalars"),
             py::arg("factors") = py::tuple(), py::arg("isa") = py::none(), py::arg("threads") = 0,
             py::arg("moment_format") = 0, py::arg("exp_avg_scales") = 0, py::arg("exp_avg_sq_scales") = 0,
             py::arg("rounding_seed") = 0, py::arg("first_element") = 0);
  module.def(
      "split_master",
      [](uintptr_t master, uintptr_t weight, uintptr_t remainder, size_t count) {
        require_addresses(count == 0 || (master && weight && remainder), "split_master");
        split_master(static_cast<const float*>(pointer(master)), static_cast<uint16_t*>(pointer(weight)),
                     static_cast<int16_t*>(pointer(remainder)), count);
      },
      py::arg("master"), py::arg("weight"), py::arg("remainder"), py::arg("count"),
      py::call_guard<GilReleased>());
  module.def(
      "join_master",
      [](uintptr_t weight, uintptr_t remainder, uintptr_t master, size_t count) {
        require_addresses(count == 0 || (master && weight && remainder), "join_master");
        join_master(static_cast<const uint16_t*>(pointer(weight)),
                    static_cast<const int16_t*>(pointer(remainder)), static_cast<float*>(pointer(master)),
                    count);
      },
      py::arg("weight"), py::arg("remainder"), py::arg("master"), py::arg("count"),
      py::call_guard<GilReleased>());
}

void bind_streaming_ceiling(py::module_& module) {
  module.attr("ACCESS_READ") = static_cast<int>(Access::kRead);
  module.attr("ACCESS_UPDATE") = static_cast<int>(Access::kUpdate);
  module.attr("ACCESS_WRITE") = static_cast<int>(Access::kWrite);
  module.def(
      "streaming_pass",
      [](const std::vector<std::tuple<uintptr_t, size_t, int>>& arrays, size_t count, bool non_temporal,
         bool prefetch, size_t threads) {
        std::vector<StreamedArray> streamed;
        for (const auto& [address, element_bytes, access] : arrays) {
          streamed.push_back({pointer(address), element_bytes, format_of<Access>(access, 3, "access")});
        }
        GilReleased released;
        with_pool(threads, [&](WorkerPool& pool) {
          streaming_pass(pool, streamed, count, {.non_temporal = non_temporal, .prefetch = prefetch});
        });
      },
      py::arg("arrays"), py::arg("count"), py::kw_only(), py::arg("non_temporal") = false,
      py::arg("prefetch") = false, py::arg("threads") = 0);
}

}  // namespace

void bind_optimizer(py::module_& module) {
  bind_worker_pool(module);
  bind_scalars(module);
  bind_update(module);
  bind_streaming_ceiling(module);
}

}  // namespace offload::bindings
