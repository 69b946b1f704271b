// asa_ops::asa_fwd, asa_bwd and asa_list_survivors on a GPU: checks, buffers, and the launches of a call in their order.

#include "../../asa.h"
#include "problem.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__CUDACC__)
// Exists only in torch's builds with CUDA; weak, so that the library loads with the others too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace asa_ops::cuda {
namespace {

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

// Buffers on the device of a tensor. When it ends, work that comes later in the stream may use their memory.
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

Strides strides_of(const Tensor& x, int64_t heads) {
  const int shared = x.size(1) > 0 ? static_cast<int>(heads / x.size(1)) : 1;
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3), shared};
}

Multiplier multiplier(const Optional& x) {
  if (!x) return {};
  const MultiplierStrides strides(*x);
  return {data<const float>(*x), {strides.image, strides.head, strides.row, 0}};
}

// Whether two tensors are the same numbers in memory.
bool is_same(const Tensor& x, const Tensor& y) {
  for (int i = 0; i < 4; ++i)
    if (x.size(i) != y.size(i) || x.stride(i) != y.stride(i)) return false;
  return x.data_ptr() == y.data_ptr();
}

// How many parts to cut each program's work into, so that waves of programs fill the device; every part takes memory.
int parts_of(int64_t programs, int limit) {
  const double slots = 2.0 * processors();
  int best = 1;
  const auto time = [&](int parts) { return std::ceil(programs * parts / slots) / parts + 0.02 * parts; };
  for (int parts = 2; parts <= limit; ++parts)
    if (time(parts) < time(best)) best = parts;
  return best;
}

constexpr int kMaxParts = 4;

// Threshold gradients read A_ji where M_ij is 0; without them M itself is stored, which is cheaper to read.
bool has_one_way_bits(const Arguments& x) { return x.options.band > 0 && x.options.reciprocal && x.alpha; }

// What is kept of a head, where a backward follows; otherwise what a forward needs itself.
Kept kept_of(const Arguments& x, bool keep) {
  const int64_t n = x.n_q(), halves = x.type() == ScalarType::Float ? 0 : 2;
  const int64_t bits = int64_t(padded(x.n_k())) / kBlock * padded(n) * kRowBytes;
  return Kept(x, bits, keep ? n * x.dim_v() * halves : 0, keep ? 3 * n * 4 : 0, keep && has_one_way_bits(x));
}

void check_all(const Arguments& x) {
  x.check_all();
  check(x.dim() <= 256 && x.dim_v() <= 256, "D", "at most 256");
  check(x.n_q() < 1 << 28 && x.n_k() < 1 << 28, "N", "below 2^28");  // eight rows of a map in an int
  const ScalarType type = x.type();
  check(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, "query",
        "float16, bfloat16 or float32");
}

// What a backward pass writes; gradients of thresholds, of every row, where they are asked for.
struct Gradients {
  Tensor dq, dk, dv;
  Optional dalpha, dbeta;
};

