// What the ops of adaptive sparse attention are given on every device, and the checks that hold there.
#pragma once

#include "checks.h"

#include <cmath>
#include <utility>

namespace asa_ops {

// The scalars of a call. An op takes them as one list, which asa_ops.asa.types.Options.numbers writes in this order.
struct Options {
  int64_t height, width;  // of the map; 0, 0: none
  int64_t window;  // side of the local window
  int64_t topk;  // 0: none
  bool reciprocal;
  double scale;
  double band;  // half width of the window in which thresholds learn; 0: they do not

  explicit Options(const std::vector<double>& numbers) {
    check(numbers.size() == 7, "options", "height, width, window, topk, reciprocal, scale and band");
    const auto whole = [&](int i, const char* name) {
      check(numbers[i] >= 0 && numbers[i] <= 0x1p53 && numbers[i] == std::floor(numbers[i]), name,
            "a whole number of at least 0");
      return static_cast<int64_t>(numbers[i]);
    };
    height = whole(0, "height"), width = whole(1, "width"), window = whole(2, "window"), topk = whole(3, "topk");
    check(window % 2 == 1, "window", "odd");
    check(numbers[4] == 0 || numbers[4] == 1, "reciprocal", "0 or 1");
    reciprocal = numbers[4] == 1, scale = numbers[5], band = numbers[6];
    check(band >= 0, "band", "at least 0");
  }
};

// What a forward pass writes: the fields of asa_ops.asa.types.Saved, in its order.
struct SavedTensors {
  Tensor out, lse, lse_kept, survivors, kappa, log_mean, bits, local, residual, base2;

  static SavedTensors from(const std::vector<Tensor>& x) {
    check(x.size() == 10, "saved", "the ten tensors of Saved");
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9]};
  }
};

// What all ops are given.
struct Arguments {
  Tensor query, key, value;  // [B, heads, N_q, D], [B, heads, N_k, D], [B, heads, N_k, Dv]
  Optional alpha, beta;  // per query; each device checks its own form
  Optional real;  // bool [B, N_k]: false at padding
  Options options;
  SavedTensors saved;

  int64_t batch() const { return query.size(0); }
  int64_t heads() const { return query.size(1); }
  int64_t n_q() const { return query.size(2); }
  int64_t n_k() const { return key.size(2); }
  int64_t dim() const { return query.size(3); }
  int64_t dim_v() const { return value.size(3); }
  ScalarType type() const { return query.scalar_type(); }

  // Whether keys have places on a map; in doubles, which do not overflow.
  bool is_map() const { return static_cast<double>(options.height) * static_cast<double>(options.width) == n_k(); }

  // Whether there are adaptive neighbours. Otherwise all keys are neighbours, or none if there is a beta.
  bool has_neighbours() const { return alpha || options.topk > 0; }

  // Positions of the local window; 0: none.
  int64_t positions() const { return beta ? options.window * options.window : 0; }

  // A forward pass that no backward follows does not keep its bits.
  bool keeps_bits() const { return saved.bits.size(3) > 0; }

  // Checks what is the same on every device but for the type of statistics; alpha, beta, out, bits, residual and base2
  // are not.
  void check_all(ScalarType statistics) const {
    const int64_t b = batch(), h = heads();
    for (const auto& [x, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}})
      check(x->dim() == 4, name, "[B, heads, N, D]");
    check(key, "key", query, type(), {b, h, n_k(), dim()});
    check(value, "value", query, type(), {b, h, n_k(), dim_v()});
    if (real) check_contiguous(*real, "real", query, ScalarType::Bool, {b, n_k()});
    const bool one_map = n_q() == n_k();
    check(one_map || !options.reciprocal || !has_neighbours(), "N", "that of keys if neighbours must be mutual");
    check(!beta || (one_map && is_map()), "height * width", "N, of query and key");
    check(!beta || options.window <= 46339, "window", "of less than 2^31 positions");
    for (const auto& [x, name] : {std::pair{&saved.lse, "lse"},
                                  {&saved.lse_kept, "lse_kept"},
                                  {&saved.kappa, "kappa"},
                                  {&saved.log_mean, "log_mean"}})
      check_contiguous(*x, name, query, statistics, {b, h, n_q()});
    check_contiguous(saved.survivors, "survivors", query, ScalarType::Int, {b, h, n_q()});
    check_contiguous(saved.local, "local", query, ScalarType::Bool, {b, h, n_q(), positions()});
    check(saved.bits.dim() == 4, "bits", "[B, heads, strips, bytes]");
  }

  void check_bits_kept() const {
    check(!has_neighbours() || keeps_bits() || n_k() == 0, "bits", "those of a forward pass that kept them");
  }
};

// What a backward pass writes; gradients of thresholds where they are asked for.
struct Gradients {
  Tensor dq, dk, dv;
  Optional dalpha, dbeta;

  void check_all(const Arguments& x, ScalarType statistics) const {
    const int64_t b = x.batch(), h = x.heads();
    check_contiguous(dq, "dq", x.query, x.type(), {b, h, x.n_q(), x.dim()});
    check_contiguous(dk, "dk", x.query, x.type(), {b, h, x.n_k(), x.dim()});
    check_contiguous(dv, "dv", x.query, x.type(), {b, h, x.n_k(), x.dim_v()});
    for (const auto& [dx, name] : {std::pair{&dalpha, "dalpha"}, {&dbeta, "dbeta"}})
      if (*dx) check_contiguous(**dx, name, x.query, statistics, {b, h, x.n_q()});
    check((!dalpha || x.alpha) && (!dbeta || x.beta), "dalpha and dbeta", "given with alpha and beta only");
    check((!dalpha && !dbeta) || x.options.band > 0, "band", "positive where a threshold learns");
  }
};

}  // namespace asa_ops
