// The ops that compute some rows and keys of a map on a GPU, for one of several processes that share it, bit for bit as
// one process computes them. asa_ops.asa.cuda_part calls them in their order, between what processes send each other.
//
// `rows` and `keys` are ranges of positions of the arranged map, in whole blocks. Tensors of rows have those of the
// whole map, of which the ones of the range are written; the bits of pairs are those of these rows with all keys and of
// all rows with these keys.

#include "call.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

namespace asa_ops::cuda {
namespace {

using Sides = std::vector<int64_t>;

Blocks blocks_of(const Sides& range, int64_t n, const char* name) {
  check(range.size() == 2 && range[0] >= 0 && range[0] <= range[1] && range[1] <= padded(n), name,
        "[begin, end] among the positions of the map");
  check(range[0] % kBlock == 0 && range[1] % kBlock == 0, name, "of whole blocks of 64 positions");
  if (range[0] == range[1]) return {0, 0};
  return {static_cast<int>(range[0] / kBlock), static_cast<int>((range[1] - range[0]) / kBlock)};
}

// A call of a part of a map, checked.
struct Part {
  Arguments x;
  Computed computed;

  Part(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& alpha, const Optional& beta,
       const Optional& real, const Options& options, const Sides& rows)
      : x(arguments_of(query, key, value, alpha, beta, real, options)),
        computed{blocks_of(rows, x.n_q(), "rows"), {0, 0}, false} {
    check(!x.is_empty(), "N", "at least 1");
  }
  Part(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& alpha, const Optional& beta,
       const Optional& real, const Options& options, const Sides& rows, const Sides& keys)
      : Part(query, key, value, alpha, beta, real, options, rows) {
    computed.keys = blocks_of(keys, x.n_k(), "keys");
    const bool one_way = !x.has_neighbours() || !x.options.reciprocal;
    check(one_way || rows == keys, "keys", "the range of rows, if neighbours must be mutual");
  }

  int64_t n_heads() const { return x.n_heads(); }
  int64_t row_blocks() const { return padded(x.n_q()) / kBlock; }
  int64_t key_blocks() const { return padded(x.n_k()) / kBlock; }
  int64_t positions() const { return row_blocks() * kBlock; }
  int64_t numbers() const { return numbers_of(static_cast<int>(x.positions())); }

  // Bits of the keys are for a backward.
  KeptBits bits(bool keep) const { return KeptBits(x, computed, keep && x.has_neighbours() && !takes_few(x)); }
  Kept kept(bool keep) const { return kept_of(x, bits(keep).bytes, keep); }

  Tensor make(std::initializer_list<int64_t> shape, ScalarType type) const {
    return torch::stable::new_empty(x.query, shape, type);
  }

  // Of all rows.
  void check_numbers(const Tensor& given) const {
    check_contiguous(given, "numbers", x.query, ScalarType::Float, {n_heads(), positions(), numbers()});
  }

  void check_peaks(const Optional& peaks) const {
    check(peaks.has_value() == keeps_peaks(x), "peaks", "given where alpha learns, and only there");
    if (!peaks) return;
    check_contiguous(*peaks, "peaks", x.query, ScalarType::Half, {n_heads(), key_blocks(), computed.rows.positions()});
  }

  void check_saved(const Outputs& saved, bool keep) const { x.check_saved(saved, kept(keep).bytes); }