template <class T>
class Call {
 public:
  // `keep`: whether `saved` has, or gets, what a backward needs.
  Call(const Arguments& arguments, const Outputs& saved, bool keep)
      : arguments_(arguments), scratch_(arguments.query), stream_(current_stream(arguments.query)) {
    const Arguments& x = arguments;
    const Options& options = x.options;
    p_.heads = static_cast<int>(x.heads()), p_.n_heads = static_cast<int>(x.batch() * x.heads());
    p_.dim = static_cast<int>(x.dim()), p_.dim_v = static_cast<int>(x.dim_v());
    p_.width = padded_width(p_.dim), p_.width_v = padded_width(p_.dim_v);
    p_.per_image = x.real ? 1 : 0;
    p_.window = x.beta ? static_cast<int>(options.window) : 0;
    p_.topk = options.topk < x.n_k() ? static_cast<int>(options.topk) : 0;
    p_.has_bits = x.has_neighbours();
    p_.mutual = options.reciprocal && p_.has_bits;
    p_.few = p_.mutual && p_.topk > 0 && p_.topk <= kFew;
    p_.one_way_bits = has_one_way_bits(x);
    p_.scale = static_cast<float>(options.scale), p_.scale2 = static_cast<float>(options.scale * kLog2E);
    p_.alpha = multiplier(x.alpha), p_.beta = multiplier(x.beta);
    const bool map = x.is_map();
    p_.grid_height = static_cast<int>(map ? options.height : 1);
    p_.grid_width = static_cast<int>(map ? options.width : x.n_k());
    p_.keys = order(x.key, x.real, p_.grid_height, p_.grid_width);
    // One order for each image if keys have padding, as kernels expect.
    p_.rows = x.n_q() == x.n_k() ? p_.keys
                                 : order(x.query, std::nullopt, 1, static_cast<int>(x.n_q()), x.real ? x.batch() : 1);

    saved_.out = data<T>(saved.out), saved_.survivors = data<int32_t>(saved.survivors);
    saved_.lse = data<float>(saved.lse), saved_.lse_kept = data<float>(saved.lse_kept);
    is_dense_ = !p_.has_bits && !x.beta;
    const Kept kept = kept_of(x, keep);
    kept_bytes_ = kept.bytes * p_.n_heads;
    kept_ = keep ? data<char>(saved.kept) : reinterpret_cast<char*>(scratch_.template get<uint8_t>(kept_bytes_));
    const auto piece = [&](auto& numbers, int64_t begin, int64_t end) {
      if (begin < end) numbers = {reinterpret_cast<decltype(numbers.data)>(kept_ + begin), kept.bytes};
      numbers.stride /= sizeof(*numbers.data);
    };
    piece(saved_.kappa2, kept.kappa, kept.log_mean), piece(saved_.log_mean2, kept.log_mean, kept.local);
    piece(saved_.local, kept.local, kept.residual), piece(saved_.residual, kept.residual, kept.base2);
    piece(saved_.base2, kept.base2, kept.bytes);
    if (p_.has_bits)
      set_bits(kept_ + kept.bits, kept.bytes);
    else if (is_dense_)
      set_bits(reinterpret_cast<char*>(scratch_.template get<uint8_t>(p_.n_heads * head_bytes())), head_bytes());
  }

  void forward() {
    arrange_tokens();
    const int row_blocks = p_.rows.blocks(), key_blocks = p_.keys.blocks();
    const int64_t rows = all_rows();
    const int splits = parts_of(int64_t(p_.n_heads) * row_blocks, std::min(8, key_blocks));
    Scratch scratch(arguments_.query);
    auto* const largest = scratch.get<float>(splits * rows);
    auto* const total = scratch.get<float>(splits * rows);
    // The peaks too: those of blocks without keys are never written; and the rows of padding, which nothing writes.
    if (p_.has_bits || arguments_.real) clear_memory(kept_, kept_bytes_, stream_);
    find_statistics(p_, splits, largest, total, stream_);
    if (p_.topk > 0) find_kth(p_, saved_.kappa2, stream_);
    // Threshold gradients read A_ji of pairs (i, j) in the band below the threshold of i: in these tiles too.
    const float band2 = p_.one_way_bits ? band() * static_cast<float>(kLog2E) : 0;
    const Thresholds thresholds = new_thresholds(scratch);
    find_thresholds(p_, splits, largest, total, saved_, band2, thresholds, stream_);
    const uint8_t* occupied = nullptr;
    if (p_.has_bits) {
      uint8_t* const found = has_tiles() ? scratch.get<uint8_t>(tiles()) : nullptr;
      if (found != nullptr) clear_memory(found, tiles(), stream_);
      const uint8_t* const flags = thresholds.flags;
      const Lists lists = list(scratch, flags, p_.mutual ? flags : nullptr, p_.mutual, true);
      find_neighbours(p_, thresholds, lists, found, stream_);
      occupied = found;
    } else if (is_dense_) {
      keep_everybody(p_, stream_);
      occupied = find_occupied_tiles(scratch);
    }
    Parts values;
    Totals totals{};
    if (has_tiles()) {
      values = new_parts(scratch, true, p_.width_v);
      const int64_t numbers = values.splits * rows;
      totals = {scratch.get<float>(numbers), scratch.get<float>(numbers), scratch.get<int32_t>(numbers)};
      const Lists lists = list_occupied(scratch, occupied, true);
      sum_neighbours(Sum::kValues, p_, lists, {}, values, totals, stream_);
    }
    finish_out(p_, values, totals, saved_, stream_);
  }

