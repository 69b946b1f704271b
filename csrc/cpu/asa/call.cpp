// asa_ops::asa_cpu_fwd, asa_cpu_bwd, asa_cpu_neighbors: checks, and the passes of a call in their order.

#include "../../asa.h"
#include "../isa.h"
#include "../workspace.h"
#include "problem.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace asa_ops::cpu {

// Here, not beside scan(), which calls it: <algorithm> must not be compiled inside the namespace of an instruction set,
// or its functions could be linked into code for machines that lack the instructions.
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

template <class T>
const Kernels<T>& table() {
  return ASA_TABLE(T, kFloat, kDouble);
}

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// What forward, backward and neighbours have in common.
struct Call {
  Arguments x;
  Optional not_finite = std::nullopt;  // bool [B, heads, N_k] keys whose value is not finite, which is 0 in `value`

  int64_t n_heads() const { return x.batch() * x.heads(); }

  void check_all() const {
    const ScalarType type = x.type();
    check(type == ScalarType::Float || type == ScalarType::Double, "query", "float32 or float64");
    x.check_all(type);
    for (const auto& [tokens, name] : {std::pair{&x.query, "query"}, {&x.key, "key"}, {&x.value, "value"}})
      check(tokens->is_contiguous(), name, "contiguous");
    check(x.dim() % kPad == 0 && x.dim_v() % kPad == 0, "D and Dv", "multiples of 16");
    const int64_t b = x.batch(), h = x.heads(), n_q = x.n_q(), n_k = x.n_k();
    if (x.alpha) check_contiguous(*x.alpha, "alpha", x.query, type, {b, h, n_q});
    if (x.beta) check_contiguous(*x.beta, "beta", x.query, type, {b, h, n_q});
    if (not_finite) check_contiguous(*not_finite, "not_finite", x.query, ScalarType::Bool, {b, h, n_k});
    check(n_k < INT32_MAX - 64 && n_q < INT32_MAX - 64, "N", "below 2^31 - 65");
    check(x.options.topk <= n_k, "topk", "between 0 and N_k");
    const int64_t bytes = x.keeps_bits() ? parts(n_k, kBlock) * kBlock * 8 : 0;
    check_contiguous(x.saved.bits, "bits", x.query, ScalarType::Byte, {b, h, parts(n_q, kBlock), bytes});
  }

  // A tensor of the output's shape.
  void check_out(const Tensor& out, const char* name) const {
    check_contiguous(out, name, x.query, x.type(), {x.batch(), x.heads(), x.n_q(), x.dim_v()});
  }

  // Fewer than kMostRows where threads would have nothing to do.
  static int64_t at_a_time(int64_t blocks, int64_t threads) {
    return blocks >= 16 * threads ? kMostRows : blocks >= 8 * threads ? kMostRows / 2 : kBlock;
  }

  template <class T>
  Problem<T> head(int64_t i, int64_t threads) const {
    const int64_t b = i / x.heads(), q_rows = i * x.n_q(), k_rows = i * x.n_k();
    Problem<T> p{};
    p.n_q = x.n_q(), p.n_k = x.n_k(), p.dim = x.dim(), p.dim_v = x.dim_v();
    p.blocks_q = parts(p.n_q, kBlock), p.blocks_k = parts(p.n_k, kBlock);
    p.q_at_a_time = at_a_time(p.blocks_q, threads), p.k_at_a_time = at_a_time(p.blocks_k, threads);
    p.height = x.options.height, p.width = x.options.width, p.window = x.options.window, p.topk = x.options.topk;
    p.scale = static_cast<T>(x.options.scale), p.band = static_cast<T>(x.options.band);
    p.reciprocal = x.options.reciprocal, p.thresholded = x.has_neighbours();
    p.q = data<const T>(x.query, q_rows * p.dim), p.k = data<const T>(x.key, k_rows * p.dim);
    p.v = data<const T>(x.value, k_rows * p.dim_v);
    p.alpha = data<const T>(x.alpha, q_rows), p.beta = data<const T>(x.beta, q_rows);
    p.real_k = data<const bool>(x.real, b * p.n_k), p.real_q = p.n_q == p.n_k ? p.real_k : nullptr;
    p.not_finite = data<const bool>(not_finite, k_rows);
    p.n_real = p.real_k == nullptr ? p.n_k : std::count(p.real_k, p.real_k + p.n_k, true);
    p.lse = data<T>(x.saved.lse, q_rows), p.lse_kept = data<T>(x.saved.lse_kept, q_rows);
    p.survivors = data<int32_t>(x.saved.survivors, q_rows);
    p.kappa = data<T>(x.saved.kappa, q_rows), p.log_mean = data<T>(x.saved.log_mean, q_rows);
    p.bits = reinterpret_cast<uint64_t*>(data<uint8_t>(x.saved.bits, i * x.saved.bits.size(2) * x.saved.bits.size(3)));
    p.local = data<bool>(x.saved.local, q_rows * x.positions());
    return p;
  }
};

template <class T>
int64_t panels_size(int64_t n, int64_t dim) {
  return table<T>().panels(n) * table<T>().panel_size(dim);
}

template <class T>
void pack_panels(const T* x, int64_t n, int64_t dim, T* panels, const Workspace& workspace) {
  run({0, table<T>().panels(n)}, workspace,
      [&](Queue& queue, void*) { table<T>().pack_panels(x, n, dim, panels, queue); });
}

