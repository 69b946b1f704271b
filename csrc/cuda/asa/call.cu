// asa_ops::asa_cuda_fwd, asa_cuda_bwd, asa_cuda_neighbors: checks, memory, and the launches of a call.

#include "problem.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#if defined(__CUDACC__)
// Only in torch's builds with CUDA: without it, weak, the library loads everywhere.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace asa_ops::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check(bool ok, const char* name, const char* what) { STD_TORCH_CHECK(ok, "asa_ops: ", name, " must be ", what); }

void check(const Tensor& x, const char* name, ScalarType type, std::vector<int64_t> shape) {
  check(x.scalar_type() == type, name, "of the dtype expected here");
  check(x.dim() == static_cast<int64_t>(shape.size()), name, "of the rank expected here");
  for (size_t i = 0; i < shape.size(); ++i) check(x.size(i) == shape[i], name, "of the shape expected here");
}

void check_contiguous(const Tensor& x, const char* name, ScalarType type, std::vector<int64_t> shape) {
  check(x, name, type, shape);
  check(x.is_contiguous(), name, "contiguous");
}

template <class U>
U* data(const Tensor& x) {
  return static_cast<U*>(x.mutable_data_ptr());
}

cudaStream_t current_stream(const Tensor& x) {
#if defined(__CUDACC__)
  check(aoti_torch_get_current_cuda_stream != nullptr, "torch", "a build with CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#else
  return nullptr;
#endif
}

template <class U>
constexpr ScalarType type_of() {
  if constexpr (std::is_same_v<U, Half>) return ScalarType::Half;
  if constexpr (std::is_same_v<U, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<U, uint8_t>) return ScalarType::Byte;
  if constexpr (std::is_same_v<U, int32_t> || std::is_same_v<U, uint32_t>) return ScalarType::Int;
  return ScalarType::Float;
}

// Memory on the device of a tensor, for as long as this lives: what runs later in the stream may take it over.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  template <class U>
  U* get(int64_t count) {
    kept_.push_back(torch::stable::new_empty(like_, {count}, type_of<U>()));
    return data<U>(kept_.back());
  }

 private:
  Tensor like_;
  std::vector<Tensor> kept_;
};

int padded(int64_t n) { return static_cast<int>((n + kBlock - 1) / kBlock * kBlock); }

int padded_width(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.dim() > 3 ? x.stride(3) : 0}; }

Multiplier multiplier(const Optional& x) {
  if (!x) return {};
  return {data<const float>(*x), {x->stride(0), x->size(1) > 1 ? x->stride(1) : 0, x->stride(2), 0}};
}

// Whether two tensors are the same numbers in memory.
bool is_same(const Tensor& x, const Tensor& y) {
  for (int i = 0; i < 4; ++i)
    if (x.size(i) != y.size(i) || x.stride(i) != y.stride(i)) return false;
  return x.data_ptr() == y.data_ptr();
}

// Into how many parts to cut each program's work so that waves of programs fill the device: parts take memory.
int parts_of(int64_t programs, int limit) {
  const double slots = 2.0 * processors();
  int best = 1;
  const auto time = [&](int parts) { return std::ceil(programs * parts / slots) / parts + 0.02 * parts; };
  for (int parts = 2; parts <= limit; ++parts)
    if (time(parts) < time(best)) best = parts;
  return best;
}

constexpr int kMaxParts = 4;

struct Arguments {
  Tensor query, key, value;
  Optional alpha, beta, real;
  int64_t height, width, window, topk;
  bool reciprocal;
  double scale, band;  // band 0: thresholds do not learn
};

// The fields of asa_ops.asa.types.Saved.
struct SavedTensors {
  Tensor out, lse, lse_kept, survivors, kappa, log_mean, bits, local, rest, base2;
};

