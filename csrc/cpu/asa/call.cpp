// asa_ops::asa_fwd, asa_bwd and asa_list_survivors on a CPU: checks, and the passes of a call in their order.

#include "../../asa.h"
#include "../isa.h"
#include "../workspace.h"
#include "factors.h"
#include "problem.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace asa_ops::cpu {

namespace {

template <class T>
const Kernels<T>& table() {
  return ASA_TABLE(T, kFloat, kDouble);
}

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

int64_t padded(int64_t dim) { return parts(dim, kPad) * kPad; }

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Type::half;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    default: STD_TORCH_CHECK(false, "asa_ops: tensors must be float16, bfloat16, float32 or float64");
  }
}

int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

template <class T>
bool is_type(Type type) {
  return type == of_type<T>(Type::float32, Type::float64);
}

// The numbers of image b and head h in a tensor [B, heads, ..].
const void* numbers_of(const Tensor& x, int64_t b, int64_t h) {
  const int64_t at = (x.size(0) > 1 ? b * x.stride(0) : 0) + (x.size(1) > 1 ? h * x.stride(1) : 0);
  return data<const char>(x, at * size_of(type_of(x)));
}

// Calls f(begin, end) for all of n rows, by the threads of a workspace.
template <class F>
void for_rows(int64_t n, const Workspace& workspace, const F& f) {
  constexpr int64_t kRowsAtATime = 256;
  run({0, parts(n, kRowsAtATime)}, workspace, [&](Queue& queue, void*) {
    for (int64_t part; queue.take(part);) f(part * kRowsAtATime, std::min(n, (part + 1) * kRowsAtATime));
  });
}

// Rows of one head as the kernels take them: contiguous numbers T, as many as a multiple of kPad each. Where those of
// the tensor are not, they are read into memory of the workspace.
template <class T>
class Tokens {
 public:
  // Rows that are not `real` are to be 0; null: all are real.
  Tokens(const Kernels<T>& kernels, Rows rows, int64_t n, const bool* real, Workspace& workspace, bool copied = false)
      : kernels_(kernels), rows_(rows), n_(n), padded_(padded(rows.dim)), real_(real) {
    const bool fits = is_type<T>(rows.type) && rows.dim == padded_ && (rows.stride_d == 1 || rows.dim == 0) &&
                      (rows.stride_n == padded_ || n <= 1);
    copied_ = copied || !fits || real != nullptr;
    copy_ = workspace.add<T>(copied_ ? n * padded_ : 0);
  }

  // Once the workspace has memory.
  const T* get(const Workspace& workspace) const {
    if (!copied_) return static_cast<const T*>(rows_.numbers);
    T* const to = copy_.get(workspace);
    for_rows(n_, workspace,
             [&](int64_t begin, int64_t end) { kernels_.read_rows(rows_, begin, end, padded_, real_, to); });
    return to;
  }

  bool is_copied() const { return copied_; }

 private:
  const Kernels<T>& kernels_;
  Rows rows_;
  int64_t n_, padded_;
  const bool* real_;
  bool copied_;
  Workspace::Piece<T> copy_;
};

// Room for rows that the kernels write: in the tensor, or, if it holds other numbers or sums of them, beside it.
template <class T>
class Written {
 public:
  // `sum`: over heads so far, [n, padded dim], and after finish() with these; null: the rows are of one head.
  Written(const Kernels<T>& kernels, Rows rows, int64_t n, Workspace& workspace, T* sum = nullptr)
      : kernels_(kernels), rows_(rows), n_(n), padded_(padded(rows.dim)), sum_(sum) {
    apart_ = sum != nullptr || !is_type<T>(rows.type) || rows.dim != padded_;
    room_ = workspace.add<T>(apart_ ? n * padded_ : 0);
  }

  T* get(const Workspace& workspace) const {
    return apart_ ? room_.get(workspace) : static_cast<T*>(const_cast<void*>(rows_.numbers));
  }

