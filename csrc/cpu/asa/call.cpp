// asa_ops::asa_cpu_fwd, asa_cpu_bwd, asa_cpu_neighbors: the choice of an instruction set, checks, and the passes of a call.

#include "../tensors.h"
#include "../isa.h"
#include "../workspace.h"
#include "problem.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

namespace asa_ops::cpu {

template <class T>
T kth_largest(const T* x, int64_t n, int64_t k, T* scratch) {
  constexpr int64_t kGroup = 16;
  const T lowest = -std::numeric_limits<T>::infinity();
  const auto number = [&](T y) { return std::isnan(y) ? lowest : y; };
  // The k-th largest of the group maxima is no more than the k-th largest of all: only what reaches it is sorted.
  T bound = lowest;
  const int64_t groups = n / kGroup;
  if (k <= groups) {
    for (int64_t g = 0; g < groups; ++g) {
      T largest = lowest;
      for (int64_t j = g * kGroup; j < (g + 1) * kGroup; ++j) largest = x[j] > largest ? x[j] : largest;
      scratch[g] = largest;
    }
    std::nth_element(scratch, scratch + k - 1, scratch + groups, std::greater<T>());
    bound = scratch[k - 1];
  }
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j)
    if (const T y = number(x[j]); y >= bound) scratch[count++] = y;
  std::nth_element(scratch, scratch + k - 1, scratch + count, std::greater<T>());
  return scratch[k - 1];
}
template float kth_largest(const float*, int64_t, int64_t, float*);
template double kth_largest(const double*, int64_t, int64_t, double*);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
const Kernels<T>& table() {
  return ASA_TABLE(T, kFloat, kDouble);
}

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// What forward, backward and neighbours have in common.
struct Call {
  Tensor q, k, v;
  Optional alpha, beta, real_q, real_k, broken;
  int64_t height, width, window, topk;
  bool reciprocal;
  double scale;
  Tensor lse, lse_kept, kappa, log_mean, bits, local;

  int64_t batch() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t n_q() const { return q.size(2); }
  int64_t n_k() const { return k.size(2); }
  int64_t dim() const { return q.size(3); }
  int64_t dim_v() const { return v.size(3); }
  ScalarType type() const { return q.scalar_type(); }
  bool thresholded() const { return alpha || topk > 0; }

  // Otherwise the bits of a head are forgotten with its forward pass.
  bool keeps_bits() const { return bits.size(3) > 0; }


  void check_all() const {
    check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v", "[B, heads, N, D]");
    check(type() == ScalarType::Float || type() == ScalarType::Double, "q", "float32 or float64");
    const int64_t b = batch(), h = heads();
    check(q, "q", type(), {b, h, n_q(), dim()});
    check(k, "k", type(), {b, h, n_k(), dim()});
    check(v, "v", type(), {b, h, n_k(), dim_v()});
    if (alpha) check(*alpha, "alpha", type(), {b, h, n_q()});
    if (beta) check(*beta, "beta", type(), {b, h, n_q()});
    if (real_q) check(*real_q, "real_q", ScalarType::Bool, {b, n_q()});
    if (real_k) check(*real_k, "real_k", ScalarType::Bool, {b, n_k()});
    if (broken) check(*broken, "broken", ScalarType::Bool, {b, h, n_k()});
    check(n_k() < INT32_MAX - 64 && n_q() < INT32_MAX - 64, "N", "below 2^31 - 65");
    check(n_q() == n_k() || (!reciprocal && !beta), "N_q", "N_k where pairs are reciprocal or local");
    check(!beta || (height >= 0 && width >= 0 && height * width == n_q()), "height * width", "N");
    check(window >= 1 && window % 2 == 1, "window", "odd");
    check(topk >= 0 && topk <= n_k(), "topk", "between 0 and N_k");
    for (const auto& [x, name] : {std::pair{&lse, "lse"}, {&lse_kept, "lse_kept"}, {&kappa, "kappa"}, {&log_mean, "log_mean"}})
      check(*x, name, type(), {b, h, n_q()});
    check(dim() % kPad == 0 && dim_v() % kPad == 0, "D and Dv", "multiples of 16");
    check(bits.dim() == 4, "bits", "[B, heads, blocks, bytes]");
    check(bits, "bits", ScalarType::Byte, {b, h, parts(n_q(), kBlock), keeps_bits() ? parts(n_k(), kBlock) * kBlock * 8 : 0});
    check(local, "local", ScalarType::Bool, {b, h, n_q(), beta ? window * window : 0});
  }

  void check_bits_kept() const {
    check(!thresholded() || keeps_bits() || n_k() == 0, "bits", "those of a forward pass that kept them");
  }

