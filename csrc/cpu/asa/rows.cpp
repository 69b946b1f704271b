// The ops that compute some rows of a problem on a CPU, for one of several processes that share it: each scans its rows
// against all keys; has A of its columns from the others (`back`); aggregates; and in the backward sums dq of its rows, then
// dk and dv of its columns, for which it forms the probabilities of their pairs again. Every sum has the terms of one
// process, in its order.
//
// Tensors of all rows have N_q of them, others the n of [rows[0], rows[1]). Words of bits are [B, heads, blocks of rows,
// blocks of keys, 64]; `begun` is [B, heads, n, numbers].

#include "passes.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace asa_ops::cpu {

namespace {

Range range_of(const std::vector<int64_t>& x) {
  check(x.size() == 2, "rows", "two numbers");
  return {x[0], x[1]};
}

int64_t blocks_of(Range x) { return parts(x.end - x.begin, kBlock); }

// What the ops are given of the passes before.
struct Given {
  const Call& call;
  Range rows = call.rows;

  int64_t n() const { return rows.end - rows.begin; }

  void check_rows(const Tensor& x, const char* name, int64_t n, ScalarType type) const {
    check_contiguous(x, name, call.x.query, type, {call.x.batch(), call.x.heads(), n});
  }
  void check_statistic(const Tensor& x, const char* name, int64_t n) const {
    check_rows(x, name, n, call.x.statistics());
  }
  void check_words(const Tensor& x, const char* name, int64_t blocks_q, int64_t blocks_k) const {
    check_contiguous(x, name, call.x.query, ScalarType::Long,
                     {call.x.batch(), call.x.heads(), blocks_q, blocks_k, kBlock});
  }
  void check_local(const Tensor& x, int64_t n) const {
    check_contiguous(x, "local", call.x.query, ScalarType::Bool,
                     {call.x.batch(), call.x.heads(), n, call.x.positions()});
  }
};

uint64_t* words_of_head(const Tensor& x, int64_t i) {
  return reinterpret_cast<uint64_t*>(data<int64_t>(x, i * x.size(2) * x.size(3) * kBlock));
}

bool* local_of_head(const Tensor& x, int64_t i, int64_t first) {
  return row_zero(data<bool>(x, i * x.size(2) * x.size(3)), first * x.size(3));
}

int64_t begun_width(const Arguments& x) {
  return kBegunNumbers + padded(table<float>(), x.dim_v());  // of either type
}

int64_t begun_rows(const Call& call) { return call.x.has_neighbours() ? call.rows.end - call.rows.begin : 0; }

template <class T>
T* begun_of_head(const Tensor& begun, int64_t i) {
  return data<T>(begun, i * begun.size(2) * begun.size(3));
}

// What scan() found: A and L of the rows, and of these what thresholds go by.
struct Found {
  Tensor bits, kappa, log_mean, local;

  static Found make(const Call& call) {
    const Arguments& x = call.x;
    const int64_t n = call.rows.end - call.rows.begin;
    const auto make = [&](std::initializer_list<int64_t> shape, ScalarType type) {
      return torch::stable::new_empty(x.query, shape, type);
    };
    const int64_t blocks = x.has_neighbours() ? blocks_of(call.rows) : 0;
    return {make({x.batch(), x.heads(), blocks, parts(x.n_k(), kBlock), kBlock}, ScalarType::Long),
            make({x.batch(), x.heads(), x.options.topk > 0 ? n : 0}, x.statistics()),
            make({x.batch(), x.heads(), x.beta ? n : 0}, x.statistics()),
            make({x.batch(), x.heads(), n, x.positions()}, ScalarType::Bool)};
  }

  void check(const Call& call, const Optional& back) const {
    check_but_local(call, back);
    Given{call}.check_local(local, call.rows.end - call.rows.begin);
  }

  void check_but_local(const Call& call, const Optional& back) const {
    const Given given{call};
    const Arguments& x = call.x;
    const bool mutual = x.has_neighbours() && x.options.reciprocal;
    given.check_words(bits, "bits", x.has_neighbours() ? blocks_of(call.rows) : 0, parts(x.n_k(), kBlock));
    given.check_statistic(kappa, "kappa", x.options.topk > 0 ? given.n() : 0);
    given.check_statistic(log_mean, "log_mean", x.beta ? given.n() : 0);
    asa_ops::check(!mutual || back, "back", "given where neighbours must be mutual");
    if (back) given.check_words(*back, "back", parts(x.n_q(), kBlock), blocks_of(call.rows));
  }

