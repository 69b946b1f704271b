// asa_ops::asa_fwd, asa_bwd and asa_list_survivors on a CPU: checks, and the passes of a call in their order.

#include "passes.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace asa_ops::cpu {

namespace {

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

// A head and the outputs of its forward.
template <class T>
Problem<T> head_of(const Call& call, const Outputs& outputs, int64_t i, int64_t threads) {
  Problem<T> p = call.head<T>(i, threads);
  p.lse = Call::of_head<T>(outputs.lse, i, 0), p.lse_kept = Call::of_head<T>(outputs.lse_kept, i, 0);
  p.survivors = Call::of_head<int32_t>(outputs.survivors, i, 0);
  p.keeps = outputs.kept.size(2) > 0;
  if (p.keeps) call.set_kept(p, data<char>(outputs.kept, i * call.kept.bytes));
  return p;
}

template <class T>
void forward(const Call& call, const Outputs& outputs) {
  for_heads(call.x.n_heads(), [&](int64_t i, int64_t threads) {
    forward_head<T>(call, head_of<T>(call, outputs, i, threads), i, threads, outputs.out, {});
  });
}

// Adds up the gradients of all rows [B, heads, N_q] into those of a multiplier that rows, heads or images share.
template <class T>
void sum_gradients(const Call& call, const std::vector<T>& rows, const Tensor& gradient) {
  const Arguments& x = call.x;
  const int64_t shared_n = gradient.size(2), heads = gradient.size(1);
  std::vector<double> sums(gradient.numel(), 0.0);  // there may be many
  for (int64_t b = 0; b < x.batch(); ++b)
    for (int64_t h = 0; h < x.heads(); ++h) {
      const int64_t image = gradient.size(0) > 1 ? b : 0, head = heads > 1 ? h : 0;
      const T* const from = rows.data() + (b * x.heads() + h) * x.n_q();
      double* const to = sums.data() + (image * heads + head) * shared_n;
      for (int64_t i = 0; i < x.n_q(); ++i) to[shared_n > 1 ? i : 0] += from[i];
    }
  const Rows all{gradient.mutable_data_ptr(), type_of(gradient), 1, 1, 1};
  table<double>().write_rows(sums.data(), 0, gradient.numel(), 1, all);
}

template <class T>
void backward(const Call& call, const Tensor& d_out, const Outputs& saved, const std::vector<Tensor>& gradients) {
  const auto& kernels = table<T>();
  const Arguments& x = call.x;
  const bool learns = x.options.band > 0;
  std::vector<T> dalpha(x.alpha && learns ? x.n_heads() * x.n_q() : 0);
  std::vector<T> dbeta(x.beta && learns ? x.n_heads() * x.n_q() : 0);
  const auto of_head = [&](std::vector<T>& rows, int64_t i) { return rows.empty() ? nullptr : &rows[i * x.n_q()]; };
  for_key_heads<T>(call, x.n_k(), [&](int64_t i, int64_t threads, T* dk_sum, T* dv_sum) {
    Problem<T> p = head_of<T>(call, saved, i, threads);
    check_survivors(p);
    const Rows d_out_rows = call.tokens(d_out, i);
    p.parts = parts_of(p, call.tokens(x.query, i), call.tokens(x.key, i), &d_out_rows);
    std::vector<T> delta(p.n_q);
    p.delta = delta.data();
    p.dalpha = of_head(dalpha, i), p.dbeta = of_head(dbeta, i);
    Slabs slabs{{}, Layout(p.n_q)};
    find_layout(kernels, p, threads, slabs.layout);
    slabs.ends = ends_of_slabs(p, slabs.layout);
    sum_slabs(call, p, i, threads, slabs, {0, p.n_k}, d_out, saved.out, {}, {gradients[0], gradients[1], gradients[2]},
              dk_sum, dv_sum);
    if (p.dalpha || p.dbeta) learn_thresholds(call, p, i, threads, d_out, saved.out, {});
  });
  if (!dalpha.empty()) sum_gradients(call, dalpha, gradients[3]);
  if (!dbeta.empty()) sum_gradients(call, dbeta, gradients[4]);
}

// Fills col_indices from what a forward pass kept; `offsets` are the sums of its survivors.
template <class T>
void list(const Call& call, const Outputs& saved, const int64_t* offsets, int32_t* col_indices) {
  for_heads(call.x.n_heads(), [&](int64_t i, int64_t threads) {
    list_head(head_of<T>(call, saved, i, threads), i, threads, offsets, col_indices);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> asa_fwd(Tensor query, Tensor key, Tensor value, Optional alpha,
                                                           Optional beta, Optional key_padding_mask,
                                                           std::vector<int64_t> grid, std::vector<int64_t> window,
                                                           int64_t extra_tokens, int64_t topk, bool reciprocal,
                                                           double scale, double band, bool keep, bool) {
  const Call call = call_of(query, key, value, alpha, beta, key_padding_mask,
                            Options(grid, window, extra_tokens, topk, reciprocal, scale, band));
  const Outputs x = call.x.new_outputs(keep ? call.kept.bytes : 0);
  if (call.x.is_empty())
    call.x.clear(x);
  else
    call.x.type() == ScalarType::Double ? forward<double>(call, x) : forward<float>(call, x);
  return {x.out, x.lse, x.lse_kept, x.survivors, x.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> asa_bwd(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional key_padding_mask,
    Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kept, std::vector<int64_t> grid,
    std::vector<int64_t> window, int64_t extra_tokens, int64_t topk, bool reciprocal, double scale, double band, bool) {
  const Call call = call_of(query, key, value, alpha, beta, key_padding_mask,
                            Options(grid, window, extra_tokens, topk, reciprocal, scale, band));
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  call.x.check_saved(saved, call.kept.bytes);
  check(grad_out, "grad_out", query, call.x.type(), {call.x.batch(), call.x.heads(), call.x.n_q(), call.x.dim_v()});
  const std::vector<Tensor> x = call.x.new_gradients();
  if (!call.x.is_empty())
    call.x.type() == ScalarType::Double ? backward<double>(call, grad_out, saved, x)
                                        : backward<float>(call, grad_out, saved, x);
  return {x[0], x[1], x[2], x[3], x[4]};
}

void asa_list_survivors(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta,
                        Optional key_padding_mask, Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors,
                        Tensor kept, std::vector<int64_t> grid, std::vector<int64_t> window, int64_t extra_tokens,
                        int64_t topk, bool reciprocal, double scale, double band, Tensor row_offsets,
                        Tensor col_indices) {
  const Call call = call_of(query, key, value, alpha, beta, key_padding_mask,
                            Options(grid, window, extra_tokens, topk, reciprocal, scale, band));
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  call.x.check_saved(saved, call.kept.bytes);
  const int64_t* const offsets = check_graph(row_offsets, col_indices, query, call.x.n_heads() * call.x.n_q());
  if (call.x.is_empty()) return;
  int32_t* const columns = data<int32_t>(col_indices);
  call.x.type() == ScalarType::Double ? list<double>(call, saved, offsets, columns)
                                      : list<float>(call, saved, offsets, columns);
}

}  // namespace
}  // namespace asa_ops::cpu

#if !defined(ASA_AMX_TESTING)
STABLE_TORCH_LIBRARY_IMPL(asa_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&asa_ops::cpu::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CPU, m) {
  m.impl("asa_fwd", TORCH_BOX(&asa_ops::cpu::asa_fwd));
  m.impl("asa_bwd", TORCH_BOX(&asa_ops::cpu::asa_bwd));
  m.impl("asa_list_survivors", TORCH_BOX(&asa_ops::cpu::asa_list_survivors));
}
#else  // beside the extension, for the tests
STABLE_TORCH_LIBRARY_FRAGMENT(asa_ops, m) {
  m.def("asa_amx_isa() -> int");
  m.def((std::string("asa_amx_fwd") + asa_ops::kForwardSchema).c_str());
  m.def((std::string("asa_amx_bwd") + asa_ops::kBackwardSchema).c_str());
  m.def((std::string("asa_amx_list_survivors") + asa_ops::kListSurvivorsSchema).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CompositeExplicitAutograd, m) {
  m.impl("asa_amx_isa", TORCH_BOX(&asa_ops::cpu::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CPU, m) {
  m.impl("asa_amx_fwd", TORCH_BOX(&asa_ops::cpu::asa_fwd));
  m.impl("asa_amx_bwd", TORCH_BOX(&asa_ops::cpu::asa_bwd));
  m.impl("asa_amx_list_survivors", TORCH_BOX(&asa_ops::cpu::asa_list_survivors));
}
#endif