  template <class Run>
  void run(const Outputs& saved, bool keep, Run run) const {
    for_type(x.query, [&](auto zero) {
      Call<decltype(zero)> call(x, saved, computed);
      call.set_kept(kept(keep), bits(keep), data<char>(saved.kept));
      run(call, zero);
    });
  }
};

// Whether the ops here are those that compute such a call: those for compute capability 9.0 have no ranges.
bool can_run(Tensor query, int64_t n_q, int64_t n_k, int64_t dim_v, double scale, bool tf32) {
  check(n_q > 0 && n_k > 0, "N", "at least 1");
  bool found = false;
  for_type(query, [&](auto zero) {
    const Size size{query.size(0) * query.size(1), n_q, n_k, std::max(query.size(3), dim_v), scale};
    found = !runs_on_hopper<decltype(zero)>(size, tf32);
  });
  return found;
}

// What other processes must know of these rows, and peaks where a backward asks for them.
std::tuple<Tensor, Tensor, Tensor> scan(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta,
                                        Optional real, Sides grid, Sides window, int64_t extra_tokens, int64_t topk,
                                        bool reciprocal, double scale, double band, Sides rows) {
  const Part part(query, key, value, alpha, beta, real,
                  Options(grid, window, extra_tokens, topk, reciprocal, scale, band), rows);
  const Arguments& x = part.x;
  const int64_t n_heads = part.n_heads(), own = part.computed.rows.positions();
  const Tensor numbers = part.make({n_heads, own, part.numbers()}, ScalarType::Float);
  const Tensor flags = part.make({n_heads, x.has_neighbours() ? own / kBlock : 0, part.key_blocks()}, ScalarType::Byte);
  const Tensor peaks = part.make({n_heads, keeps_peaks(x) ? part.key_blocks() : 0, own}, ScalarType::Half);
  if (own == 0) return {numbers, flags, peaks};
  const Kept kept(x, x.n_q(), 0, 0, 3 * x.n_q() * 4);
  const Tensor nothing = part.make({0}, ScalarType::Float);
  const Outputs found{nothing, part.make({n_heads, x.n_q()}, ScalarType::Float), nothing, nothing,
                      part.make({n_heads, kept.bytes}, ScalarType::Byte)};
  for_type(query, [&](auto zero) {
    Call<decltype(zero)> call(x, found, part.computed);
    call.set_kept(kept, part.bits(false), data<char>(found.kept));
    call.scan(data<float>(numbers), data<uint8_t>(flags), keeps_peaks(x) ? data<Half>(peaks) : nullptr);
  });
  return {numbers, flags, peaks};
}

// Outputs of these rows, from numbers and flags of all rows; and bits, which `keep` says are for a backward.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend(Tensor query, Tensor key, Tensor value, Optional alpha,
                                                          Optional beta, Optional real, Sides grid, Sides window,
                                                          int64_t extra_tokens, int64_t topk, bool reciprocal,
                                                          double scale, double band, bool keep, Sides rows, Sides keys,
                                                          Tensor numbers, Tensor flags) {
  const Part part(query, key, value, alpha, beta, real,
                  Options(grid, window, extra_tokens, topk, reciprocal, scale, keep ? band : 0), rows, keys);
  const Arguments& x = part.x;
  part.check_numbers(numbers);
  check_contiguous(flags, "flags", query, ScalarType::Byte,
                   {part.n_heads(), x.has_neighbours() ? part.row_blocks() : 0, part.key_blocks()});
  const Outputs outputs = x.new_outputs(part.kept(keep).bytes);
  if (x.real && x.n_q() == x.n_k()) Arguments::clear(outputs);  // kernels do not write padding
  part.run(outputs, keep,
           [&](auto& call, auto) { call.attend(data<const float>(numbers), data<const uint8_t>(flags)); });
  return {outputs.out, outputs.lse, outputs.lse_kept, outputs.survivors, outputs.kept};
}

void list_survivors(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real, Tensor out,
                    Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kept, Sides grid, Sides window,
                    int64_t extra_tokens, int64_t topk, bool reciprocal, double scale, double band, bool keep,
                    Sides rows, Sides keys, Tensor row_offsets, Tensor col_indices) {
  const Part part(query, key, value, alpha, beta, real,
                  Options(grid, window, extra_tokens, topk, reciprocal, scale, keep ? band : 0), rows, keys);
  const Arguments& x = part.x;
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  part.check_saved(saved, keep);
  check_graph(x, row_offsets, col_indices);
  if (col_indices.numel() == 0) return;
  part.run(saved, keep, [&](auto& call, auto) {
    call.graph(data<const int64_t>(row_offsets), data<int32_t>(col_indices), col_indices.numel());
  });
}

// Of these rows: the gradient of the output, arranged, and RowGradients; and what is noted of heads.
std::tuple<Tensor, Tensor, Tensor> begin_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Optional alpha,
                                             Optional beta, Optional real, Tensor out, Tensor lse, Tensor lse_kept,
                                             Tensor survivors, Tensor kept, Sides grid, Sides window,
                                             int64_t extra_tokens, int64_t topk, bool reciprocal, double scale,
                                             double band, Sides rows, Sides keys) {
  const Part part(query, key, value, alpha, beta, real,
                  Options(grid, window, extra_tokens, topk, reciprocal, scale, band), rows, keys);
  const Arguments& x = part.x;
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  part.check_saved(saved, true);
  check(grad_out, "grad_out", query, x.type(), {x.batch(), x.heads(), x.n_q(), x.dim_v()});
  const Tensor arranged = part.make({part.n_heads(), part.positions(), padded_width(x.dim_v())}, x.type());
  const Tensor of_rows = part.make({kRowGradients, part.n_heads(), part.positions()}, ScalarType::Float);
  const Tensor noted = part.make({3, part.n_heads()}, ScalarType::Int);
  part.run(saved, true, [&](auto& call, auto zero) {
    call.begin_backward(grad_out, data<decltype(zero)>(arranged), data<float>(of_rows),
                        reinterpret_cast<uint32_t*>(data<int32_t>(noted)));
  });
  return {arranged, of_rows, noted};
}