  template <class T>
  void set(Problem<T>& p, int64_t i, const Optional& back) const {
    p.keeps = true;
    p.bits = words_of_head(bits, i);
    if (back) p.back = words_of_head(*back, i), p.back_stride = back->size(3) * kBlock;
    p.kappa = Call::of_head<T>(kappa, i, p.begin), p.log_mean = Call::of_head<T>(log_mean, i, p.begin);
    p.local = local_of_head(local, i, p.begin);
  }
};

// Calls f(T{}) for the type in which a call computes.
template <class F>
void by_type(const Call& call, const F& f) {
  if (call.x.type() == ScalarType::Double)
    f(double{});
  else
    f(float{});
}

Call call_of_rows(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& alpha,
                  const Optional& beta, const Optional& real, const std::vector<int64_t>& grid,
                  const std::vector<int64_t>& window, int64_t extra_tokens, int64_t topk, bool reciprocal, double scale,
                  double band, const std::vector<int64_t>& rows) {
  Call call = call_of(query, key, value, alpha, beta, real,
                      Options(grid, window, extra_tokens, topk, reciprocal, scale, band), range_of(rows));
  check(!call.x.is_empty(), "N", "at least 1");
  check(call.x.n_q() > kBlock || call.x.n_k() > kBlock, "N", "of more than one block: that is for one process");
  return call;
}

using Sides = std::vector<int64_t>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan(Tensor query, Tensor key, Tensor value, Optional alpha,
                                                                Optional beta, Optional real, Sides grid, Sides window,
                                                                int64_t extra_tokens, int64_t topk, bool reciprocal,
                                                                double scale, Sides rows) {
  const Call call =
      call_of_rows(query, key, value, alpha, beta, real, grid, window, extra_tokens, topk, reciprocal, scale, 0, rows);
  const Arguments& x = call.x;
  const Found found = Found::make(call);
  const Tensor lse =
      torch::stable::new_empty(query, {x.batch(), x.heads(), call.rows.end - call.rows.begin}, x.statistics());
  const Tensor begun =
      torch::stable::new_empty(query, {x.batch(), x.heads(), begun_rows(call), begun_width(x)}, x.statistics());
  by_type(call, [&](auto number) {
    using T = decltype(number);
    for_heads(x.n_heads(), [&](int64_t i, int64_t threads) {
      Problem<T> p = call.head<T>(i, threads);
      p.lse = Call::of_head<T>(lse, i, p.begin);
      found.set(p, i, {});
      forward_head<T>(call, p, i, threads, {}, {true, false, begun_of_head<T>(begun, i)});
    });
  });
  return {lse, found.bits, found.kappa, found.log_mean, found.local, begun};
}

std::tuple<Tensor, Tensor, Tensor> aggregate(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta,
                                             Optional real, Sides grid, Sides window, int64_t extra_tokens,
                                             int64_t topk, bool reciprocal, double scale, Sides rows, Tensor lse,
                                             Tensor bits, Tensor kappa, Tensor log_mean, Tensor local, Tensor begun,
                                             Optional back) {
  const Call call =
      call_of_rows(query, key, value, alpha, beta, real, grid, window, extra_tokens, topk, reciprocal, scale, 0, rows);
  const Arguments& x = call.x;
  const Given given{call};
  const Found found{bits, kappa, log_mean, local};
  found.check(call, back);
  given.check_statistic(lse, "lse", given.n());
  check_contiguous(begun, "begun", query, x.statistics(), {x.batch(), x.heads(), begun_rows(call), begun_width(x)});
  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(query, shape, type);
  };
  const Tensor out = make({x.batch(), x.heads(), given.n(), x.dim_v()}, x.type());
  const Tensor lse_kept = make({x.batch(), x.heads(), given.n()}, x.statistics());
  const Tensor survivors = make({x.batch(), x.heads(), given.n()}, ScalarType::Int);
  by_type(call, [&](auto number) {
    using T = decltype(number);
    for_heads(x.n_heads(), [&](int64_t i, int64_t threads) {
      Problem<T> p = call.head<T>(i, threads);
      p.lse = Call::of_head<T>(lse, i, p.begin), p.lse_kept = Call::of_head<T>(lse_kept, i, p.begin);
      p.survivors = Call::of_head<int32_t>(survivors, i, p.begin);
      found.set(p, i, back);
      forward_head<T>(call, p, i, threads, out, {false, true, begun_of_head<T>(begun, i)});
    });
  });
  return {out, lse_kept, survivors};
}