void check_arguments(const Arguments& x) {
  const int64_t b = x.query.dim() == 4 ? x.query.size(0) : 0;
  check(x.query.dim() == 4, "query", "[B, heads, N, D]");
  const int64_t heads = x.query.size(1), n = x.query.size(2);
  check(x.key.dim() == 4 && x.value.dim() == 4, "key and value", "[B, heads, N, D]");
  const int64_t n_keys = x.key.size(2);
  check(x.query.size(3) <= 256 && x.value.size(3) <= 256, "D", "at most 256");
  check(n < 1 << 28 && n_keys < 1 << 28, "N", "below 2^28");  // eight rows of a map in an int
  check(x.key, "key", x.query.scalar_type(), {b, heads, n_keys, x.query.size(3)});
  check(x.value, "value", x.query.scalar_type(), {b, heads, n_keys, x.value.size(3)});
  if (x.real) check_contiguous(*x.real, "real", ScalarType::Bool, {b, n_keys});
  for (const auto& [multiplier, name] : {std::pair{x.alpha, "alpha"}, std::pair{x.beta, "beta"}}) {
    if (!multiplier) continue;
    check(multiplier->dim() == 3 && (multiplier->size(1) == 1 || multiplier->size(1) == heads), name, "[B, heads or 1, N]");
    check(*multiplier, name, ScalarType::Float, {b, multiplier->size(1), n});
  }
  check(x.topk >= 0, "topk", "at least 0");
  check(!x.reciprocal || n == n_keys || (!x.alpha && x.topk == 0), "N", "that of keys if neighbours must be mutual");
  if (!x.beta) return;
  check(x.height * x.width == n && n_keys == n, "height * width", "N, of query and key");
  check(x.window >= 1 && x.window % 2 == 1 && x.window <= 46339, "window", "odd, of less than 2^31 positions");
}

void check_saved(const SavedTensors& x, const Arguments& call) {
  const int64_t b = call.query.size(0), heads = call.query.size(1), n = call.query.size(2), dim = call.value.size(3);
  const int64_t window = call.beta ? call.window * call.window : 0;
  check_contiguous(x.out, "out", call.query.scalar_type(), {b, heads, n, dim});
  check_contiguous(x.survivors, "survivors", ScalarType::Int, {b, heads, n});
  check_contiguous(x.local, "local", ScalarType::Bool, {b, heads, n, window});
  for (const auto& [tensor, name] :
       {std::pair{x.lse, "lse"}, std::pair{x.lse_kept, "lse_kept"}, std::pair{x.kappa, "kappa"}, std::pair{x.log_mean, "log_mean"}})
    check_contiguous(tensor, name, ScalarType::Float, {b, heads, n});
  const bool kept = x.bits.dim() == 4 && x.bits.size(3) > 0;
  check_contiguous(x.bits, "bits", ScalarType::Byte, {b, heads, padded(call.key.size(2)) / 64, kept ? padded(n) * 10 : 0});
  const bool more = x.base2.dim() == 4 && x.base2.size(3) > 0, halves = call.query.scalar_type() != ScalarType::Float;
  check_contiguous(x.base2, "base2", ScalarType::Float, {b, heads, 3, more ? n : 0});
  check_contiguous(x.rest, "rest", call.query.scalar_type(), {b, heads, n, more && halves ? dim : 0});
}