  void finish(const Workspace& workspace) const {
    if (!apart_) return;
    const T* const from = room_.get(workspace);
    for_rows(n_, workspace, [&](int64_t begin, int64_t end) {
      for (int64_t x = begin * padded_; sum_ != nullptr && x < end * padded_; ++x) sum_[x] += from[x];
      kernels_.write_rows(sum_ == nullptr ? from : sum_, begin, end, padded_, rows_);
    });
  }

 private:
  const Kernels<T>& kernels_;
  Rows rows_;
  int64_t n_, padded_;
  T* sum_;
  bool apart_;
  Workspace::Piece<T> room_;
};

// What forward, backward and neighbours have in common.
struct Call {
  Arguments x;
  Kept kept;

  explicit Call(Arguments arguments) : x(std::move(arguments)), kept(checked(x), words() * 8, 0, 0) {}

  // One head, but for tokens, thresholds and what is kept.
  template <class T>
  Problem<T> head(int64_t i, int64_t threads, const Outputs& saved) const {
    Problem<T> p{};
    p.n_q = x.n_q(), p.n_k = x.n_k(), p.dim = padded(x.dim()), p.dim_v = padded(x.dim_v());
    p.blocks_q = parts(p.n_q, kBlock), p.blocks_k = parts(p.n_k, kBlock);
    p.q_at_a_time = at_a_time(p.blocks_q, threads), p.k_at_a_time = at_a_time(p.blocks_k, threads);
    p.height = x.options.height, p.width = x.options.width, p.topk = x.options.topk;
    p.window = x.beta ? x.options.window : 0;
    p.scale = static_cast<T>(x.options.scale), p.band = static_cast<T>(x.options.band);
    p.reciprocal = x.options.reciprocal, p.thresholded = x.has_neighbours();
    const int64_t rows = i * p.n_q;
    p.lse = data<T>(saved.lse, rows), p.lse_kept = data<T>(saved.lse_kept, rows);
    p.survivors = data<int32_t>(saved.survivors, rows);
    p.n_real = p.n_k;
    if (x.real) {
      const bool* const real = data<const bool>(*x.real, i / x.heads() * p.n_k);
      p.n_real = std::count(real, real + p.n_k, true);
      if (p.n_real < p.n_k) p.real_k = real, p.real_q = p.n_q == p.n_k ? real : nullptr;
    }
    return p;
  }

  // The rows of a head in a tensor [B, heads or key heads, n, dim].
  Rows rows(const Tensor& tensor, int64_t i) const {
    return {numbers_of(tensor, i / x.heads(), i % x.heads() * tensor.size(1) / x.heads()), type_of(tensor),
            tensor.size(3), tensor.stride(2), tensor.stride(3)};
  }

  // Where the pieces of what is kept of a head lie in memory.
  template <class T>
  void set_kept(Problem<T>& p, char* memory) const {
    if (p.thresholded) p.bits = reinterpret_cast<uint64_t*>(memory + kept.bits);
    p.kappa = reinterpret_cast<T*>(memory + kept.kappa), p.log_mean = reinterpret_cast<T*>(memory + kept.log_mean);
    p.local = reinterpret_cast<bool*>(memory + kept.local);
  }

  // Fewer than kMostRows where threads would have nothing to do.
  static int64_t at_a_time(int64_t blocks, int64_t threads) {
    return blocks >= 16 * threads ? kMostRows : blocks >= 8 * threads ? kMostRows / 2 : kBlock;
  }

  int64_t words() const { return parts(x.n_q(), kBlock) * parts(x.n_k(), kBlock) * kBlock; }  // of bits

 private:
  static const Arguments& checked(const Arguments& x) {
    x.check_all();
    type_of(x.query);
    check(x.n_k() < INT32_MAX - 64 && x.n_q() < INT32_MAX - 64, "N", "below 2^31 - 65");
    return x;
  }
};