  void backward(const Tensor& d_out, const Gradients& gradients) {
    if (std::is_same_v<T, Half>) {
      p_.bounds = scratch_.template get<uint32_t>(2 * p_.n_heads);
      clear_memory(p_.bounds, 2 * p_.n_heads * sizeof(uint32_t), stream_);
    }
    arrange_tokens();
    const RowGradients row = arrange_d_out(d_out);
    if (is_dense_) keep_everybody(p_, stream_);
    float *const dalpha = data<float>(gradients.dalpha), *const dbeta = data<float>(gradients.dbeta);  // of every row
    const bool learns_mutual = dalpha != nullptr && p_.mutual;
    const uint8_t* const occupied = has_tiles() || learns_mutual ? find_occupied_tiles(scratch_) : nullptr;
    {
      Scratch scratch(arguments_.query);
      Lists lists{};
      if (has_tiles()) lists = list_occupied(scratch, occupied, true);
      if constexpr (std::is_same_v<T, float>) {
        Parts errors;
        if (has_tiles()) sum_neighbours(Sum::kDelta, p_, lists, row, errors = new_parts(scratch, true, 1), {}, stream_);
        correct_delta(p_, saved_, row, errors, stream_);
      }
      Parts sums_q, sums_t;
      if (has_tiles())
        sum_neighbours(Sum::kDq, p_, lists, row, sums_q = new_parts(scratch, true, p_.width), {}, stream_);
      Thresholds thresholds{};
      if (dalpha != nullptr) {
        // Tiles with a score in the band around their rows' thresholds and, if mutual, a neighbour the other way.
        thresholds = new_thresholds(scratch);
        find_thresholds(p_, 0, nullptr, nullptr, saved_, band() * static_cast<float>(kLog2E), thresholds, stream_);
        const Lists in_band = list(scratch, thresholds.flags, p_.mutual ? occupied : nullptr, false, true);
        sum_thresholds(p_, thresholds, in_band, row, band(), sums_t = new_parts(scratch, true, 1), stream_);
      }
      finish_dq(p_, saved_, row, thresholds, band(), sums_q, sums_t, data<T>(gradients.dq), dalpha, dbeta, stream_);
    }
    Scratch scratch(arguments_.query);
    Parts sums_k, sums_v;
    if (has_tiles()) {
      const Lists lists = list_occupied(scratch, occupied, false);
      sum_neighbours(Sum::kDk, p_, lists, row, sums_k = new_parts(scratch, false, p_.width), {}, stream_);
      sum_neighbours(Sum::kDv, p_, lists, row, sums_v = new_parts(scratch, false, p_.width_v), {}, stream_);
    }
    finish_dkv(p_, saved_, row, sums_k, sums_v, data<T>(gradients.dk), data<T>(gradients.dv), stream_);
  }

  void graph(const int64_t* row_offsets, int32_t* col_indices, int64_t columns) {
    if (is_dense_) keep_everybody(p_, stream_);
    write_columns(p_, saved_, row_offsets, col_indices, columns, stream_);
  }

 private:
  Order order(const Tensor& x, const Optional& real, int height, int width, int64_t images = 1) {
    if (real) images = real->size(0);
    const int n = static_cast<int>(x.size(2)), room = padded(n);
    auto* const order = scratch_.template get<int32_t>(images * room);
    auto* const place = scratch_.template get<int32_t>(images * n);
    auto* const counts = scratch_.template get<int32_t>(images);
    find_order(data<const bool>(real), static_cast<int>(images), n, height, width, room, order, place, counts, stream_);
    return {n, room, order, place, counts};
  }

  Tokens<T> tokens(const Tensor& x, const Order& order, int width) {
    T* const out = scratch_.template get<T>(int64_t(p_.n_heads) * order.padded * width);
    return {data<const T>(x), strides_of(x, p_.heads), order, static_cast<int>(x.size(3)), width, out};
  }