  // Fewer than kMostRows where threads would have nothing to do.
  static int64_t at_a_time(int64_t blocks, int64_t threads) {
    return blocks >= 16 * threads ? kMostRows : blocks >= 8 * threads ? kMostRows / 2 : kBlock;
  }

  template <class T>
  Problem<T> head(int64_t i, int64_t threads) const {
    const int64_t b = i / heads(), q_rows = i * n_q(), k_rows = i * n_k();
    Problem<T> p{};
    p.n_q = n_q(), p.n_k = n_k(), p.dim = dim(), p.dim_v = dim_v();
    p.blocks_q = parts(n_q(), kBlock), p.blocks_k = parts(n_k(), kBlock);
    p.q_at_a_time = at_a_time(p.blocks_q, threads), p.k_at_a_time = at_a_time(p.blocks_k, threads);
    p.height = height, p.width = width, p.window = window, p.topk = topk, p.scale = static_cast<T>(scale);
    p.reciprocal = reciprocal, p.thresholded = thresholded();
    p.q = data<T>(q, q_rows * dim()), p.k = data<T>(k, k_rows * dim()), p.v = data<T>(v, k_rows * dim_v());
    p.alpha = data<T>(alpha, q_rows), p.beta = data<T>(beta, q_rows);
    p.real_q = data<bool>(real_q, b * n_q()), p.real_k = data<bool>(real_k, b * n_k());
    p.broken = data<bool>(broken, k_rows);
    p.n_real = p.real_k == nullptr ? n_k() : std::count(p.real_k, p.real_k + n_k(), true);
    p.lse = data<T>(lse, q_rows), p.lse_kept = data<T>(lse_kept, q_rows);
    p.kappa = data<T>(kappa, q_rows), p.log_mean = data<T>(log_mean, q_rows);
    p.bits = reinterpret_cast<uint64_t*>(data<uint8_t>(bits, i * bits.size(2) * bits.size(3)));
    p.local = data<bool>(local, q_rows * (beta ? window * window : 0));
    return p;
  }
};

template <class T>
int64_t panels_size(int64_t n, int64_t dim) {
  return table<T>().panels(n) * table<T>().panel_size(dim);
}

template <class T>
void pack_panels(const T* x, int64_t n, int64_t dim, T* panels, const Workspace& workspace) {
  run({0, table<T>().panels(n)}, workspace, [&](Queue& queue, void*) { table<T>().pack_panels(x, n, dim, panels, queue); });
}

template <class T>
void forward(const Call& call, const Tensor& out, const Tensor& survivors) {
  const auto& kernels = table<T>();
  for_heads(call.batch() * call.heads(), [&](int64_t i, int64_t threads) {
    Problem<T> p = call.head<T>(i, threads);
    p.out = data<T>(out, i * p.n_q * p.dim_v);
    p.survivors = data<int32_t>(survivors, i * p.n_q);
    Workspace workspace(threads);
    const int64_t words = p.thresholded ? p.blocks_q * p.blocks_k * kBlock : 0;
    const auto bits = workspace.add<uint64_t>(call.keeps_bits() ? 0 : words);
    const auto panels = workspace.add<T>(panels_size<T>(p.n_k, p.dim));
    workspace.add_share(kernels.scan_bytes(p));
    workspace.add_share(kernels.aggregate_bytes(p));
    workspace.allocate_all();
    if (call.keeps_bits())
      prefer_huge_pages(p.bits, words * 8);
    else
      p.bits = bits.get(workspace);
    p.k_panels = panels.get(workspace);
    pack_panels(p.k, p.n_k, p.dim, p.k_panels, workspace);
    if (p.scanned()) run({0, p.blocks_q}, workspace, [&](Queue& queue, void* scratch) { kernels.scan(p, queue, scratch); });
    run({0, parts(p.n_q, p.q_at_a_time)}, workspace, [&](Queue& queue, void* scratch) { kernels.aggregate(p, queue, scratch); });
  });
}

// Bytes of survivors with their gradients that a backward holds at a time, for one head; kMostRows queries at least.
constexpr int64_t kSlabBytes = 64 * 1024 * 1024;