// The same of all rows, and the largest that processes noted. `numbers`: of all rows, where there is a window alone,
// whose local survivors nobody has been told of before. Gradients of thresholds are those of every row, float32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> end_bwd(Tensor query, Tensor key, Tensor value, Optional alpha,
                                                           Optional beta, Optional real, Tensor out, Tensor lse,
                                                           Tensor lse_kept, Tensor survivors, Tensor kept, Sides grid,
                                                           Sides window, int64_t extra_tokens, int64_t topk,
                                                           bool reciprocal, double scale, double band, Sides rows,
                                                           Sides keys, Optional peaks, Optional numbers,
                                                           Tensor arranged, Tensor of_rows, Tensor noted) {
  const Part part(query, key, value, alpha, beta, real,
                  Options(grid, window, extra_tokens, topk, reciprocal, scale, band), rows, keys);
  const Arguments& x = part.x;
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  part.check_saved(saved, true), part.check_peaks(peaks);
  check(numbers.has_value() == (x.beta && !x.has_neighbours()), "numbers", "given for a window alone, and only there");
  if (numbers) part.check_numbers(*numbers);
  check_contiguous(arranged, "arranged", query, x.type(), {part.n_heads(), part.positions(), padded_width(x.dim_v())});
  check_contiguous(of_rows, "of_rows", query, ScalarType::Float, {kRowGradients, part.n_heads(), part.positions()});
  check_contiguous(noted, "noted", query, ScalarType::Int, {3, part.n_heads()});
  const Gradients gradients = new_gradients(x);
  part.run(saved, true, [&](auto& call, auto zero) {
    call.end_backward(data<const decltype(zero)>(arranged), data<float>(of_rows),
                      reinterpret_cast<uint32_t*>(data<int32_t>(noted)), data<Half>(peaks), data<const float>(numbers),
                      gradients);
  });
  const auto of_multiplier = [&](const Optional& dx) { return dx ? *dx : part.make({0}, ScalarType::Float); };
  return {gradients.dq, gradients.dk, gradients.dv, of_multiplier(gradients.dalpha), of_multiplier(gradients.dbeta)};
}

#define ASA_RANGES "int[] rows, int[] keys"

const std::string kCanRun = "(Tensor query, int n_q, int n_k, int dim_v, float scale, bool tf32) -> bool";
const std::string kScan =
    "(" ASA_INPUTS ASA_OPTIONS "float band, int[] rows) -> (Tensor numbers, Tensor flags, Tensor peaks)";
const std::string kAttend = "(" ASA_INPUTS ASA_OPTIONS "float band, bool keep, " ASA_RANGES
                            ", Tensor numbers, Tensor flags) -> (" ASA_OUTPUTS ")";
const std::string kListSurvivors = "(" ASA_INPUTS ASA_OUTPUTS ", " ASA_OPTIONS "float band, bool keep, " ASA_RANGES
                                   ", Tensor row_offsets, Tensor(a!) col_indices) -> ()";
const std::string kBeginBackward = "(Tensor grad_out, " ASA_INPUTS ASA_OUTPUTS ", " ASA_OPTIONS
                                   "float band, " ASA_RANGES ") -> (Tensor arranged, Tensor of_rows, Tensor noted)";
const std::string kEndBackward = "(" ASA_INPUTS ASA_OUTPUTS ", " ASA_OPTIONS "float band, " ASA_RANGES
                                 ", Tensor? peaks, Tensor? numbers, Tensor arranged, Tensor of_rows, Tensor noted) "
                                 "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha, Tensor dbeta)";

}  // namespace
}  // namespace asa_ops::cuda

#if defined(__CUDACC__)
#define ASA_STEM "asa_tiles_"
#define ASA_DEVICE CUDA
#else  // an emulation on CPU tensors, for the tests
#define ASA_STEM "asa_emulated_tiles_"
#define ASA_DEVICE CPU
#endif
STABLE_TORCH_LIBRARY_FRAGMENT(ASA_OPS_NAMESPACE, m) {
  m.def((ASA_STEM "can_run" + asa_ops::cuda::kCanRun).c_str());
  m.def((ASA_STEM "scan" + asa_ops::cuda::kScan).c_str());
  m.def((ASA_STEM "attend" + asa_ops::cuda::kAttend).c_str());
  m.def((ASA_STEM "list_survivors" + asa_ops::cuda::kListSurvivors).c_str());
  m.def((ASA_STEM "begin_bwd" + asa_ops::cuda::kBeginBackward).c_str());
  m.def((ASA_STEM "end_bwd" + asa_ops::cuda::kEndBackward).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(ASA_OPS_NAMESPACE, ASA_DEVICE, m) {
  m.impl(ASA_STEM "can_run", TORCH_BOX(&asa_ops::cuda::can_run));
  m.impl(ASA_STEM "scan", TORCH_BOX(&asa_ops::cuda::scan));
  m.impl(ASA_STEM "attend", TORCH_BOX(&asa_ops::cuda::attend));
  m.impl(ASA_STEM "list_survivors", TORCH_BOX(&asa_ops::cuda::list_survivors));
  m.impl(ASA_STEM "begin_bwd", TORCH_BOX(&asa_ops::cuda::begin_bwd));
  m.impl(ASA_STEM "end_bwd", TORCH_BOX(&asa_ops::cuda::end_bwd));
}