// The tokens and thresholds of one head.
template <class T>
class Inputs {
 public:
  // Reserves memory in the workspace.
  Inputs(const Call& call, const Kernels<T>& kernels, Problem<T>& p, int64_t i, Workspace& workspace)
      : kernels_(kernels), p_(p) {
    const Arguments& x = call.x;
    const int64_t b = i / x.heads(), h = i % x.heads();
    p.log_n_real = std::log(static_cast<double>(p.n_real));
    const Rows v = call.rows(x.value, i);
    q_.emplace(kernels, call.rows(x.query, i), p.n_q, p.real_q, workspace);
    k_.emplace(kernels, call.rows(x.key, i), p.n_k, p.real_k, workspace);
    v_.emplace(kernels, v, p.n_k, p.real_k, workspace);
    if (!v_->is_copied() && !kernels.all_finite(static_cast<const T*>(v.numbers), p.n_k * p.dim_v))
      v_.emplace(kernels, v, p.n_k, p.real_k, workspace, true);
    not_finite_ = workspace.add<bool>(v_->is_copied() ? p.n_k : 0);
    if (x.alpha) alpha_ = multiplier(*x.alpha, b, h), alpha_memory_ = workspace.add<T>(fits(*alpha_) ? 0 : p.n_q);
    if (x.beta) beta_ = multiplier(*x.beta, b, h), beta_memory_ = workspace.add<T>(fits(*beta_) ? 0 : p.n_q);
  }

  // Once the workspace has memory.
  void get(const Workspace& workspace) const {
    p_.q = q_->get(workspace), p_.k = k_->get(workspace), p_.v = v_->get(workspace);
    if (v_->is_copied() && !kernels_.all_finite(p_.v, p_.n_k * p_.dim_v))
      p_.not_finite = clear_not_finite(const_cast<T*>(p_.v), not_finite_.get(workspace));
    if (alpha_) p_.alpha = read(*alpha_, alpha_memory_.get(workspace));
    if (beta_) p_.beta = read(*beta_, beta_memory_.get(workspace));
  }

 private:
  static Rows multiplier(const Tensor& x, int64_t b, int64_t h) {
    return {numbers_of(x, b, h), type_of(x), 1, MultiplierStrides(x).row, 1};
  }

  static bool fits(const Rows& multiplier) { return is_type<T>(multiplier.type) && multiplier.stride_n == 1; }

  const T* read(const Rows& multiplier, T* to) const {
    if (fits(multiplier)) return static_cast<const T*>(multiplier.numbers);
    kernels_.read_rows(multiplier, 0, p_.n_q, 1, nullptr, to);
    return to;
  }

  // A value that is not finite is 0 in the sums of whole rows; only who keeps its key becomes NaN.
  const bool* clear_not_finite(T* v, bool* not_finite) const {
    for (int64_t j = 0; j < p_.n_k; ++j) {
      T* const row = v + j * p_.dim_v;
      not_finite[j] = !kernels_.all_finite(row, p_.dim_v);
      if (!not_finite[j]) continue;
      for (int64_t d = 0; d < p_.dim_v; ++d)
        if (!std::isfinite(row[d])) row[d] = 0;
    }
    return not_finite;
  }

  const Kernels<T>& kernels_;
  Problem<T>& p_;
  std::optional<Tokens<T>> q_, k_, v_;
  std::optional<Rows> alpha_, beta_;
  Workspace::Piece<T> alpha_memory_{}, beta_memory_{};
  Workspace::Piece<bool> not_finite_{};
};

// Asks for rows that will be read soon: small problems end before the processor has noticed how they lie.
void prefetch(const Rows& rows, int64_t n) {
  const int64_t size = size_of(rows.type), line = 64;
  for (int64_t i = 0; i < n; ++i) {
    const char* const row = static_cast<const char*>(rows.numbers) + i * rows.stride_n * size;
    for (int64_t x = 0; x < rows.dim * size; x += line) __builtin_prefetch(row + x, 0, 2);
  }
}