template <class T>
class Call {
 public:
  Call(const Arguments& arguments, const SavedTensors& tensors)
      : arguments_(arguments), scratch_(arguments.query), stream_(current_stream(arguments.query)) {
    const Arguments& x = arguments;
    p_.heads = static_cast<int>(x.query.size(1)), p_.zs = static_cast<int>(x.query.size(0) * x.query.size(1));
    p_.dim = static_cast<int>(x.query.size(3)), p_.dim_v = static_cast<int>(x.value.size(3));
    p_.width = padded_width(p_.dim), p_.width_v = padded_width(p_.dim_v);
    p_.per_image = x.real ? 1 : 0;
    p_.window = x.beta ? static_cast<int>(x.window) : 0;
    p_.topk = x.topk < x.key.size(2) ? static_cast<int>(x.topk) : 0;
    p_.has_bits = x.alpha || x.topk > 0;
    p_.mutual = x.reciprocal && p_.has_bits;
    p_.few = p_.mutual && p_.topk > 0 && p_.topk <= kFew;
    // Threshold gradients ask for A_ji where M_ij is 0; without them M itself is stored, which is cheaper to read.
    p_.one_way_bits = x.band > 0 && p_.mutual && x.alpha;
    p_.scale = static_cast<float>(x.scale), p_.scale2 = static_cast<float>(x.scale * 1.4426950408889634);
    p_.alpha = multiplier(x.alpha), p_.beta = multiplier(x.beta);
    const bool map = x.height * x.width == x.key.size(2);
    p_.grid_height = static_cast<int>(map ? x.height : 1), p_.grid_width = static_cast<int>(map ? x.width : x.key.size(2));
    p_.keys = order(x.key, x.real, p_.grid_height, p_.grid_width);
    const bool one_order = x.query.size(2) == x.key.size(2);
    // One order an image where padding of the keys makes kernels expect that.
    p_.rows = one_order ? p_.keys : order(x.query, std::nullopt, 1, static_cast<int>(x.query.size(2)), x.real ? x.query.size(0) : 1);

    const bool more = tensors.base2.numel() > 0;
    saved_ = {data<T>(tensors.out),           data<float>(tensors.lse),      data<float>(tensors.lse_kept),
              data<int32_t>(tensors.survivors), data<float>(tensors.kappa),  data<float>(tensors.log_mean),
              data<uint8_t>(tensors.local),   more && sizeof(T) == 2 ? data<T>(tensors.rest) : nullptr,
              more ? data<float>(tensors.base2) : nullptr};
    const bool dense = !p_.has_bits && !x.beta;
    if (tensors.bits.numel() > 0)
      set_bits(data<char>(tensors.bits));
    else if (p_.has_bits || dense)
      set_bits(reinterpret_cast<char*>(scratch_.template get<uint8_t>(p_.zs * head_bytes())));
    is_dense_ = dense;
  }

  void forward() {
    arrange_tokens();
    const int row_blocks = p_.rows.blocks(), key_blocks = p_.keys.blocks();
    const int64_t rows = all_rows();
    const int splits = parts_of(int64_t(p_.zs) * row_blocks, std::min(8, key_blocks));
    Scratch scratch(arguments_.query);
    auto* const largest = scratch.get<float>(splits * rows);
    auto* const total = scratch.get<float>(splits * rows);
    // Peaks too: those of blocks without keys are not written.
    if (p_.has_bits) clear_memory(p_.words, p_.zs * head_bytes(), stream_);
    find_statistics(p_, splits, largest, total, stream_);
    if (p_.topk > 0) find_kth(p_, saved_.kappa2, stream_);
    // Threshold gradients ask for A_ji of pairs (i, j) in the band below the threshold of i: those tiles too.
    const float band2 = p_.one_way_bits ? static_cast<float>(arguments_.band) * kLog2E : 0;
    const Thresholds thresholds = new_thresholds(scratch);
    find_thresholds(p_, splits, largest, total, saved_, band2, thresholds, stream_);
    if (p_.has_bits) {
      const uint8_t* const flags = thresholds.flags;
      find_neighbours(p_, thresholds, list(scratch, flags, p_.mutual ? flags : nullptr, p_.mutual, true), stream_);
    } else if (is_dense_) {
      keep_everybody(p_, stream_);
    }
    if (p_.window > 0) find_local_survivors(p_, saved_, stream_);
    Parts values;
    Totals totals{};
    if (has_tiles()) {
      values = new_parts(scratch, true, p_.width_v);
      const int64_t numbers = values.splits * rows;
      totals = {scratch.get<float>(numbers), scratch.get<float>(numbers), scratch.get<int32_t>(numbers)};
      sum_neighbours(Sum::kValues, p_, list_occupied(scratch, true), {}, values, totals, stream_);
    }
    finish_rows(p_, values, totals, saved_, stream_);
  }