// Sums up dq, dk, dv slab by slab, then the gradients of the thresholds.
template <class T>
void backward_head(Problem<T>& p, int64_t threads) {
  const auto& kernels = table<T>();
  check(std::all_of(p.survivors, p.survivors + p.n_q, [&](int32_t x) { return x >= 0 && x <= p.n_k; }), "survivors",
        "between 0 and N_k");
  std::vector<int64_t> offsets(p.n_q + 1), ends;
  const auto dense = std::make_unique<bool[]>(p.n_q);
  const bool any_dense = kernels.lay_out(p, offsets.data(), dense.get());
  const int64_t entry = 2 * sizeof(T) + sizeof(int32_t), row = (p.blocks_k + 1) * sizeof(int32_t);
  int64_t entries = 0, rows = 0;  // of the largest slab
  for (int64_t begin = 0, end; begin < p.n_q; begin = end) {
    const auto longer = [&] { return std::min(p.n_q, end + kMostRows); };
    const auto bytes = [&](int64_t to) { return (offsets[to] - offsets[begin]) * entry + (to - begin) * row; };
    end = begin;
    do end = longer();
    while (end < p.n_q && bytes(longer()) <= kSlabBytes);
    entries = std::max(entries, offsets[end] - offsets[begin]);
    rows = std::max(rows, end - begin);
    ends.push_back(end);
  }
  Workspace workspace(threads);
  const auto k_panels = workspace.add<T>(any_dense ? panels_size<T>(p.n_k, p.dim) : 0);
  const auto v_panels = workspace.add<T>(any_dense ? panels_size<T>(p.n_k, p.dim_v) : 0);
  const auto delta = workspace.add<T>(p.n_q);
  const auto probability = workspace.add<T>(entries), ds = workspace.add<T>(entries);
  const auto columns = workspace.add<int32_t>(entries), starts = workspace.add<int32_t>((p.blocks_k + 1) * rows);
  workspace.add_share(kernels.backward_rows_bytes(p));
  workspace.add_share(kernels.backward_columns_bytes(p, rows, entries));
  if (p.dalpha || p.dbeta) workspace.add_share(kernels.backward_thresholds_bytes(p));
  workspace.allocate_all();
  p.delta = delta.get(workspace);
  if (any_dense) {
    pack_panels(p.k, p.n_k, p.dim, p.k_panels = k_panels.get(workspace), workspace);
    pack_panels(p.v, p.n_k, p.dim_v, p.v_panels = v_panels.get(workspace), workspace);
  }
  int64_t begin = 0;  // a multiple of kMostRows whatever the number of threads, which must not show in the sums
  for (const int64_t end : ends) {
    const Slab<T> slab{begin,
                       end,
                       offsets.data(),
                       dense.get(),
                       probability.get(workspace),
                       ds.get(workspace),
                       columns.get(workspace),
                       starts.get(workspace)};
    run({begin / p.q_at_a_time, parts(end, p.q_at_a_time)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_rows(p, slab, queue, scratch); });
    run({0, parts(p.n_k, p.k_at_a_time)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_columns(p, slab, queue, scratch); });
    begin = end;
  }
  if (p.dalpha || p.dbeta)
    run({0, p.blocks_q}, workspace, [&](Queue& queue, void* scratch) { kernels.backward_thresholds(p, queue, scratch); });
}

template <class T>
void backward(const Call& call, const Tensor& d_out, const Tensor& survivors, const Tensor& dq, const Tensor& dk,
              const Tensor& dv, const Optional& dalpha, const Optional& dbeta, double band) {
  for_heads(call.batch() * call.heads(), [&](int64_t i, int64_t threads) {
    Problem<T> p = call.head<T>(i, threads);
    p.d_out = data<T>(d_out, i * p.n_q * p.dim_v);
    p.survivors = data<int32_t>(survivors, i * p.n_q);
    p.dq = data<T>(dq, i * p.n_q * p.dim), p.dk = data<T>(dk, i * p.n_k * p.dim), p.dv = data<T>(dv, i * p.n_k * p.dim_v);
    if (dalpha) p.dalpha = data<T>(*dalpha, i * p.n_q);
    if (dbeta) p.dbeta = data<T>(*dbeta, i * p.n_q);
    p.band = static_cast<T>(band);
    std::fill_n(p.dk, p.n_k * p.dim, T(0));
    std::fill_n(p.dv, p.n_k * p.dim_v, T(0));
    backward_head(p, threads);
  });
}

void asa_cpu_fwd(Tensor q, Tensor k, Tensor v, Optional alpha, Optional beta, Optional real_q, Optional real_k,
                 Optional broken, int64_t height, int64_t width, int64_t window, int64_t topk, bool reciprocal, double scale, Tensor out,
                 Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kappa, Tensor log_mean, Tensor bits, Tensor local) {
  const Call call{q,    k,      v,    alpha,      beta, real_q,   real_k, broken, height, width,
                  window, topk, reciprocal, scale, lse,  lse_kept, kappa,  log_mean,      bits,   local};
  call.check_all();
  check(out, "out", call.type(), {call.batch(), call.heads(), call.n_q(), call.dim_v()});
  check(survivors, "survivors", ScalarType::Int, {call.batch(), call.heads(), call.n_q()});
  call.type() == ScalarType::Float ? forward<float>(call, out, survivors) : forward<double>(call, out, survivors);
}