// Bits of the rows become those of mutual neighbours in some blocks of columns, from the first on, by the bits `back` of
// these columns: what is mutual is read for one way from then on.
void keep_mutual(Tensor bits, Tensor back, int64_t first) {
  check(bits.dim() == 5 && back.dim() == 5, "bits, back", "[B, heads, blocks, blocks, 64]");
  const int64_t blocks = bits.size(2), columns = back.size(2);
  check(0 <= first && first <= bits.size(3) - columns, "first", "a block of columns, all of `back` fits behind");
  check_contiguous(bits, "bits", bits, ScalarType::Long, {bits.size(0), bits.size(1), blocks, bits.size(3), kBlock});
  check_contiguous(back, "back", bits, ScalarType::Long, {bits.size(0), bits.size(1), columns, blocks, kBlock});
  for_heads(bits.size(0) * bits.size(1), [&](int64_t i, int64_t threads) {
    Problem<float> p{};
    p.blocks_q = columns, p.blocks_k = bits.size(3), p.first_key = first * kBlock, p.bits = words_of_head(bits, i);
    p.back = words_of_head(back, i), p.back_stride = blocks * kBlock;
    Workspace workspace(threads);
    workspace.allocate_all();
    run({0, blocks}, workspace, [&](Queue& queue, void*) { table<float>().keep_mutual(p, queue); });
  });
}

// How many bits each block of rows has.
Tensor count_bits(Tensor bits) {
  check(bits.dim() == 5, "bits", "[B, heads, blocks, blocks, 64]");
  const std::vector<int64_t> shape{bits.size(0), bits.size(1), bits.size(2)};
  check_contiguous(bits, "bits", bits, ScalarType::Long, {shape[0], shape[1], shape[2], bits.size(3), kBlock});
  const Tensor counts = torch::stable::new_empty(bits, shape, ScalarType::Long);
  const int64_t words = bits.size(3) * kBlock;
  torch::stable::parallel_for(0, counts.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      data<int64_t>(counts)[block] =
          table<float>().count_bits(reinterpret_cast<const uint64_t*>(data<const int64_t>(bits, block * words)), words);
  });
  return counts;
}

void list(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real, Sides grid,
          Sides window, int64_t extra_tokens, int64_t topk, bool reciprocal, double scale, Sides rows, Tensor bits,
          Tensor kappa, Tensor log_mean, Tensor local, Optional back, Tensor row_offsets, Tensor col_indices) {
  const Call call =
      call_of_rows(query, key, value, alpha, beta, real, grid, window, extra_tokens, topk, reciprocal, scale, 0, rows);
  const Found found{bits, kappa, log_mean, local};
  found.check(call, back);
  const int64_t* const offsets =
      check_graph(row_offsets, col_indices, query, call.x.n_heads() * (call.rows.end - call.rows.begin));
  by_type(call, [&](auto number) {
    using T = decltype(number);
    for_heads(call.x.n_heads(), [&](int64_t i, int64_t threads) {
      Problem<T> p = call.head<T>(i, threads);
      found.set(p, i, back);
      list_head(p, i, threads, offsets, data<int32_t>(col_indices));
    });
  });
}

// What a backward is given of all rows.
struct OfAllRows {
  Tensor d_out, nan_rows, survivors;

  void check(const Call& call) const {
    const Arguments& x = call.x;
    const Given given{call};
    asa_ops::check(d_out, "grad_out", x.query, x.type(), {x.batch(), x.heads(), x.n_q(), x.dim_v()});
    given.check_rows(nan_rows, "nan_rows", x.n_q(), ScalarType::Bool);
    given.check_rows(survivors, "survivors", x.n_q(), ScalarType::Int);
  }

