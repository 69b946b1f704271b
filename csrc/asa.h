// What the ops of adaptive sparse attention are given on every device, the checks that hold there, and what they keep.
#pragma once

#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

namespace asa_ops {

// The schemas of the ops; asa_ops.asa.ops describes the arguments, and has the same for implementations in Python.
#define ASA_INPUTS "Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? beta, Tensor? key_padding_mask, "
#define ASA_OPTIONS "SymInt[] grid, SymInt[] window, SymInt extra_tokens, SymInt topk, bool reciprocal, float scale, "
#define ASA_PRECISION "bool tf32=False"
#define ASA_OUTPUTS "Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kept"
constexpr const char* kForwardSchema =
    "(" ASA_INPUTS ASA_OPTIONS "float band, bool keep, " ASA_PRECISION ") -> (" ASA_OUTPUTS ")";
constexpr const char* kBackwardSchema =
    "(Tensor grad_out, " ASA_INPUTS ASA_OUTPUTS ", " ASA_OPTIONS "float band, " ASA_PRECISION
    ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha, Tensor dbeta)";
constexpr const char* kListSurvivorsSchema =
    "(" ASA_INPUTS ASA_OUTPUTS ", " ASA_OPTIONS "float band, Tensor row_offsets, Tensor(a!) col_indices) -> ()";

// The arguments of a call that are no tensors.
struct Options {
  int64_t depth = 0, height = 0, width = 0;  // of the grid, sides of 1 before those that it has; a product of 0: none
  int64_t window[3] = {1, 1, 1};  // sides of the local window
  int64_t extra;  // tokens before those of the grid, which keep everybody and are kept by everybody
  int64_t topk;  // 0: none
  bool reciprocal;
  double scale;
  double band;  // half width of the window in which thresholds learn; 0: they do not

  Options(const std::vector<int64_t>& grid, const std::vector<int64_t>& sides, int64_t extra, int64_t topk,
          bool reciprocal, double scale, double band)
      : extra(extra), topk(topk), reciprocal(reciprocal), scale(scale), band(band) {
    check(grid.size() <= 3, "grid", "[L], [H, W], [T, H, W] or []");
    check(grid.empty() || sides.size() == grid.size(), "window", "one odd side for each of the grid");
    for (const int64_t side : grid) check(side >= 0 && side <= INT32_MAX, "grid", "of sides from 0 to 2^31 - 1");
    for (const int64_t side : sides) check(side > 0 && side % 2 == 1, "window", "of odd sides");
    if (!grid.empty()) {
      int64_t* const of_grid[] = {&depth, &height, &width};
      const int64_t none = 3 - static_cast<int64_t>(grid.size());
      for (int64_t i = 0; i < 3; ++i) {
        *of_grid[i] = i < none ? 1 : grid[i - none];
        // A window wider than the grid is the grid.
        if (i >= none) window[i] = std::min(sides[i - none], std::max<int64_t>(2 * grid[i - none] - 1, 1));
      }
    }
    check(extra >= 0, "extra_tokens", "at least 0");
    check(topk >= 0, "topk", "at least 0");
    check(band >= 0, "band", "at least 0");
  }
};

// The outputs of a forward pass that a backward reads.
struct Outputs {
  Tensor out, lse, lse_kept, survivors, kept;
};

// What all ops are given.
struct Arguments {
  Tensor query, key, value;  // [B, heads, N_q, D], [B, key heads, N_k, D], [B, key heads, N_k, Dv]
  Optional alpha, beta;  // [B or 1, heads or 1, N_q or 1], of the dtype of query or float32
  Optional real;  // bool [B, N_k]: false at padding
  Options options;

  int64_t batch() const { return query.size(0); }
  int64_t heads() const { return query.size(1); }
  int64_t key_heads() const { return key.size(1); }
  int64_t group() const { return key_heads() == 0 ? 1 : heads() / key_heads(); }  // query heads that share a key head
  int64_t n_q() const { return query.size(2); }
  int64_t n_k() const { return key.size(2); }
  int64_t dim() const { return query.size(3); }
  int64_t dim_v() const { return value.size(3); }
  int64_t n_heads() const { return batch() * heads(); }  // of all images
  ScalarType type() const { return query.scalar_type(); }
  ScalarType statistics() const { return type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  // Whether keys, but for extra tokens, have places on a grid; in doubles, which do not overflow.
  bool is_map() const {
    double n = 1;
    for (const int64_t side : {options.depth, options.height, options.width}) n *= static_cast<double>(side);
    return n == static_cast<double>(n_k() - options.extra);
  }

  // Whether there are adaptive neighbours. Otherwise all keys are neighbours, or none if there is a beta.
  bool has_neighbours() const { return alpha || options.topk > 0; }

  // Positions of the local window; 0: none.
  int64_t positions() const { return beta ? options.window[0] * options.window[1] * options.window[2] : 0; }

  // Whether there is nothing to compute.
  bool is_empty() const { return n_heads() * n_q() == 0 || n_k() == 0; }

  // Checks what is the same on every device.
  void check_all() const {
    for (const auto& [x, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}})
      check(x->dim() == 4, name, "[B, heads, N, D]");
    const int64_t b = batch(), h = heads();
    check(h == key_heads() || (key_heads() > 0 && h % key_heads() == 0), "heads of query",
          "a multiple of those of key");
    check(key, "key", query, type(), {b, key_heads(), n_k(), dim()});
    check(value, "value", query, type(), {b, key_heads(), n_k(), dim_v()});
    check(dim() > 0, "D", "at least 1");
    check_threshold(alpha, "alpha");
    check_threshold(beta, "beta");
    if (real) check(*real, "key_padding_mask", query, ScalarType::Bool, {b, n_k()});
    const bool one_map = n_q() == n_k();
    check(one_map || !options.reciprocal || !has_neighbours(), "N", "that of keys if neighbours must be mutual");
    const int64_t extra = options.extra;
    check(extra <= n_k() && (extra == 0 || one_map), "extra_tokens", "at most N, of as many queries as keys");
    check(extra == 0 || !beta || has_neighbours(), "alpha", "given, with a beta and extra tokens");
    check(!beta || (one_map && is_map()), "grid", "of N positions, those of query and key without extra tokens");
    double positions = 1;
    for (const int64_t side : options.window) positions *= static_cast<double>(side);
    check(!beta || positions <= INT32_MAX, "window", "of less than 2^31 positions");
    check(options.topk <= n_k(), "topk", "between 0 and N_k");
  }

