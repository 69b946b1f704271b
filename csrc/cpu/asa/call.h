// What the ops of adaptive sparse attention have in common on a CPU: the tensors of a call, head by head, as passes take
// them.
#pragma once

#include "../../asa.h"
#include "../isa.h"
#include "../workspace.h"
#include "factors.h"
#include "problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

namespace asa_ops::cpu {

template <class T>
const Kernels<T>& table() {
  return ASA_TABLE(T, kFloat, kDouble);
}

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
int64_t padded(const Kernels<T>& kernels, int64_t dim) {
  return parts(dim, kernels.pad) * kernels.pad;
}

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Type::half;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    default: STD_TORCH_CHECK(false, "asa_ops: tensors must be float16, bfloat16, float32 or float64");
  }
}

inline int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

template <class T>
bool is_type(Type type) {
  return type == of_type<T>(Type::float32, Type::float64);
}

// The numbers of image b and head h in a tensor [B, heads, ..].
inline const void* numbers_of(const Tensor& x, int64_t b, int64_t h) {
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

// Rows of one head as the kernels take them: contiguous numbers T, of a padded head dim. Where those of the tensor are not,
// they are read into memory of the workspace.
template <class T>
class Tokens {
 public:
  // Rows that are not `real` are to be 0; null: all are real.
  Tokens(const Kernels<T>& kernels, Rows rows, int64_t n, const bool* real, Workspace& workspace, bool copied = false)
      : kernels_(kernels), rows_(rows), n_(n), padded_(padded(kernels, rows.dim)), real_(real) {
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
      : kernels_(kernels), rows_(rows), n_(n), padded_(padded(kernels, rows.dim)), sum_(sum) {
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

// Consecutive rows or columns, from the beginning of a block to that of another, or to the end of all n.
struct Range {
  int64_t begin, end;

  void check(const char* name, int64_t n) const {
    const bool whole_blocks = begin % kBlock == 0 && (end % kBlock == 0 || end == n);
    asa_ops::check(0 <= begin && begin <= end && end <= n && whole_blocks, name, "a range of whole blocks of 64");
  }
};

// Where row 0 would be, of rows from the `first` on; null if there are none.
template <class U>
U* row_zero(U* rows, int64_t first) {
  return rows == nullptr ? nullptr : rows - first;
}

// What forward, backward and neighbours have in common.
struct Call {
  Arguments x;
  Range rows;  // of queries that are computed here
  Kept kept;

  explicit Call(Arguments arguments, std::optional<Range> some = {})
      : x(std::move(arguments)), rows(checked(x, some)), kept(x, rows.end - rows.begin, words() * 8, 0, 0) {}

  // One head, but for tokens, thresholds and what passes read and write.
  template <class T>
  Problem<T> head(int64_t i, int64_t threads) const {
    const Kernels<T>& kernels = table<T>();
    Problem<T> p{};
    p.n_q = x.n_q(), p.n_k = x.n_k(), p.dim = padded(kernels, x.dim()), p.dim_v = padded(kernels, x.dim_v());
    p.blocks_q = parts(p.n_q, kBlock), p.blocks_k = parts(p.n_k, kBlock);
    p.begin = rows.begin, p.end = rows.end;
    p.q_at_a_time = at_a_time(parts(p.end - p.begin, kBlock), threads);
    p.k_at_a_time = at_a_time(p.blocks_k, threads);
    p.depth = x.options.depth, p.height = x.options.height, p.width = x.options.width, p.topk = x.options.topk;
    std::copy_n(x.options.window, 3, p.window);
    p.extra = x.options.extra;
    p.positions = x.positions();
    p.scale = static_cast<T>(x.options.scale), p.band = static_cast<T>(x.options.band);
    p.reciprocal = x.options.reciprocal, p.thresholded = x.has_neighbours();
    p.n_real = p.n_k;
    if (x.real) {
      const bool* const real = data<const bool>(*x.real, i / x.heads() * p.n_k);
      p.n_real = std::count(real, real + p.n_k, true);
      if (p.n_real < p.n_k) p.real_k = real, p.real_q = p.n_q == p.n_k ? real : nullptr;
    }
    return p;
  }

  // The numbers of head i in a tensor [B, heads, n], which are those of the rows from `first` on: where row 0 would be.
  template <class U>
  static U* of_head(const Tensor& x, int64_t i, int64_t first) {
    return row_zero(data<U>(x, i * x.size(2)), first);
  }

  // The rows of a head in a tensor [B, heads or key heads, n, dim].
  Rows tokens(const Tensor& tensor, int64_t i) const {
    return {numbers_of(tensor, i / x.heads(), i % x.heads() * tensor.size(1) / x.heads()), type_of(tensor),
            tensor.size(3), tensor.stride(2), tensor.stride(3)};
  }

  // Where the pieces of what is kept of a head lie in memory.
  template <class T>
  void set_kept(Problem<T>& p, char* memory) const {
    if (p.thresholded) p.bits = reinterpret_cast<uint64_t*>(memory + kept.bits);
    p.back = p.bits, p.back_stride = p.blocks_k * kBlock;
    p.kappa = reinterpret_cast<T*>(memory + kept.kappa) - p.begin;
    p.log_mean = reinterpret_cast<T*>(memory + kept.log_mean) - p.begin;
    p.local = reinterpret_cast<bool*>(memory + kept.local) - p.begin * p.positions;
  }

  // Fewer than kMostRows where threads would have nothing to do.
  static int64_t at_a_time(int64_t blocks, int64_t threads) {
    return blocks >= 16 * threads ? kMostRows : blocks >= 8 * threads ? kMostRows / 2 : kBlock;
  }

  int64_t words() const { return parts(rows.end - rows.begin, kBlock) * parts(x.n_k(), kBlock) * kBlock; }  // of bits

 private:
  static Range checked(const Arguments& x, const std::optional<Range>& some) {
    x.check_all();
    type_of(x.query);
    check(x.n_k() < INT32_MAX - 64 && x.n_q() < INT32_MAX - 64, "N", "below 2^31 - 65");
    if (some) some->check("rows", x.n_q());
    return some.value_or(Range{0, x.n_q()});
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
    const Rows v = call.tokens(x.value, i);
    q_.emplace(kernels, call.tokens(x.query, i), p.n_q, p.real_q, workspace);
    k_.emplace(kernels, call.tokens(x.key, i), p.n_k, p.real_k, workspace);
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
inline void prefetch(const Rows& rows, int64_t n) {
  const int64_t size = size_of(rows.type), line = 64;
  for (int64_t i = 0; i < n; ++i) {
    const char* const row = static_cast<const char*>(rows.numbers) + i * rows.stride_n * size;
    for (int64_t x = 0; x < rows.dim * size; x += line) __builtin_prefetch(row + x, 0, 2);
  }
}

// The gradient of a head's output as the passes take it.
template <class T>
class OutputGradient {
 public:
  // Either an output or, where all of it is not here, `nan_rows` [B, heads, N_q] say which rows of the output hold a NaN.
  OutputGradient(const Call& call, const Kernels<T>& kernels, const Problem<T>& p, int64_t i, const Tensor& d_out,
                 const Optional& out, const Optional& nan_rows, Workspace& workspace)
      : kernels_(kernels), p_(p), nan_rows_(std::make_unique<bool[]>(p.n_q)) {
    const Rows rows = call.tokens(d_out, i);
    // What must not reach the sums is rare, and then a copy: the gradient of NaN, and what is not finite of a row
    // without survivors, whose output is constant.
    if (nan_rows) std::copy_n(data<const bool>(*nan_rows, i * p.n_q), p.n_q, nan_rows_.get());
    has_nan_ = nan_rows ? std::count(nan_rows_.get(), nan_rows_.get() + p.n_q, true) > 0
                        : kernels.find_nan(call.tokens(*out, i), 0, p.n_q, nan_rows_.get());
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

// Checks a graph that has room for survivors of so many rows; returns where the rows begin.
inline const int64_t* check_graph(const Tensor& row_offsets, const Tensor& col_indices, const Tensor& query,
                                  int64_t rows) {
  check_contiguous(row_offsets, "row_offsets", query, ScalarType::Long, {rows + 1});
  const int64_t* const offsets = data<const int64_t>(row_offsets);
  check(offsets[0] == 0 && std::is_sorted(offsets, offsets + rows + 1), "row_offsets", "ascending from 0");
  check_contiguous(col_indices, "col_indices", query, ScalarType::Int, {offsets[rows]});
  return offsets;
}

inline Call call_of(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& alpha,
                    const Optional& beta, const Optional& real, const Options& options,
                    std::optional<Range> rows = {}) {
  const bool copied = real && !real->is_contiguous();
  return Call({query, key, value, alpha, beta, copied ? torch::stable::contiguous(*real) : real, options}, rows);
}

}  // namespace asa_ops::cpu