  void arrange_tokens() {
    const int64_t words = int64_t(p_.n_heads) * p_.keys.padded / 32;
    auto* const not_finite = scratch_.template get<uint32_t>(words);
    clear_memory(not_finite, words * sizeof(uint32_t), stream_);
    p_.symmetric = is_same(arguments_.query, arguments_.key);
    const Tokens<T> value = tokens(arguments_.value, p_.keys, p_.width_v);
    const Tokens<T> query = tokens(arguments_.query, p_.rows, p_.width);
    const Tokens<T> key = p_.symmetric ? query : tokens(arguments_.key, p_.keys, p_.width);
    arrange(value, query, key, p_.symmetric ? 2 : 3, p_.n_heads, p_.heads, p_.per_image, not_finite, p_.bounds,
            stream_);
    p_.q = query.out, p_.k = key.out, p_.v = value.out;
    p_.not_finite = not_finite;
  }

  // Arranges the gradient of the output; returns what the backward knows of rows.
  RowGradients arrange_d_out(const Tensor& d_out) {
    const int64_t rows = all_rows();
    const auto numbers = [&] { return scratch_.template get<float>(rows); };
    T* const arranged = scratch_.template get<T>(rows * p_.width_v);
    const RowGradients row{numbers(), numbers(), numbers(),
                           numbers(), numbers(), scratch_.template get<uint32_t>(p_.n_heads)};
    clear_memory(row.not_finite_head, p_.n_heads * sizeof(uint32_t), stream_);
    arrange_gradient(p_, data<const T>(d_out), strides_of(d_out, p_.heads), saved_, arranged, row, stream_);
    p_.d_out = arranged;
    return row;
  }

  // A head's bits are followed by its peaks.
  size_t words_bytes() const { return size_t(p_.keys.padded) / 8 * p_.rows.padded; }
  size_t head_bytes() const { return size_t(p_.keys.blocks()) * p_.rows.padded * kRowBytes; }

  void set_bits(char* first, int64_t stride) {
    p_.words = reinterpret_cast<uint32_t*>(first), p_.words_stride = stride / 4;
    p_.peaks = reinterpret_cast<Half*>(first + words_bytes()), p_.peaks_stride = stride / 2;
  }

  float band() const { return static_cast<float>(arguments_.options.band); }

  int64_t all_rows() const { return int64_t(p_.n_heads) * p_.rows.padded; }

  // Whether there are neighbours, and tiles sum them.
  bool has_tiles() const { return p_.words != nullptr && !p_.few; }

  int64_t tiles() const { return int64_t(p_.n_heads) * p_.rows.blocks() * p_.keys.blocks(); }

  Thresholds new_thresholds(Scratch& scratch) const {
    if (!p_.has_bits) return {};
    const int64_t rows = all_rows();
    return {scratch.get<float>(rows), scratch.get<float>(rows), p_.topk > 0 ? scratch.get<float>(rows) : nullptr,
            scratch.get<uint8_t>(tiles())};
  }

  Parts new_parts(Scratch& scratch, bool of_rows, int width) const {
    const Order& own = of_rows ? p_.rows : p_.keys;
    const int splits = parts_of(int64_t(p_.n_heads) * own.blocks(), kMaxParts);
    return {scratch.get<float>(int64_t(splits) * p_.n_heads * own.padded * width), splits};
  }

  Lists list(Scratch& scratch, const uint8_t* by_rows, const uint8_t* by_columns, bool upper, bool of_rows) const {
    const int blocks = (of_rows ? p_.rows : p_.keys).blocks(), others = (of_rows ? p_.keys : p_.rows).blocks();
    const Lists lists{scratch.get<int32_t>(int64_t(p_.n_heads) * blocks * others),
                      scratch.get<int32_t>(int64_t(p_.n_heads) * blocks), others};
    list_blocks(by_rows, by_columns, upper, p_.n_heads, blocks, lists, stream_);
    return lists;
  }

  // A flag for every tile: whether it holds a neighbour.
  const uint8_t* find_occupied_tiles(Scratch& scratch) const {
    auto* const flags = scratch.get<uint8_t>(tiles());
    find_occupied(p_, flags, stream_);
    return flags;
  }