  // Checks what a forward pass returned, that keeps `bytes` of a head.
  void check_saved(const Outputs& saved, int64_t bytes) const {
    const int64_t b = batch(), h = heads();
    check_contiguous(saved.out, "out", query, type(), {b, h, n_q(), dim_v()});
    for (const auto& [x, name] : {std::pair{&saved.lse, "lse"}, {&saved.lse_kept, "lse_kept"}})
      check_contiguous(*x, name, query, statistics(), {b, h, n_q()});
    check_contiguous(saved.survivors, "survivors", query, ScalarType::Int, {b, h, n_q()});
    if (is_empty()) return;
    check(saved.kept.dim() != 3 || saved.kept.size(2) > 0 || bytes == 0, "kept",
          "what a forward pass kept: this one ran with keep=False, so it has no backward");
    check_contiguous(saved.kept, "kept", query, ScalarType::Byte, {b, h, bytes});
  }

  // Allocates what a forward returns; `bytes` of a head are kept.
  Outputs new_outputs(int64_t bytes) const {
    const auto make = [&](std::initializer_list<int64_t> shape, ScalarType of) {
      return torch::stable::new_empty(query, shape, of);
    };
    const auto rows = {batch(), heads(), n_q()};
    return {make({batch(), heads(), n_q(), dim_v()}, type()), make(rows, statistics()), make(rows, statistics()),
            make(rows, ScalarType::Int), make({batch(), heads(), bytes}, ScalarType::Byte)};
  }

  // Writes the outputs of queries that have nobody to attend to.
  static void clear(Outputs outputs) {
    torch::stable::zero_(outputs.out), torch::stable::zero_(outputs.survivors);
    for (Tensor* const x : {&outputs.lse, &outputs.lse_kept}) torch::stable::fill_(*x, -INFINITY);
  }

  // Allocates the gradients of query, key, value, alpha, beta: 0 where nothing will write them, and no number where
  // there is no such argument.
  std::vector<Tensor> new_gradients() const {
    std::vector<Tensor> gradients;
    for (const Tensor& x : {query, key, value}) gradients.push_back(new_gradient(x, !is_empty()));
    for (const Optional& x : {alpha, beta})
      gradients.push_back(x ? new_gradient(*x, !is_empty() && options.band > 0)
                            : torch::stable::new_empty(query, {batch(), 0, 0}));
    return gradients;
  }

  // A gradient: 0 unless something will write it.
  static Tensor new_gradient(const Tensor& x, bool written) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
    return written ? torch::stable::new_empty(x, shape) : torch::stable::new_zeros(x, shape);
  }

 private:
  void check_threshold(const Optional& x, const char* name) const {
    if (!x) return;
    const int64_t shape[] = {batch(), heads(), n_q()};
    check(x->dim() == 3, name, "[B, heads, N_q]");
    for (int i = 0; i < 3; ++i) check(x->size(i) == shape[i] || x->size(i) == 1, name, "[B, heads, N_q], or 1 of each");
    check_device(*x, name, query);
    check(x->scalar_type() == type() || x->scalar_type() == ScalarType::Float, name, "of query's dtype or float32");
  }
};

// The strides of a threshold multiplier over images, heads and rows; 0 where it is the same for all.
struct MultiplierStrides {
  int64_t image = 0, head = 0, row = 0;
  MultiplierStrides() = default;
  explicit MultiplierStrides(const Tensor& x)
      : image(x.size(0) > 1 ? x.stride(0) : 0),
        head(x.size(1) > 1 ? x.stride(1) : 0),
        row(x.size(2) > 1 ? x.stride(2) : 0) {}
};

// Where the pieces of what is kept of one head begin, in bytes. asa_ops.asa.types.kept_bytes is the same in Python.
struct Kept {
  int64_t bits, kappa, log_mean, local, residual, base2, bytes = 0;

  // Of n rows; `bits`, `residual` and `base2` take as many bytes as a device says.
  Kept(const Arguments& x, int64_t n, int64_t bits, int64_t residual, int64_t base2) {
    const int64_t statistic = x.type() == ScalarType::Double ? 8 : 4;
    this->bits = piece(x.has_neighbours() ? bits : 0);
    kappa = piece(x.options.topk > 0 ? n * statistic : 0);
    log_mean = piece(x.beta ? n * statistic : 0);
    local = piece(n * x.positions());
    this->residual = piece(residual);
    this->base2 = piece(base2);
  }

 private:
  int64_t piece(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 127) / 128 * 128;
    return at;
  }
};

}  // namespace asa_ops