  template <class T>
  Problem<T> head(const Call& call, int64_t i, int64_t threads) const {
    Problem<T> p = call.head<T>(i, threads);
    p.survivors = Call::of_head<int32_t>(survivors, i, 0);
    check_survivors(p);
    const Rows rows = call.tokens(d_out, i);
    p.parts = parts_of(p, call.tokens(call.x.query, i), call.tokens(call.x.key, i), &rows);
    return p;
  }
};

// dq of the rows; the softmax of each, shift, factor and delta, [B, heads, 3, n]; and how it is treated, its kind, keys and
// how many of them it lists, likewise.
std::tuple<Tensor, Tensor, Tensor> rows_bwd(Tensor d_out, Tensor nan_rows, Tensor survivors, Tensor query, Tensor key,
                                            Tensor value, Optional alpha, Optional beta, Optional real, Sides grid,
                                            Sides window, int64_t extra_tokens, int64_t topk, bool reciprocal,
                                            double scale, Sides rows, Tensor bits, Tensor kappa, Tensor log_mean,
                                            Tensor local, Optional back) {
  const Call call =
      call_of_rows(query, key, value, alpha, beta, real, grid, window, extra_tokens, topk, reciprocal, scale, 0, rows);
  const Arguments& x = call.x;
  const OfAllRows all{d_out, nan_rows, survivors};
  const Found found{bits, kappa, log_mean, local};
  all.check(call), found.check(call, back);
  const int64_t n = call.rows.end - call.rows.begin;
  const Tensor dq = torch::stable::new_empty(query, {x.batch(), x.heads(), n, x.dim()}, x.type());
  const Tensor softmax = torch::stable::new_empty(query, {x.batch(), x.heads(), 3, n}, x.statistics());
  const Tensor groups = torch::stable::new_empty(query, {x.batch(), x.heads(), 3, n}, ScalarType::Int);
  by_type(call, [&](auto number) {
    using T = decltype(number);
    for_heads(x.n_heads(), [&](int64_t i, int64_t threads) {
      Problem<T> p = all.template head<T>(call, i, threads);
      found.set(p, i, back);
      T* const numbers = row_zero(data<T>(softmax, i * 3 * n), p.begin);
      p.shift = numbers, p.factor = numbers + n, p.delta = numbers + 2 * n;
      Slabs slabs{{}, Layout(p.n_q)};
      find_layout(table<T>(), p, threads, slabs.layout);
      slabs.ends = ends_of_slabs(p, slabs.layout);
      int32_t* const treated = data<int32_t>(groups, i * 3 * n);
      for (int64_t r = 0; r < n; ++r) {
        treated[r] = static_cast<int32_t>(slabs.layout.kinds[p.begin + r]);
        treated[n + r] = slabs.layout.keys[p.begin + r], treated[2 * n + r] = slabs.layout.listed[p.begin + r];
      }
      sum_slabs<T>(call, p, i, threads, slabs, {0, p.n_k}, d_out, {}, nan_rows, {dq, {}, {}}, nullptr, nullptr);
    });
  });
  return {dq, softmax, groups};
}