// Writes the outputs, and what is kept if it has memory.
template <class T>
void forward(const Call& call, const Outputs& outputs) {
  const auto& kernels = table<T>();
  char* const kept = data<char>(outputs.kept);
  const bool keep = outputs.kept.size(2) > 0;
  for_heads(call.x.n_heads(), [&](int64_t i, int64_t threads) {
    Problem<T> p = call.head<T>(i, threads, outputs);
    p.parts = parts_of(p, call.rows(call.x.query, i), call.rows(call.x.key, i));
    p.keeps = keep;
    Workspace workspace(threads);
    Inputs<T> inputs(call, kernels, p, i, workspace);
    const Written<T> out(kernels, call.rows(outputs.out, i), p.n_q, workspace);
    const auto memory = workspace.add<char>(keep ? 0 : call.kept.bytes);
    const bool one_block = p.is_one_block(), begins = p.thresholded && !one_block;
    const int64_t begun_rows = begins ? p.n_q : 0;
    const auto begun = workspace.add<bool>(begun_rows);
    const auto shift = workspace.add<T>(begun_rows), factor = workspace.add<T>(begun_rows);
    const auto mass = workspace.add<T>(begun_rows), squares = workspace.add<T>(begun_rows);
    const auto sizes = workspace.add<T>(begins ? p.blocks_k * kBlock : 0);
    const Panels<T> k_panels(kernels, p.n_k, p.dim, p.parts == 0, workspace);
    const Tiles<T> k_tiles(kernels, p.n_k, p.dim, p.parts, Tiled::columns, workspace);
    const Tiles<T> v_tiles(kernels, p.n_k, p.dim_v, one_block ? 0 : p.parts, Tiled::terms, workspace);
    workspace.add_share(one_block ? kernels.forward_block_bytes(p) : kernels.scan_bytes(p));
    workspace.add_share(one_block ? 0 : kernels.aggregate_bytes(p));
    workspace.allocate_all();
    call.set_kept(p, keep ? kept + i * call.kept.bytes : memory.get(workspace));
    if (keep) prefer_huge_pages(p.bits, p.thresholded ? call.words() * 8 : 0);
    inputs.get(workspace);
    if (one_block && i + 1 < call.x.n_heads()) {
      prefetch(call.rows(call.x.query, i + 1), p.n_q);
      for (const Tensor& x : {call.x.key, call.x.value}) prefetch(call.rows(x, i + 1), p.n_k);
    }
    p.out = out.get(workspace);
    if (begins) {
      std::fill_n(p.begun = begun.get(workspace), p.n_q, false);
      p.shift = shift.get(workspace), p.factor = factor.get(workspace);
      p.mass = mass.get(workspace), p.squares = squares.get(workspace);
      kernels.find_sizes(p.v, p.n_k, p.dim_v, p.sizes = sizes.get(workspace));
    }
    p.k_panels = k_panels.pack(p.k, workspace);
    p.k_tiles = k_tiles.pack(p.k, workspace), p.v_tiles = v_tiles.pack(p.v, workspace);
    if (one_block) return kernels.forward_block(p, workspace.share(0)), out.finish(workspace);
    if (p.scanned())
      run({0, p.blocks_q}, workspace, [&](Queue& queue, void* scratch) { kernels.scan(p, queue, scratch); });
    run({0, parts(p.n_q, p.q_at_a_time)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.aggregate(p, queue, scratch); });
    out.finish(workspace);
  });
}

// The gradient of a head's output as the passes take it.
template <class T>
class OutputGradient {
 public:
  OutputGradient(const Call& call, const Kernels<T>& kernels, const Problem<T>& p, int64_t i, const Tensor& d_out,
                 const Tensor& out, Workspace& workspace)
      : kernels_(kernels), p_(p), nan_rows_(std::make_unique<bool[]>(p.n_q)) {
    const Rows rows = call.rows(d_out, i);
    // What must not reach the sums is rare, and then a copy: the gradient of NaN, and what is not finite of a row
    // without survivors, whose output is constant.
    has_nan_ = kernels.find_nan(call.rows(out, i), 0, p.n_q, nan_rows_.get());
    d_out_.emplace(kernels, rows, p.n_q, p.real_q, workspace, has_nan_);
    const bool has_empty = std::count(p.survivors, p.survivors + p.n_q, 0) > 0;
    without_empty_ = workspace.add<T>(has_empty ? p.n_q * p.dim_v : 0);
    has_empty_ = has_empty;
  }

