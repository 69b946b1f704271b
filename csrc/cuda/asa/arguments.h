// What is known of a call of adaptive sparse attention on a GPU before it runs: its arguments, checked; buffers; what is
// kept for a backward, and where; which set of kernels runs it.

#pragma once

#include "../../asa.h"
#include "problem.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__CUDACC__)
// Exists only in torch's builds with CUDA; weak, so that the library loads with the others too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace asa_ops::cuda {

inline cudaStream_t current_stream(const Tensor& x) {
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

inline int padded(int64_t n) { return static_cast<int>((n + kBlock - 1) / kBlock * kBlock); }

inline int padded_width(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

inline Strides strides_of(const Tensor& x, int64_t heads) {
  const int shared = x.size(1) > 0 ? static_cast<int>(heads / x.size(1)) : 1;
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3), shared};
}

inline Multiplier multiplier(const Optional& x) {
  if (!x) return {};
  const MultiplierStrides strides(*x);
  return {data<const float>(*x), {strides.image, strides.head, strides.row, 0}};
}

// Whether two tensors are the same numbers in memory.
inline bool is_same(const Tensor& x, const Tensor& y) {
  for (int i = 0; i < 4; ++i)
    if (x.size(i) != y.size(i) || x.stride(i) != y.stride(i)) return false;
  return x.data_ptr() == y.data_ptr();
}

// How many parts to cut each program's work into, so that waves of programs fill the device; every part takes memory.
inline int parts_of(int64_t programs, int limit) {
  const double slots = 2.0 * processors();
  int best = 1;
  const auto time = [&](int parts) { return std::ceil(programs * parts / slots) / parts + 0.02 * parts; };
  for (int parts = 2; parts <= limit; ++parts)
    if (time(parts) < time(best)) best = parts;
  return best;
}

constexpr int kMaxParts = 4;

// Threshold gradients read A_ji where M_ij is 0.
inline bool has_one_way_bits(const Arguments& x) { return x.options.band > 0 && x.options.reciprocal && x.alpha; }

// Threshold gradients take the tiles whose peaks come near a threshold.
inline bool keeps_peaks(const Arguments& x) { return x.options.band > 0 && x.alpha; }

inline int groups_of(int64_t n) { return (padded(n) / kBlock + 31) / 32; }

// Blocks of rows, or of keys.
struct Blocks {
  int first, count;

  int64_t positions() const { return int64_t(count) * kBlock; }
};

// The blocks of a map that a call computes.
struct Computed {
  Blocks rows, keys;
  bool all;

  static Computed whole(const Arguments& x) {
    return {{0, padded(x.n_q()) / kBlock}, {0, padded(x.n_k()) / kBlock}, true};
  }
};

// What is kept of the bits of a head, and where it begins, in bytes. asa_ops.asa.types.bits_shape is the same in Python
// for a whole map. Of some rows and keys alone there are `columns` too, if they are asked for, and peaks are apart.
struct KeptBits {
  int64_t columns, one_way, peaks, occupied, occupied_columns, offered, bytes;  // survivors come first

  KeptBits(const Arguments& x, const Computed& computed, bool has_columns) {
    const int64_t n_q = padded(x.n_q()), n_k = padded(x.n_k());
    const int64_t by_rows = int64_t(computed.rows.count) * groups_of(x.n_k()) * 4;
    const int64_t of_rows = computed.rows.positions() * n_k / 8, of_keys = computed.keys.positions() * n_q / 8;
    columns = of_rows;
    one_way = columns + (has_columns ? of_keys : 0);
    peaks = one_way + (has_one_way_bits(x) ? of_keys : 0);
    occupied = peaks + (keeps_peaks(x) && computed.all ? n_q * n_k / kBlock * int64_t(sizeof(Half)) : 0);
    occupied_columns = occupied + by_rows;
    offered = occupied_columns + int64_t(computed.keys.count) * groups_of(x.n_q()) * 4;
    bytes = offered + (has_one_way_bits(x) ? by_rows : 0);
  }
  explicit KeptBits(const Arguments& x) : KeptBits(x, Computed::whole(x), false) {}
};