  void backward(const Tensor& d_out, T* dq, T* dk, T* dv, float* dalpha, float* dbeta) {
    if (std::is_same_v<T, Half>) {
      p_.bounds = scratch_.template get<uint32_t>(2 * p_.zs);
      clear_memory(p_.bounds, 2 * p_.zs * sizeof(uint32_t), stream_);
    }
    arrange_tokens();
    const int64_t rows = all_rows();
    T* const arranged = scratch_.template get<T>(rows * p_.width_v);
    const RowGradients row{scratch_.template get<float>(rows), scratch_.template get<float>(rows), scratch_.template get<float>(rows),
                           scratch_.template get<float>(rows), scratch_.template get<float>(rows), scratch_.template get<uint32_t>(p_.zs)};
    clear_memory(row.poisoned, p_.zs * sizeof(uint32_t), stream_);
    arrange_gradient(p_, data<const T>(d_out), strides_of(d_out), saved_, arranged, row, stream_);
    p_.d_out = arranged;
    if (is_dense_) keep_everybody(p_, stream_);
    {
      Scratch scratch(arguments_.query);
      Lists lists{};
      if (has_tiles()) lists = list_occupied(scratch, true);
      if constexpr (std::is_same_v<T, float>) {
        Parts residual;
        if (has_tiles()) sum_neighbours(Sum::kResidual, p_, lists, row, residual = new_parts(scratch, true, 1), {}, stream_);
        settle_delta(p_, saved_, row, residual, stream_);
      }
      Parts sums_q, sums_t;
      if (has_tiles()) sum_neighbours(Sum::kDq, p_, lists, row, sums_q = new_parts(scratch, true, p_.width), {}, stream_);
      Thresholds thresholds{};
      if (dalpha != nullptr) {
        // Tiles with a score in the band around their rows' thresholds, and a neighbour the other way.
        const float band = static_cast<float>(arguments_.band);
        thresholds = new_thresholds(scratch);
        find_thresholds(p_, 0, nullptr, nullptr, saved_, band * kLog2E, thresholds, stream_);
        const Lists near = list(scratch, thresholds.flags, p_.mutual ? occupied(scratch) : nullptr, false, true);
        sum_thresholds(p_, thresholds, near, row, band, sums_t = new_parts(scratch, true, 1), stream_);
      }
      finish_row_gradients(p_, saved_, row, thresholds, static_cast<float>(arguments_.band), sums_q, sums_t, dq, dalpha, dbeta,
                           stream_);
    }
    Scratch scratch(arguments_.query);
    Parts sums_k, sums_v;
    if (has_tiles()) {
      const Lists lists = list_occupied(scratch, false);
      sum_neighbours(Sum::kDk, p_, lists, row, sums_k = new_parts(scratch, false, p_.width), {}, stream_);
      sum_neighbours(Sum::kDv, p_, lists, row, sums_v = new_parts(scratch, false, p_.width_v), {}, stream_);
    }
    finish_column_gradients(p_, saved_, row, sums_k, sums_v, dk, dv, stream_);
  }

  void graph(const int64_t* row_offsets, int32_t* col_indices) {
    if (is_dense_) keep_everybody(p_, stream_);
    write_columns(p_, saved_, row_offsets, col_indices, stream_);
  }

 private:
  Order order(const Tensor& x, const Optional& real, int height, int width, int64_t images = 1) {
    if (real) images = real->size(0);
    const int n = static_cast<int>(x.size(2)), room = padded(n);
    auto* const order = scratch_.template get<int32_t>(images * room);
    auto* const place = scratch_.template get<int32_t>(images * n);
    auto* const counts = scratch_.template get<int32_t>(images);
    find_order(real ? data<bool>(*real) : nullptr, static_cast<int>(images), n, height, width, room, order, place, counts, stream_);
    return {n, room, order, place, counts};
  }

  const T* tokens(const Tensor& x, const Order& order, int width, uint32_t* broken = nullptr, uint32_t* bounds = nullptr) {
    T* const out = scratch_.template get<T>(int64_t(p_.zs) * order.padded * width);
    arrange(data<const T>(x), strides_of(x), p_.zs, p_.heads, p_.per_image, order, static_cast<int>(x.size(3)), width, out, broken,
            bounds, stream_);
    return out;
  }

  void arrange_tokens() {
    const int64_t words = int64_t(p_.zs) * p_.keys.padded / 32;
    auto* const broken = scratch_.template get<uint32_t>(words);
    clear_memory(broken, words * sizeof(uint32_t), stream_);
    p_.symmetric = is_same(arguments_.query, arguments_.key);
    p_.q = tokens(arguments_.query, p_.rows, p_.width);
    p_.k = p_.symmetric ? p_.q : tokens(arguments_.key, p_.keys, p_.width);
    p_.v = tokens(arguments_.value, p_.keys, p_.width_v, broken, p_.bounds);
    p_.broken = broken;
  }