  // For the thresholds.
  const T* get(const Workspace& workspace) const {
    const T* const d_out = d_out_->get(workspace);
    for (int64_t i = 0; has_nan_ && i < p_.n_q; ++i)
      if (nan_rows_[i])
        std::fill_n(const_cast<T*>(d_out) + i * p_.dim_v, p_.dim_v, std::numeric_limits<T>::quiet_NaN());
    return d_out;
  }

  // For the tokens.
  const T* without_empty_rows(const T* d_out, const Workspace& workspace) const {
    if (!has_empty_ || kernels_.all_finite(d_out, p_.n_q * p_.dim_v)) return d_out;
    T* const x = without_empty_.get(workspace);
    std::copy_n(d_out, p_.n_q * p_.dim_v, x);
    for (int64_t i = 0; i < p_.n_q; ++i)
      if (p_.survivors[i] == 0 && !nan_rows_[i]) std::fill_n(x + i * p_.dim_v, p_.dim_v, T(0));
    return x;
  }

 private:
  const Kernels<T>& kernels_;
  const Problem<T>& p_;
  std::unique_ptr<bool[]> nan_rows_;
  std::optional<Tokens<T>> d_out_;
  Workspace::Piece<T> without_empty_;
  bool has_nan_, has_empty_;
};

// Bytes of survivors with their gradients that a backward holds at a time, for one head; kMostRows queries at least.
constexpr int64_t kSlabBytes = 16 * 1024 * 1024;

// What a backward pass writes; gradients of thresholds, [B, heads, N_q] numbers T, where they are asked for.
template <class T>
struct Gradients {
  Tensor dq, dk, dv;
  T *dalpha, *dbeta;
};

template <class T>
void find_groups(const Call& call, const Kernels<T>& kernels, const Problem<T>& p, int64_t threads,
                 const Groups& groups) {
  Workspace workspace(threads);
  workspace.add_share(kernels.find_groups_bytes(p));
  workspace.allocate_all();
  run({0, parts(p.n_q, p.q_at_a_time)}, workspace,
      [&](Queue& queue, void* scratch) { kernels.find_groups(p, groups, queue, scratch); });
  kernels.lay_out(p, groups);
}

