// asa_ops::asa_fwd, asa_bwd and asa_list_survivors on a GPU.

#include "call.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

namespace asa_ops::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> asa_fwd(Tensor query, Tensor key, Tensor value, Optional alpha,
                                                           Optional beta, Optional key_padding_mask,
                                                           std::vector<int64_t> grid, std::vector<int64_t> window,
                                                           int64_t extra_tokens, int64_t topk, bool reciprocal,
                                                           double scale, double band, bool keep, bool tf32) {
  const Arguments x = arguments_of(query, key, value, alpha, beta, key_padding_mask,
                                   Options(grid, window, extra_tokens, topk, reciprocal, scale, keep ? band : 0));
  const Outputs outputs = x.new_outputs(keep ? kept_of(x, true).bytes : 0);
  if (x.is_empty() || (x.real && x.n_q() == x.n_k())) Arguments::clear(outputs);  // kernels do not write padding
  if (!x.is_empty()) for_type(query, [&](auto zero) { Call<decltype(zero)>(x, outputs, keep, tf32).forward(); });
  return {outputs.out, outputs.lse, outputs.lse_kept, outputs.survivors, outputs.kept};
}

// The gradient of a multiplier from that of all rows, float32 [B, heads, N_q]: those that share it add up.
Tensor sum_to(const Tensor& multiplier, Tensor rows) {
  std::vector<int64_t> shared;
  for (int64_t i = 0; i < 3; ++i)
    if (multiplier.size(i) != rows.size(i)) shared.push_back(i);
  if (!shared.empty()) rows = torch::stable::sum(rows, shared, true);
  return rows.scalar_type() == multiplier.scalar_type() ? rows : torch::stable::to(rows, multiplier.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> asa_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                                           Optional alpha, Optional beta, Optional key_padding_mask,
                                                           Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors,
                                                           Tensor kept, std::vector<int64_t> grid,
                                                           std::vector<int64_t> window, int64_t extra_tokens,
                                                           int64_t topk, bool reciprocal, double scale, double band,
                                                           bool tf32) {
  const Arguments x = arguments_of(query, key, value, alpha, beta, key_padding_mask,
                                   Options(grid, window, extra_tokens, topk, reciprocal, scale, band));
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  x.check_saved(saved, kept_of(x, true).bytes);
  check(grad_out, "grad_out", query, x.type(), {x.batch(), x.heads(), x.n_q(), x.dim_v()});
  const Gradients gradients = new_gradients(x);
  if (!x.is_empty())
    for_type(query, [&](auto zero) { Call<decltype(zero)>(x, saved, true, tf32).backward(grad_out, gradients); });
  const auto of_multiplier = [&](const Optional& multiplier, const Optional& of_rows) {
    if (!multiplier) return torch::stable::new_empty(query, {x.batch(), 0, 0});
    return of_rows ? sum_to(*multiplier, *of_rows) : x.new_gradient(*multiplier, false);
  };
  const auto of_key_heads = [&](const Tensor& dx) {
    if (x.group() == 1) return dx;
    const std::vector<int64_t> shape = {x.batch(), x.key_heads(), x.group(), x.n_k(), dx.size(3)}, shared = {2};
    return torch::stable::sum(torch::stable::view(dx, shape), shared);
  };
  return {gradients.dq, of_key_heads(gradients.dk), of_key_heads(gradients.dv), of_multiplier(alpha, gradients.dalpha),
          of_multiplier(beta, gradients.dbeta)};
}

void asa_list_survivors(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta,
                        Optional key_padding_mask, Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors,
                        Tensor kept, std::vector<int64_t> grid, std::vector<int64_t> window, int64_t extra_tokens,
                        int64_t topk, bool reciprocal, double scale, double band, Tensor row_offsets,
                        Tensor col_indices) {
  const Arguments x = arguments_of(query, key, value, alpha, beta, key_padding_mask,
                                   Options(grid, window, extra_tokens, topk, reciprocal, scale, band));
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  x.check_saved(saved, kept_of(x, true).bytes);
  check_graph(x, row_offsets, col_indices);
  if (col_indices.numel() == 0) return;
  for_type(query, [&](auto zero) {
    Call<decltype(zero)>(x, saved, true, false)
        .graph(data<const int64_t>(row_offsets), data<int32_t>(col_indices), col_indices.numel());
  });
}

}  // namespace
}  // namespace asa_ops::cuda

#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(ASA_OPS_NAMESPACE, CUDA, m) {
  m.impl("asa_fwd", TORCH_BOX(&asa_ops::cuda::asa_fwd));
  m.impl("asa_bwd", TORCH_BOX(&asa_ops::cuda::asa_bwd));
  m.impl("asa_list_survivors", TORCH_BOX(&asa_ops::cuda::asa_list_survivors));
}
#else  // an emulation on CPU tensors, for the tests
STABLE_TORCH_LIBRARY_FRAGMENT(ASA_OPS_NAMESPACE, m) {
  m.def((std::string("asa_emulated_fwd") + asa_ops::kForwardSchema).c_str());
  m.def((std::string("asa_emulated_bwd") + asa_ops::kBackwardSchema).c_str());
  m.def((std::string("asa_emulated_list_survivors") + asa_ops::kListSurvivorsSchema).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(ASA_OPS_NAMESPACE, CPU, m) {
  m.impl("asa_emulated_fwd", TORCH_BOX(&asa_ops::cuda::asa_fwd));
  m.impl("asa_emulated_bwd", TORCH_BOX(&asa_ops::cuda::asa_bwd));
  m.impl("asa_emulated_list_survivors", TORCH_BOX(&asa_ops::cuda::asa_list_survivors));
}
#endif