template <class T>
void forward(const Call& call) {
  const auto& kernels = table<T>();
  for_heads(call.n_heads(), [&](int64_t i, int64_t threads) {
    Problem<T> p = call.head<T>(i, threads);
    p.out = data<T>(call.x.saved.out, i * p.n_q * p.dim_v);
    Workspace workspace(threads);
    const int64_t words = p.thresholded ? p.blocks_q * p.blocks_k * kBlock : 0;
    const auto bits = workspace.add<uint64_t>(call.x.keeps_bits() ? 0 : words);
    const auto panels = workspace.add<T>(panels_size<T>(p.n_k, p.dim));
    workspace.add_share(kernels.scan_bytes(p));
    workspace.add_share(kernels.aggregate_bytes(p));
    workspace.allocate_all();
    if (call.x.keeps_bits())
      prefer_huge_pages(p.bits, words * 8);
    else
      p.bits = bits.get(workspace);
    p.k_panels = panels.get(workspace);
    pack_panels(p.k, p.n_k, p.dim, p.k_panels, workspace);
    if (p.scanned())
      run({0, p.blocks_q}, workspace, [&](Queue& queue, void* scratch) { kernels.scan(p, queue, scratch); });
    run({0, parts(p.n_q, p.q_at_a_time)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.aggregate(p, queue, scratch); });
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
    run({0, p.blocks_q}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_thresholds(p, queue, scratch); });
}

template <class T>
void backward(const Call& call, const Tensor& d_out, const Gradients& gradients) {
  for_heads(call.n_heads(), [&](int64_t i, int64_t threads) {
    Problem<T> p = call.head<T>(i, threads);
    p.d_out = data<const T>(d_out, i * p.n_q * p.dim_v);
    p.dq = data<T>(gradients.dq, i * p.n_q * p.dim);
    p.dk = data<T>(gradients.dk, i * p.n_k * p.dim), p.dv = data<T>(gradients.dv, i * p.n_k * p.dim_v);
    p.dalpha = data<T>(gradients.dalpha, i * p.n_q), p.dbeta = data<T>(gradients.dbeta, i * p.n_q);
    std::fill_n(p.dk, p.n_k * p.dim, T(0));
    std::fill_n(p.dv, p.n_k * p.dim_v, T(0));
    backward_head(p, threads);
  });
}

// Fills col_indices from the bits and window flags of a forward pass; `offsets` are the sums of its survivors.
template <class T>
void list(const Call& call, const int64_t* offsets, int32_t* col_indices) {
  for_heads(call.n_heads(), [&](int64_t i, int64_t threads) {
    const Problem<T> p = call.head<T>(i, threads);
    Workspace workspace(threads);
    workspace.add_share(table<T>().list_survivors_bytes(p));
    workspace.allocate_all();
    run({0, parts(p.n_q, p.q_at_a_time)}, workspace, [&](Queue& queue, void* scratch) {
      table<T>().list_survivors(p, offsets + i * p.n_q, col_indices, queue, scratch);
    });
  });
}

void asa_cpu_fwd(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real,
                 Optional not_finite, std::vector<double> options, std::vector<Tensor> saved) {
  const Call call{{query, key, value, alpha, beta, real, Options(options), SavedTensors::from(saved)}, not_finite};
  call.check_all();
  call.check_out(call.x.saved.out, "out");
  call.x.type() == ScalarType::Float ? forward<float>(call) : forward<double>(call);
}

void asa_cpu_bwd(Tensor d_out, Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real,
                 std::vector<double> options, std::vector<Tensor> saved, Tensor dq, Tensor dk, Tensor dv,
                 Optional dalpha, Optional dbeta) {
  const Call call{{query, key, value, alpha, beta, real, Options(options), SavedTensors::from(saved)}};
  const Gradients gradients{dq, dk, dv, dalpha, dbeta};
  call.check_all();
  call.x.check_bits_kept();
  call.check_out(d_out, "d_out");
  gradients.check_all(call.x, call.x.type());
  call.x.type() == ScalarType::Float ? backward<float>(call, d_out, gradients)
                                     : backward<double>(call, d_out, gradients);
}

void asa_cpu_neighbors(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real,
                       std::vector<double> options, std::vector<Tensor> saved, Tensor row_offsets, Tensor col_indices) {
  const Call call{{query, key, value, alpha, beta, real, Options(options), SavedTensors::from(saved)}};
  call.check_all();
  call.x.check_bits_kept();
  const int64_t rows = call.n_heads() * call.x.n_q();
  check_contiguous(row_offsets, "row_offsets", query, ScalarType::Long, {rows + 1});
  const int64_t* const offsets = data<const int64_t>(row_offsets);
  check(offsets[0] == 0 && std::is_sorted(offsets, offsets + rows + 1), "row_offsets", "ascending from 0");
  check_contiguous(col_indices, "col_indices", query, ScalarType::Int, {offsets[rows]});
  int32_t* const columns = data<int32_t>(col_indices);
  call.x.type() == ScalarType::Float ? list<float>(call, offsets, columns) : list<double>(call, offsets, columns);
}

}  // namespace
}  // namespace asa_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&asa_ops::cpu::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CPU, m) {
  m.impl("asa_cpu_fwd", TORCH_BOX(&asa_ops::cpu::asa_cpu_fwd));
  m.impl("asa_cpu_bwd", TORCH_BOX(&asa_ops::cpu::asa_cpu_bwd));
  m.impl("asa_cpu_neighbors", TORCH_BOX(&asa_ops::cpu::asa_cpu_neighbors));
}