// Sums up dq, dk, dv of head i slab by slab, then the gradients of the thresholds. dk_sum and dv_sum are those of the
// heads before it that share its keys; null: none do.
template <class T>
void backward_head(const Call& call, int64_t i, int64_t threads, const Tensor& d_out, const Outputs& saved,
                   const Gradients<T>& gradients, T* dk_sum, T* dv_sum) {
  const auto& kernels = table<T>();
  Problem<T> p = call.head<T>(i, threads, saved);
  check(std::all_of(p.survivors, p.survivors + p.n_q, [&](int32_t x) { return x >= 0 && x <= p.n_k; }), "survivors",
        "between 0 and N_k");
  call.set_kept(p, data<char>(saved.kept, i * call.kept.bytes));
  const Rows d_out_rows = call.rows(d_out, i);
  p.parts = parts_of(p, call.rows(call.x.query, i), call.rows(call.x.key, i), &d_out_rows);
  if (gradients.dalpha) p.dalpha = gradients.dalpha + i * p.n_q;
  if (gradients.dbeta) p.dbeta = gradients.dbeta + i * p.n_q;
  std::vector<int64_t> numbers(p.n_q + 1), columns_at(p.n_q + 1), ends;
  std::vector<int32_t> keys(p.n_q);
  std::vector<Kind> kinds(p.n_q);
  const Groups groups{kinds.data(), keys.data(), numbers.data(), columns_at.data()};
  find_groups(call, kernels, p, threads, groups);
  const bool any_whole = std::count(kinds.begin(), kinds.end(), Kind::whole) > 0;
  const int64_t row = (p.blocks_k + 1) * sizeof(int32_t);
  int64_t entries = 0, listed = 0, rows = 0;  // of the largest slab
  for (int64_t begin = 0, end; begin < p.n_q; begin = end) {
    const auto longer = [&] { return std::min(p.n_q, end + kMostRows); };
    const auto bytes = [&](int64_t to) {
      return (numbers[to] - numbers[begin]) * static_cast<int64_t>(2 * sizeof(T)) +
             (columns_at[to] - columns_at[begin]) * static_cast<int64_t>(sizeof(int32_t)) + (to - begin) * row;
    };
    end = begin;
    do end = longer();
    while (end < p.n_q && bytes(longer()) <= kSlabBytes);
    entries = std::max(entries, numbers[end] - numbers[begin]);
    listed = std::max(listed, columns_at[end] - columns_at[begin]);
    rows = std::max(rows, end - begin);
    ends.push_back(end);
  }
  p.q_at_a_time = std::min(p.q_at_a_time, Call::at_a_time(parts(rows, kBlock), threads));
  Workspace workspace(threads);
  Inputs<T> inputs(call, kernels, p, i, workspace);
  const OutputGradient<T> output(call, kernels, p, i, d_out, saved.out, workspace);
  const Written<T> dq(kernels, call.rows(gradients.dq, i), p.n_q, workspace);
  const Written<T> dk(kernels, call.rows(gradients.dk, i), p.n_k, workspace, dk_sum);
  const Written<T> dv(kernels, call.rows(gradients.dv, i), p.n_k, workspace, dv_sum);
  const bool any_panels = any_whole && p.parts == 0;
  const Panels<T> k_panels(kernels, p.n_k, p.dim, any_panels, workspace);
  const Panels<T> v_panels(kernels, p.n_k, p.dim_v, any_panels, workspace);
  const int64_t parts_of_whole = any_whole ? p.parts : 0;
  const Tiles<T> k_tiles(kernels, p.n_k, p.dim, parts_of_whole, Tiled::columns, workspace);
  const Tiles<T> v_tiles(kernels, p.n_k, p.dim_v, parts_of_whole, Tiled::columns, workspace);
  const Tiles<T> k_terms(kernels, p.n_k, p.dim, parts_of_whole, Tiled::terms, workspace);
  const Tiles<T> q_left(kernels, p.n_q, p.dim, parts_of_whole, Tiled::left_terms, workspace, kinds.data());
  const Tiles<T> d_out_left(kernels, p.n_q, p.dim_v, parts_of_whole, Tiled::left_terms, workspace, kinds.data());
  const auto delta = workspace.add<T>(p.n_q);
  const auto probability = workspace.add<T>(entries), ds = workspace.add<T>(entries);
  const auto columns = workspace.add<int32_t>(listed), starts = workspace.add<int32_t>((p.blocks_k + 1) * rows);
  workspace.add_share(kernels.backward_rows_bytes(p));
  workspace.add_share(kernels.backward_columns_bytes(p));
  if (p.dalpha || p.dbeta) workspace.add_share(kernels.backward_thresholds_bytes(p));
  workspace.allocate_all();
  inputs.get(workspace);
  const T* const all_rows = output.get(workspace);
  p.d_out = output.without_empty_rows(all_rows, workspace);
  p.dq = dq.get(workspace), p.dk = dk.get(workspace), p.dv = dv.get(workspace);
  std::fill_n(p.dk, p.n_k * p.dim, T(0));
  std::fill_n(p.dv, p.n_k * p.dim_v, T(0));
  p.delta = delta.get(workspace);
  p.k_panels = k_panels.pack(p.k, workspace), p.v_panels = v_panels.pack(p.v, workspace);
  p.k_tiles = k_tiles.pack(p.k, workspace), p.v_tiles = v_tiles.pack(p.v, workspace);
  p.k_terms = k_terms.pack(p.k, workspace);
  p.q_left = q_left.pack(p.q, workspace), p.d_out_left = d_out_left.pack(p.d_out, workspace);
  int64_t begin = 0;  // a multiple of kMostRows whatever the number of threads, which must not show in the sums
  for (const int64_t end : ends) {
    const Slab<T> slab{begin,
                       end,
                       groups,
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
  dq.finish(workspace), dk.finish(workspace), dv.finish(workspace);
  p.d_out = all_rows;
  if (p.dalpha || p.dbeta)
    run({0, p.blocks_q}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_thresholds(p, queue, scratch); });
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
  const Arguments& x = call.x;
  const bool learns = x.options.band > 0;
  std::vector<T> dalpha(x.alpha && learns ? x.n_heads() * x.n_q() : 0);
  std::vector<T> dbeta(x.beta && learns ? x.n_heads() * x.n_q() : 0);
  const auto room = [](std::vector<T>& rows) { return rows.empty() ? nullptr : rows.data(); };
  const Gradients<T> all{gradients[0], gradients[1], gradients[2], room(dalpha), room(dbeta)};
  // The heads that share keys one after the other.
  for_heads(x.n_heads() / x.group(), [&](int64_t key_head, int64_t threads) {
    const bool shared = x.group() > 1;
    std::vector<T> dk_sum(shared ? x.n_k() * padded(x.dim()) : 0), dv_sum(shared ? x.n_k() * padded(x.dim_v()) : 0);
    for (int64_t i = key_head * x.group(); i < (key_head + 1) * x.group(); ++i)
      backward_head(call, i, threads, d_out, saved, all, room(dk_sum), room(dv_sum));
  });
  if (!dalpha.empty()) sum_gradients(call, dalpha, gradients[3]);
  if (!dbeta.empty()) sum_gradients(call, dbeta, gradients[4]);
}

// Fills col_indices from what a forward pass kept; `offsets` are the sums of its survivors.
template <class T>
void list(const Call& call, const Outputs& saved, const int64_t* offsets, int32_t* col_indices) {
  const auto& kernels = table<T>();
  for_heads(call.x.n_heads(), [&](int64_t i, int64_t threads) {
    Problem<T> p = call.head<T>(i, threads, saved);
    Workspace workspace(threads);
    workspace.add_share(kernels.list_survivors_bytes(p));
    workspace.allocate_all();
    call.set_kept(p, data<char>(saved.kept, i * call.kept.bytes));
    run({0, parts(p.n_q, p.q_at_a_time)}, workspace, [&](Queue& queue, void* scratch) {
      kernels.list_survivors(p, offsets + i * p.n_q, col_indices, queue, scratch);
    });
  });
}

Call call_of(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& alpha, const Optional& beta,
             const Optional& real, const Options& options) {
  const bool copied = real && !real->is_contiguous();
  return Call({query, key, value, alpha, beta, copied ? torch::stable::contiguous(*real) : real, options});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> asa_fwd(
    Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional key_padding_mask,
    std::vector<int64_t> grid, std::vector<int64_t> window, int64_t topk, bool reciprocal, double scale, double band,
    bool keep, int64_t row_start, std::optional<int64_t> row_stop, Optional rows_statistics, bool) {
  check_rows(query, row_start, row_stop, rows_statistics);
  const Call call =
      call_of(query, key, value, alpha, beta, key_padding_mask, Options(grid, window, topk, reciprocal, scale, band));
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
    std::vector<int64_t> window, int64_t topk, bool reciprocal, double scale, double band, int64_t row_start,
    std::optional<int64_t> row_stop, Optional rows_statistics, bool) {
  check_rows(query, row_start, row_stop, rows_statistics);
  const Call call =
      call_of(query, key, value, alpha, beta, key_padding_mask, Options(grid, window, topk, reciprocal, scale, band));
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
                        Tensor kept, std::vector<int64_t> grid, std::vector<int64_t> window, int64_t topk,
                        bool reciprocal, double scale, double band, Tensor row_offsets, Tensor col_indices) {
  const Call call =
      call_of(query, key, value, alpha, beta, key_padding_mask, Options(grid, window, topk, reciprocal, scale, band));
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  const int64_t rows = call.x.n_heads() * call.x.n_q();
  call.x.check_saved(saved, call.kept.bytes);
  check_contiguous(row_offsets, "row_offsets", query, ScalarType::Long, {rows + 1});
  const int64_t* const offsets = data<const int64_t>(row_offsets);
  check(offsets[0] == 0 && std::is_sorted(offsets, offsets + rows + 1), "row_offsets", "ascending from 0");
  check_contiguous(col_indices, "col_indices", query, ScalarType::Int, {offsets[rows]});
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