// dk and dv of the keys [rows[0], rows[1]), from all rows, of which `softmax` and `groups` are gathered. `bits` are those of
// these keys as queries, if neighbours must be mutual; without `back` they are M.
std::tuple<Tensor, Tensor> columns_bwd(Tensor d_out, Tensor nan_rows, Tensor survivors, Tensor query, Tensor key,
                                       Tensor value, Optional alpha, Optional beta, Optional real, Sides grid,
                                       Sides window, int64_t extra_tokens, int64_t topk, bool reciprocal, double scale,
                                       Sides rows, Optional bits, Tensor local, Optional back, Tensor softmax,
                                       Tensor groups) {
  const Call call =
      call_of(query, key, value, alpha, beta, real, Options(grid, window, extra_tokens, topk, reciprocal, scale, 0));
  const Arguments& x = call.x;
  const Given given{call};
  const OfAllRows all{d_out, nan_rows, survivors};
  const Range keys = range_of(rows);
  const int64_t n = keys.end - keys.begin, n_q = x.n_q();
  keys.check("rows", x.n_k());
  check(!x.is_empty(), "N", "at least 1");
  all.check(call), given.check_local(local, n_q);
  check(!x.has_neighbours() || back || x.options.reciprocal, "back", "given where neighbours are not mutual");
  check(!x.has_neighbours() || !x.options.reciprocal || bits, "bits", "given where neighbours must be mutual");
  if (back) given.check_words(*back, "back", parts(n_q, kBlock), blocks_of(keys));
  if (bits) given.check_words(*bits, "bits", blocks_of(keys), parts(n_q, kBlock));
  const std::vector<int64_t> of_rows{x.batch(), x.heads(), 3, n_q};
  check_contiguous(softmax, "softmax", query, x.statistics(), of_rows);
  check_contiguous(groups, "groups", query, ScalarType::Int, of_rows);
  const Tensor dk = torch::stable::new_empty(query, {x.batch(), x.key_heads(), n, x.dim()}, x.type());
  const Tensor dv = torch::stable::new_empty(query, {x.batch(), x.key_heads(), n, x.dim_v()}, x.type());
  by_type(call, [&](auto number) {
    using T = decltype(number);
    for_key_heads<T>(call, n, [&](int64_t i, int64_t threads, T* dk_sum, T* dv_sum) {
      Problem<T> p = all.template head<T>(call, i, threads);
      T* const numbers = data<T>(softmax, i * 3 * n_q);
      p.shift = numbers, p.factor = numbers + n_q, p.delta = numbers + 2 * n_q;
      p.local = local_of_head(local, i, 0);
      const int32_t* const treated = data<const int32_t>(groups, i * 3 * n_q);
      Layout of_all(n_q);
      for (int64_t r = 0; r < n_q; ++r) {
        check(0 <= treated[r] && treated[r] <= 2, "groups", "what rows_bwd returned");
        of_all.kinds[r] = static_cast<Kind>(treated[r]);
      }
      std::copy_n(treated + n_q, n_q, of_all.keys.data());
      std::copy_n(treated + 2 * n_q, n_q, of_all.listed.data());
      p.kinds = of_all.kinds.data();
      table<T>().lay_out(p, of_all.groups);
      Slabs slabs{ends_of_slabs(p, of_all), Layout(n_q)};
      p.n_k = n, p.blocks_k = blocks_of(keys), p.first_key = keys.begin;
      p.k_at_a_time = Call::at_a_time(p.blocks_k, threads);
      if (p.real_k) p.real_k += keys.begin;
      if (back) p.bits = words_of_head(*back, i);
      if (bits) p.back = words_of_head(*bits, i), p.back_stride = p.blocks_q * kBlock;
      find_layout(table<T>(), p, threads, slabs.layout);
      sum_slabs<T>(call, p, i, threads, slabs, keys, d_out, {}, nan_rows, {{}, dk, dv}, dk_sum, dv_sum);
    });
  });
  return {dk, dv};
}

// dalpha and dbeta of the rows. `lse_kept`, `local` and `delta` are those of all rows.
std::tuple<Tensor, Tensor> thresholds_bwd(Tensor d_out, Tensor nan_rows, Tensor survivors, Tensor query, Tensor key,
                                          Tensor value, Optional alpha, Optional beta, Optional real, Sides grid,
                                          Sides window, int64_t extra_tokens, int64_t topk, bool reciprocal,
                                          double scale, Sides rows, Tensor lse, Tensor bits, Tensor kappa,
                                          Tensor log_mean, Tensor local, Optional back, Tensor lse_kept, Tensor delta,
                                          double band) {
  const Call call = call_of_rows(query, key, value, alpha, beta, real, grid, window, extra_tokens, topk, reciprocal,
                                 scale, band, rows);
  const Arguments& x = call.x;
  const Given given{call};
  const OfAllRows all{d_out, nan_rows, survivors};
  const Found found{bits, kappa, log_mean, local};
  all.check(call), found.check_but_local(call, back), given.check_local(local, x.n_q());
  given.check_statistic(lse, "lse", given.n());
  given.check_statistic(lse_kept, "lse_kept", x.n_q()), given.check_statistic(delta, "delta", x.n_q());
  const auto make = [&](bool wanted) {
    return torch::stable::new_zeros(query, {x.batch(), x.heads(), wanted ? given.n() : 0}, x.statistics());
  };
  const Tensor dalpha = make(x.alpha.has_value()), dbeta = make(x.beta.has_value());
  by_type(call, [&](auto number) {
    using T = decltype(number);
    for_heads(x.n_heads(), [&](int64_t i, int64_t threads) {
      Problem<T> p = all.template head<T>(call, i, threads);
      found.set(p, i, back);
      p.local = local_of_head(local, i, 0);
      p.lse = Call::of_head<T>(lse, i, p.begin), p.lse_kept = Call::of_head<T>(lse_kept, i, 0);
      p.delta = Call::of_head<T>(delta, i, 0);
      if (x.alpha) p.dalpha = Call::of_head<T>(dalpha, i, p.begin);
      if (x.beta) p.dbeta = Call::of_head<T>(dbeta, i, p.begin);
      learn_thresholds(call, p, i, threads, d_out, {}, nan_rows);
    });
  });
  return {dalpha, dbeta};
}

}  // namespace
}  // namespace asa_ops::cpu