  // For every block of queries, or of keys, the blocks of the other side with neighbours.
  Lists list_occupied(Scratch& scratch, const uint8_t* occupied, bool of_rows) const {
    return list(scratch, of_rows || p_.mutual ? occupied : nullptr, !of_rows || p_.mutual ? occupied : nullptr, false,
                of_rows);
  }

  const Arguments& arguments_;
  Problem<T> p_{};
  Saved<T> saved_{};
  bool is_dense_ = false;  // neither alpha, beta nor topk: all keys are neighbours
  char* kept_ = nullptr;
  int64_t kept_bytes_ = 0;
  Scratch scratch_;
  cudaStream_t stream_;
};

// Calls run(T{}) for the numbers that x is made of, on its device.
template <class Run>
void for_type(const Tensor& x, Run run) {
#if defined(__CUDACC__)
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#endif
  if (x.scalar_type() == ScalarType::Half) return run(Half{});
  if (x.scalar_type() == ScalarType::BFloat16) return run(BFloat16{});
  run(0.0f);
}

Arguments arguments_of(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& alpha,
                       const Optional& beta, const Optional& real, const Options& options) {
  const Arguments given{query, key, value, alpha, beta, real, options};
  check_all(given);
  const auto in_float = [](const Optional& x) {
    return x && x->scalar_type() != ScalarType::Float ? torch::stable::to(*x, ScalarType::Float) : x;
  };
  return {query,          key,
          value,          in_float(alpha),
          in_float(beta), real && !real->is_contiguous() ? torch::stable::contiguous(*real) : real,
          options};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> asa_fwd(Tensor query, Tensor key, Tensor value, Optional alpha,
                                                           Optional beta, Optional key_padding_mask,
                                                           std::vector<int64_t> grid, std::vector<int64_t> window,
                                                           int64_t topk, bool reciprocal, double scale, double band,
                                                           bool keep, int64_t row_start,
                                                           std::optional<int64_t> row_stop, Optional rows_statistics) {
  check_rows(query, row_start, row_stop, rows_statistics);
  const Arguments x = arguments_of(query, key, value, alpha, beta, key_padding_mask,
                                   Options(grid, window, topk, reciprocal, scale, keep ? band : 0));
  const Outputs outputs = x.new_outputs(keep ? kept_of(x, true).bytes : 0);
  if (x.is_empty() || (x.real && x.n_q() == x.n_k())) Arguments::clear(outputs);  // kernels do not write padding
  if (!x.is_empty()) for_type(query, [&](auto zero) { Call<decltype(zero)>(x, outputs, keep).forward(); });
  return {outputs.out, outputs.lse, outputs.lse_kept, outputs.survivors, outputs.kept};
}

// The gradient of a multiplier from that of all rows, float32 [B, heads, N_q]: those that share it add up.
Tensor sum_to(const Tensor& multiplier, Tensor rows) {
  std::vector<int64_t> shared;
  for (int64_t i = 0; i < 3; ++i)
    if (multiplier.size(i) != rows.size(i)) shared.push_back(i);
  if (!shared.empty()) rows = torch::stable::sum(rows, shared, true);
  return rows.scalar_type() == multiplier.scalar_type() ? rows : torch::stable::to(rows, multiplier.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> asa_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                                           Optional alpha, Optional beta, Optional key_padding_mask,
                                                           Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors,
                                                           Tensor kept, std::vector<int64_t> grid,
                                                           std::vector<int64_t> window, int64_t topk, bool reciprocal,
                                                           double scale, double band, int64_t row_start,
                                                           std::optional<int64_t> row_stop, Optional rows_statistics) {
  check_rows(query, row_start, row_stop, rows_statistics);
  const Arguments x = arguments_of(query, key, value, alpha, beta, key_padding_mask,
                                   Options(grid, window, topk, reciprocal, scale, band));
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  x.check_saved(saved, kept_of(x, true).bytes);
  check(grad_out, "grad_out", query, x.type(), {x.batch(), x.heads(), x.n_q(), x.dim_v()});
  const bool written = !x.is_empty() && !x.real, learns = !x.is_empty() && band > 0;  // kernels do not write padding
  const auto rows = [&](const Optional& multiplier) -> Optional {
    if (!multiplier || !learns) return std::nullopt;
    const std::vector<int64_t> shape = {x.batch(), x.heads(), x.n_q()};
    return written ? torch::stable::new_empty(lse, shape) : torch::stable::new_zeros(lse, shape);
  };
  // Of the keys of every query head, rounded; those that share them are added up in the end.
  const auto of_keys = [&](const Tensor& tokens) {
    const std::vector<int64_t> shape = {x.batch(), x.heads(), x.n_k(), tokens.size(3)};
    return written ? torch::stable::new_empty(tokens, shape) : torch::stable::new_zeros(tokens, shape);
  };
  const Gradients gradients{x.new_gradient(query, written), of_keys(key), of_keys(value), rows(alpha), rows(beta)};
  if (!x.is_empty())
    for_type(query, [&](auto zero) { Call<decltype(zero)>(x, saved, true).backward(grad_out, gradients); });
  const auto of_multiplier = [&](const Optional& multiplier, const Optional& of_rows) {
    if (!multiplier) return torch::stable::new_empty(query, {x.batch(), 0, 0});
    return of_rows ? sum_to(*multiplier, *of_rows) : x.new_gradient(*multiplier, false);
  };
  const auto of_key_heads = [&](const Tensor& dx) {
    if (x.group() == 1) return dx;
    const std::vector<int64_t> shape = {x.batch(), x.key_heads(), x.group(), x.n_k(), dx.size(3)}, shared = {2};
    return torch::stable::sum(torch::stable::view(dx, shape), shared);
  };
  return {gradients.dq, of_key_heads(gradients.dk), of_key_heads(gradients.dv), of_multiplier(alpha, gradients.dalpha),
          of_multiplier(beta, gradients.dbeta)};
}

void asa_list_survivors(Tensor query, Tensor key, Tensor value, Optional alpha, Optional beta,
                        Optional key_padding_mask, Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors,
                        Tensor kept, std::vector<int64_t> grid, std::vector<int64_t> window, int64_t topk,
                        bool reciprocal, double scale, double band, Tensor row_offsets, Tensor col_indices) {
  const Arguments x = arguments_of(query, key, value, alpha, beta, key_padding_mask,
                                   Options(grid, window, topk, reciprocal, scale, band));
  const Outputs saved{out, lse, lse_kept, survivors, kept};
  x.check_saved(saved, kept_of(x, true).bytes);
  check_contiguous(row_offsets, "row_offsets", query, ScalarType::Long, {x.n_heads() * x.n_q() + 1});
  check_contiguous(col_indices, "col_indices", query, ScalarType::Int, {col_indices.numel()});
  if (col_indices.numel() == 0) return;
  for_type(query, [&](auto zero) {
    Call<decltype(zero)>(x, saved, true)
        .graph(data<const int64_t>(row_offsets), data<int32_t>(col_indices), col_indices.numel());
  });
}

}  // namespace
}  // namespace asa_ops::cuda

#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(asa_ops, CUDA, m) {
  m.impl("asa_fwd", TORCH_BOX(&asa_ops::cuda::asa_fwd));
  m.impl("asa_bwd", TORCH_BOX(&asa_ops::cuda::asa_bwd));
  m.impl("asa_list_survivors", TORCH_BOX(&asa_ops::cuda::asa_list_survivors));
}
#else  // an emulation on CPU tensors, for the tests
STABLE_TORCH_LIBRARY_FRAGMENT(asa_ops, m) {
  m.def((std::string("asa_emulated_fwd") + asa_ops::kForwardSchema).c_str());
  m.def((std::string("asa_emulated_bwd") + asa_ops::kBackwardSchema).c_str());
  m.def((std::string("asa_emulated_list_survivors") + asa_ops::kListSurvivorsSchema).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(asa_ops, CPU, m) {
  m.impl("asa_emulated_fwd", TORCH_BOX(&asa_ops::cuda::asa_fwd));
  m.impl("asa_emulated_bwd", TORCH_BOX(&asa_ops::cuda::asa_bwd));
  m.impl("asa_emulated_list_survivors", TORCH_BOX(&asa_ops::cuda::asa_list_survivors));
}
#endif
