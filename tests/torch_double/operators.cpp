// Operators that torch asks of a device from outside by other names, or with
// other arguments, than of the CPU; made of those that card.cpp has.

#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/RedispatchFunctions.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- cells of recurrent layers
// ------------------------------------------------------------------------------------------------

// In parts that autograd differentiates: the third result, what a fused cell
// saves for its backward, is not needed.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& of_input, const Tensor& of_hidden,
                                             const Tensor& cell, const OptionalTensor& input_bias,
                                             const OptionalTensor& hidden_bias) {
  Tensor gates = of_input + of_hidden;
  if (input_bias) gates = gates + *input_bias + *hidden_bias;
  const auto parts = gates.chunk(4, 1);
  const Tensor next = parts[1].sigmoid() * cell + parts[0].sigmoid() * parts[2].tanh();
  return {parts[3].sigmoid() * next.tanh(), next, at::empty({0}, gates.options())};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& of_input, const Tensor& of_hidden, const Tensor& hidden,
                                    const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  const auto input = (input_bias ? of_input + *input_bias : of_input).chunk(3, 1);
  const auto other = (hidden_bias ? of_hidden + *hidden_bias : of_hidden).chunk(3, 1);
  const Tensor update = (input[1] + other[1]).sigmoid();
  const Tensor fresh = (input[2] + (input[0] + other[0]).sigmoid() * other[2]).tanh();
  return {fresh + update * (hidden - fresh), at::empty({0}, hidden.options())};
}

// --- fused attention
// ------------------------------------------------------------------------------------------------

int64_t choose_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                         const OptionalTensor& mask, double dropout, bool is_causal,
                         std::optional<double> scale, bool grouped) {
  const int64_t of_cpu =
      at::redispatch::_fused_sdp_choice(c10::DispatchKeySet(c10::DispatchKey::CPU), query, key, value, mask,
                                        dropout, is_causal, scale, grouped);
  const bool is_fused = of_cpu == static_cast<int64_t>(sdp::SDPBackend::flash_attention);
  return static_cast<int64_t>(is_fused ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, double dropout,
    bool is_causal, bool, std::optional<double> scale) {
  auto [output, sums] =
      at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, is_causal, mask, scale);
  const Tensor none = at::empty({0}, query.options().dtype(at::kLong));
  return {output, sums, Tensor(), Tensor(), query.sym_size(2), key.sym_size(2), none, none, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    std::array<bool, 4>, const Tensor& output, const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt,
    c10::SymInt, double dropout, bool is_causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      gradient, query, key, value, output, sums, dropout, is_causal,
      mask.defined() ? OptionalTensor(mask) : std::nullopt, scale);
  return {of_query, of_key, of_value, Tensor()};
}

// --- others
// ------------------------------------------------------------------------------------------------

// The CPU counts floating-point numbers alone.
Tensor histogram(const Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  return at::histc(self.cpu().to(at::kDouble), bins, low, high).to(self.options());
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  library.impl("_thnn_fused_lstm_cell", lstm_cell);
  library.impl("_thnn_fused_gru_cell", gru_cell);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_thnn_fused_lstm_cell", lstm_cell);
  library.impl("_thnn_fused_gru_cell", gru_cell);
  library.impl("_scaled_dot_product_fused_attention_overrideable", attention);
  library.impl("_scaled_dot_product_fused_attention_overrideable_backward", attention_backward);
  library.impl("histc", histogram);
}

// Sparse tensors can be made and looked into; nothing computes with them.
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, library) {
  library.impl("_sparse_coo_tensor_with_dims_and_tensors",
               at::native::new_with_dims_and_tensor_sparse_symint);
  library.impl("_indices", at::native::_indices_sparse);
  library.impl("_values", at::native::_values_sparse);
  library.impl("_coalesced_", at::native::_coalesced_sparse_);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}