  // A head's bits are followed by its peaks.
  size_t words_bytes() const { return size_t(p_.keys.padded) / 8 * p_.rows.padded; }
  size_t head_bytes() const { return words_bytes() / 4 * 5; }

  void set_bits(char* memory) {
    p_.words = reinterpret_cast<uint32_t*>(memory), p_.words_stride = int64_t(head_bytes()) / 4;
    p_.peaks = reinterpret_cast<Half*>(memory + words_bytes()), p_.peaks_stride = int64_t(head_bytes()) / 2;
  }

  int64_t all_rows() const { return int64_t(p_.zs) * p_.rows.padded; }

  // Whether there are neighbours, and tiles sum them.
  bool has_tiles() const { return p_.words != nullptr && !p_.few; }

  int64_t tiles() const { return int64_t(p_.zs) * p_.rows.blocks() * p_.keys.blocks(); }

  Thresholds new_thresholds(Scratch& scratch) const {
    if (!p_.has_bits) return {};
    const int64_t rows = all_rows();
    return {scratch.get<float>(rows), scratch.get<float>(rows), p_.topk > 0 ? scratch.get<float>(rows) : nullptr,
            scratch.get<uint8_t>(tiles())};
  }

  Parts new_parts(Scratch& scratch, bool of_rows, int width) const {
    const Order& own = of_rows ? p_.rows : p_.keys;
    const int splits = parts_of(int64_t(p_.zs) * own.blocks(), kMaxParts);
    return {scratch.get<float>(int64_t(splits) * p_.zs * own.padded * width), splits};
  }

  Lists list(Scratch& scratch, const uint8_t* by_rows, const uint8_t* by_columns, bool upper, bool of_rows) const {
    const int blocks = (of_rows ? p_.rows : p_.keys).blocks(), others = (of_rows ? p_.keys : p_.rows).blocks();
    const Lists lists{scratch.get<int32_t>(int64_t(p_.zs) * blocks * others), scratch.get<int32_t>(int64_t(p_.zs) * blocks), others};
    list_blocks(by_rows, by_columns, upper, p_.zs, blocks, lists, stream_);
    return lists;
  }

  const uint8_t* occupied(Scratch& scratch) const {
    auto* const flags = scratch.get<uint8_t>(tiles());
    find_occupied(p_, flags, stream_);
    return flags;
  }

  // For every block of queries, or of keys, the blocks of the other side with neighbours.
  Lists list_occupied(Scratch& scratch, bool of_rows) const {
    const uint8_t* const flags = occupied(scratch);
    return list(scratch, of_rows || p_.mutual ? flags : nullptr, !of_rows || p_.mutual ? flags : nullptr, false, of_rows);
  }

  const Arguments& arguments_;
  Problem<T> p_{};
  Saved<T> saved_{};
  bool is_dense_ = false;  // nobody is asked to be a neighbour: all are
  Scratch scratch_;
  cudaStream_t stream_;
};