void asa_cpu_bwd(Tensor d_out, Tensor q, Tensor k, Tensor v, Optional alpha, Optional beta, Optional real_q,
                 Optional real_k, int64_t height, int64_t width, int64_t window, int64_t topk, bool reciprocal, double scale, Tensor lse,
                 Tensor lse_kept, Tensor survivors, Tensor kappa, Tensor log_mean, Tensor bits, Tensor local, double band, Tensor dq, Tensor dk, Tensor dv, Optional dalpha, Optional dbeta) {
  const Call call{q,    k,      v,    alpha,      beta, real_q,   real_k, std::nullopt, height, width,
                  window, topk, reciprocal, scale, lse,  lse_kept, kappa,  log_mean,      bits,         local};
  call.check_all();
  const int64_t b = call.batch(), h = call.heads();
  check(d_out, "d_out", call.type(), {b, h, call.n_q(), call.dim_v()});
  check(survivors, "survivors", ScalarType::Int, {b, h, call.n_q()});
  check(dq, "dq", call.type(), {b, h, call.n_q(), call.dim()});
  check(dk, "dk", call.type(), {b, h, call.n_k(), call.dim()});
  check(dv, "dv", call.type(), {b, h, call.n_k(), call.dim_v()});
  call.check_bits_kept();
  check((!dalpha || alpha) && (!dbeta || beta), "dalpha, dbeta", "given with alpha, beta only");
  if (dalpha) check(*dalpha, "dalpha", call.type(), {b, h, call.n_q()});
  if (dbeta) check(*dbeta, "dbeta", call.type(), {b, h, call.n_q()});
  check((!dalpha && !dbeta) || band > 0, "band", "> 0");
  call.type() == ScalarType::Float ? backward<float>(call, d_out, survivors, dq, dk, dv, dalpha, dbeta, band)
                                   : backward<double>(call, d_out, survivors, dq, dk, dv, dalpha, dbeta, band);
}

// Fills col_indices from the bits and window flags of a forward pass; row_offsets are the sums of its survivors.
void asa_cpu_neighbors(Tensor q, Tensor k, Tensor v, Optional alpha, Optional beta, Optional real_q, Optional real_k,
                       int64_t height, int64_t width, int64_t window, int64_t topk, bool reciprocal, double scale, Tensor lse,
                       Tensor lse_kept, Tensor kappa, Tensor log_mean, Tensor bits, Tensor local, Tensor row_offsets,
                       Tensor col_indices) {
  const Call call{q,    k,      v,    alpha,      beta, real_q,   real_k, std::nullopt, height, width,
                  window, topk, reciprocal, scale, lse,  lse_kept, kappa,  log_mean,      bits,         local};
  call.check_all();
  call.check_bits_kept();
  const int64_t heads = call.batch() * call.heads(), rows = heads * call.n_q();
  check(row_offsets, "row_offsets", ScalarType::Long, {rows + 1});
  const int64_t* const offsets = data<int64_t>(row_offsets, 0);
  check(offsets[0] == 0 && std::is_sorted(offsets, offsets + rows + 1), "row_offsets", "ascending from 0");
  check(col_indices, "col_indices", ScalarType::Int, {offsets[rows]});
  const auto list = [&](auto zero) {
    using T = decltype(zero);
    for_heads(heads, [&](int64_t i, int64_t threads) {
      const Problem<T> p = call.head<T>(i, threads);
      Workspace workspace(threads);
      workspace.add_share(table<T>().list_survivors_bytes(p));
      workspace.allocate_all();
      run({0, parts(p.n_q, p.q_at_a_time)}, workspace, [&](Queue& queue, void* scratch) {
        table<T>().list_survivors(p, offsets + i * p.n_q, data<int32_t>(col_indices, 0), queue, scratch);
      });
    });
  };
  call.type() == ScalarType::Float ? list(0.0f) : list(0.0);
}

}  // namespace
}  // namespace asa_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&asa_ops::cpu::cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CPU, m) {
  m.impl("asa_cpu_fwd", TORCH_BOX(&asa_ops::cpu::asa_cpu_fwd));
  m.impl("asa_cpu_bwd", TORCH_BOX(&asa_ops::cpu::asa_cpu_bwd));
  m.impl("asa_cpu_neighbors", TORCH_BOX(&asa_ops::cpu::asa_cpu_neighbors));
}