#if defined(ASA_AMX_TESTING)  // beside the extension, for the tests
#define ASA_OP(name) "asa_amx_" name
#else
#define ASA_OP(name) "asa_" name
#endif
#define ASA_FOUND "Tensor bits, Tensor kappa, Tensor log_mean, Tensor local"
#define ASA_OF_ALL_ROWS "Tensor grad_out, Tensor nan_rows, Tensor survivors, "
STABLE_TORCH_LIBRARY_FRAGMENT(ASA_OPS_NAMESPACE, m) {
  m.def(ASA_OP("rows_scan") "(" ASA_INPUTS ASA_OPTIONS "int[] rows) -> (Tensor lse, " ASA_FOUND ", Tensor begun)");
  m.def(ASA_OP("rows_fwd") "(" ASA_INPUTS ASA_OPTIONS "int[] rows, Tensor(a!) lse, " ASA_FOUND
                           ", Tensor begun, Tensor? back) -> (Tensor out, Tensor lse_kept, Tensor survivors)");
  m.def(ASA_OP("keep_mutual") "(Tensor(a!) bits, Tensor back, int first) -> ()");
  m.def(ASA_OP("count_bits") "(Tensor bits) -> Tensor");
  m.def(ASA_OP("rows_list_survivors") "(" ASA_INPUTS ASA_OPTIONS "int[] rows, " ASA_FOUND
                                      ", Tensor? back, Tensor row_offsets, Tensor(a!) col_indices) -> ()");
  m.def(ASA_OP("rows_bwd") "(" ASA_OF_ALL_ROWS ASA_INPUTS ASA_OPTIONS "int[] rows, " ASA_FOUND
                           ", Tensor? back) -> (Tensor dq, Tensor softmax, Tensor groups)");
  m.def(ASA_OP(
      "columns_bwd") "(" ASA_OF_ALL_ROWS ASA_INPUTS ASA_OPTIONS
                     "int[] rows, Tensor? bits, Tensor local, Tensor? back, Tensor softmax, Tensor groups) -> (Tensor dk, Tensor dv)");
  m.def(ASA_OP(
      "thresholds_bwd") "(" ASA_OF_ALL_ROWS ASA_INPUTS ASA_OPTIONS "int[] rows, Tensor lse, " ASA_FOUND
                        ", Tensor? back, Tensor lse_kept, Tensor delta, float band) -> (Tensor dalpha, Tensor dbeta)");
}

STABLE_TORCH_LIBRARY_IMPL(ASA_OPS_NAMESPACE, CPU, m) {
  m.impl(ASA_OP("rows_scan"), TORCH_BOX(&asa_ops::cpu::scan));
  m.impl(ASA_OP("rows_fwd"), TORCH_BOX(&asa_ops::cpu::aggregate));
  m.impl(ASA_OP("keep_mutual"), TORCH_BOX(&asa_ops::cpu::keep_mutual));
  m.impl(ASA_OP("count_bits"), TORCH_BOX(&asa_ops::cpu::count_bits));
  m.impl(ASA_OP("rows_list_survivors"), TORCH_BOX(&asa_ops::cpu::list));
  m.impl(ASA_OP("rows_bwd"), TORCH_BOX(&asa_ops::cpu::rows_bwd));
  m.impl(ASA_OP("columns_bwd"), TORCH_BOX(&asa_ops::cpu::columns_bwd));
  m.impl(ASA_OP("thresholds_bwd"), TORCH_BOX(&asa_ops::cpu::thresholds_bwd));
}