// What is kept of a head, where a backward follows; otherwise what a forward needs itself.
inline Kept kept_of(const Arguments& x, int64_t bits, bool keep) {
  const int64_t n = x.n_q(), halves = x.type() == ScalarType::Float ? 0 : 2;
  return Kept(x, x.n_q(), bits, keep ? n * x.dim_v() * halves : 0, keep ? 3 * n * 4 : 0);
}
inline Kept kept_of(const Arguments& x, bool keep) { return kept_of(x, KeptBits(x).bytes, keep); }

inline void check_all(const Arguments& x) {
  x.check_all();
  check(x.dim() <= 256 && x.dim_v() <= 256, "D", "at most 256");
  check(x.n_q() < 1 << 28 && x.n_k() < 1 << 28, "N", "below 2^28");  // eight rows of a map in an int
  const ScalarType type = x.type();
  check(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, "query",
        "float16, bfloat16 or float32");
}

// Whether rows keep few neighbours; extra tokens keep everybody.
inline bool takes_few(const Arguments& x) {
  const int64_t topk = x.options.topk < x.n_k() ? x.options.topk : 0;
  return x.options.reciprocal && topk > 0 && topk <= kFew && x.options.extra == 0;
}

constexpr int kRowGradients = 5;  // numbers of a row

// Whether the kernels for compute capability 9.0 run a call: THE place that decides it. Only where they are asked for,
// as long as no GPU has shown that they are right there and faster. They take float32 as TF32, if `tf32` allows it and
// its tiles fit.
struct Size {
  int64_t n_heads, n_q, n_k, dim;  // the larger one of both head dims
  double scale;
};
template <class T>
bool runs_on_hopper(const Size& x, bool tf32) {
  const char* const asked = std::getenv("ASA_OPS_HOPPER");
  if (asked == nullptr || std::string(asked) != "1") return false;
  if (!(static_cast<float>(x.scale * kLog2E) > 0)) return false;
  if (std::is_same_v<T, float> && !(tf32 && padded_width(x.dim) <= 128)) return false;
  // Entries of lists are counted in 32 bits.
  if (x.n_heads * (padded(x.n_q) / kBlock) > INT32_MAX / (padded(x.n_k) / kBlock)) return false;
#if defined(__CUDACC__)
  return std::string(ASA_OPS_CUDA_ARCHS).find("90a") != std::string::npos && compute_capability() == 90;
#else
  return true;
#endif
}

template <class T>
bool runs_on_hopper(const Arguments& x, bool tf32) {
  return runs_on_hopper<T>(Size{x.n_heads(), x.n_q(), x.n_k(), std::max(x.dim(), x.dim_v()), x.options.scale}, tf32);
}

// What a backward pass writes; gradients of thresholds, of every row, where they are asked for.
struct Gradients {
  Tensor dq, dk, dv;
  Optional dalpha, dbeta;
};

// Room for it, 0 where kernels do not write: at padding. Gradients of keys are those of every query head, rounded;
// those that share them are added up in the end.
inline Gradients new_gradients(const Arguments& x) {
  const bool written = !x.is_empty() && !x.real, learns = !x.is_empty() && x.options.band > 0;
  const auto make = [&](int64_t n, int64_t dim) {
    const std::vector<int64_t> shape = {x.batch(), x.heads(), n, dim};
    return written ? torch::stable::new_empty(x.query, shape) : torch::stable::new_zeros(x.query, shape);
  };
  const auto rows = [&](const Optional& multiplier) -> Optional {
    if (!multiplier || !learns) return std::nullopt;
    const std::vector<int64_t> shape = {x.batch(), x.heads(), x.n_q()};
    return written ? torch::stable::new_empty(x.query, shape, ScalarType::Float)
                   : torch::stable::new_zeros(x.query, shape, ScalarType::Float);
  };
  return {make(x.n_q(), x.dim()), make(x.n_k(), x.dim()), make(x.n_k(), x.dim_v()), rows(x.alpha), rows(x.beta)};
}

inline void check_graph(const Arguments& x, const Tensor& row_offsets, const Tensor& col_indices) {
  check_contiguous(row_offsets, "row_offsets", x.query, ScalarType::Long, {x.n_heads() * x.n_q() + 1});
  check_contiguous(col_indices, "col_indices", x.query, ScalarType::Int, {col_indices.numel()});
}

inline Arguments arguments_of(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& alpha,
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

}  // namespace asa_ops::cuda