// Calls run(T{}) for the numbers that x is made of, on its device.
template <class Run>
void for_type(const Tensor& x, Run run) {
#if defined(__CUDACC__)
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#endif
  switch (x.scalar_type()) {
    case ScalarType::Half: return run(Half{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Float: return run(0.0f);
    default: check(false, "query", "float16, bfloat16 or float32");
  }
}

void asa_cuda_fwd(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real, int64_t height,
                  int64_t width, int64_t window, int64_t topk, bool reciprocal, double scale, double band, Tensor out, Tensor lse,
                  Tensor lse_kept, Tensor survivors, Tensor kappa, Tensor log_mean, Tensor bits, Tensor local, Tensor rest,
                  Tensor base2) {
  const Arguments call{query, key, value, alpha, beta, real, height, width, window, topk, reciprocal, scale, band};
  const SavedTensors saved{out, lse, lse_kept, survivors, kappa, log_mean, bits, local, rest, base2};
  check_arguments(call), check_saved(saved, call);
  if (lse.numel() == 0 || key.size(2) == 0) return;
  for_type(query, [&](auto zero) { Call<decltype(zero)>(call, saved).forward(); });
}

void asa_cuda_bwd(Tensor d_out, Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real,
                  int64_t height, int64_t width, int64_t window, int64_t topk, bool reciprocal, double scale, double band,
                  Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kappa, Tensor log_mean, Tensor bits,
                  Tensor local, Tensor rest, Tensor base2, Tensor dq, Tensor dk, Tensor dv, Optional dalpha, Optional dbeta) {
  const Arguments call{query, key, value, alpha, beta, real, height, width, window, topk, reciprocal, scale, band};
  const SavedTensors saved{out, lse, lse_kept, survivors, kappa, log_mean, bits, local, rest, base2};
  check_arguments(call), check_saved(saved, call);
  const ScalarType type = query.scalar_type();
  const int64_t b = query.size(0), heads = query.size(1), n = query.size(2), n_keys = key.size(2);
  check(d_out, "d_out", type, {b, heads, n, value.size(3)});
  check_contiguous(dq, "dq", type, {b, heads, n, query.size(3)});
  check_contiguous(dk, "dk", type, {b, heads, n_keys, query.size(3)});
  check_contiguous(dv, "dv", type, {b, heads, n_keys, value.size(3)});
  for (const Optional& x : {dalpha, dbeta})
    if (x) check_contiguous(*x, "dalpha and dbeta", ScalarType::Float, {b, heads, n});
  check((!dalpha || alpha) && (!dbeta || beta) && (band > 0 || (!dalpha && !dbeta)), "band", "positive where a threshold learns");
  if (lse.numel() == 0 || n_keys == 0) return;
  check(base2.numel() > 0 && (bits.numel() > 0 || (!alpha && topk == 0)), "base2 and bits", "kept by the forward pass");
  for_type(query, [&](auto zero) {
    using T = decltype(zero);
    Call<T>(call, saved).backward(d_out, data<T>(dq), data<T>(dk), data<T>(dv), dalpha ? data<float>(*dalpha) : nullptr,
                                  dbeta ? data<float>(*dbeta) : nullptr);
  });
}

void asa_cuda_neighbors(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta, Optional real, int64_t height,
                        int64_t width, int64_t window, int64_t topk, bool reciprocal, double scale, Tensor out, Tensor lse,
                        Tensor lse_kept, Tensor survivors, Tensor kappa, Tensor log_mean, Tensor bits, Tensor local,
                        Tensor rest, Tensor base2, Tensor row_offsets, Tensor col_indices) {
  const Arguments call{query, key, value, alpha, beta, real, height, width, window, topk, reciprocal, scale, 0};
  const SavedTensors saved{out, lse, lse_kept, survivors, kappa, log_mean, bits, local, rest, base2};
  check_arguments(call), check_saved(saved, call);
  check_contiguous(row_offsets, "row_offsets", ScalarType::Long, {lse.numel() + 1});
  check_contiguous(col_indices, "col_indices", ScalarType::Int, {col_indices.numel()});
  if (col_indices.numel() == 0) return;
  check(bits.numel() > 0 || (!alpha && topk == 0), "bits", "kept by the forward pass");
  for_type(query, [&](auto zero) {
    Call<decltype(zero)>(call, saved).graph(data<const int64_t>(row_offsets), data<int32_t>(col_indices));
  });
}

}  // namespace
}  // namespace asa_ops::cuda

#if defined(__CUDACC__)
#define ASA_OPS_DEVICE CUDA
#else
#define ASA_OPS_DEVICE CPU
#endif

STABLE_TORCH_LIBRARY_IMPL(asa_ops, ASA_OPS_DEVICE, m) {
  m.impl("asa_cuda_fwd", TORCH_BOX(&asa_ops::cuda::asa_cuda_fwd));
  m.impl("asa_cuda_bwd", TORCH_BOX(&asa_ops::cuda::asa_cuda_bwd));
  m.impl("asa_cuda_neighbors", TORCH_BOX(&asa_ops::cuda::asa_cuda_neighbors));
}
