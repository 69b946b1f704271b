// asa_ops::asa_fwd, asa_bwd and asa_list_survivors on a GPU: checks, buffers, and the launches of a call in their order.

#include "../../asa.h"
#include "hopper/launchers.h"
#include "problem.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
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

// Threshold gradients read A_ji where M_ij is 0.
bool has_one_way_bits(const Arguments& x) { return x.options.band > 0 && x.options.reciprocal && x.alpha; }

// Threshold gradients take the tiles whose peaks come near a threshold.
bool keeps_peaks(const Arguments& x) { return x.options.band > 0 && x.alpha; }

int groups_of(int64_t n) { return (padded(n) / kBlock + 31) / 32; }

// What is kept of the bits of a head, and where it begins, in bytes. asa_ops.asa.types.bits_shape is the same in Python.
struct KeptBits {
  int64_t one_way, peaks, occupied, occupied_columns, offered, bytes;  // survivors come first

  explicit KeptBits(const Arguments& x) {
    const int64_t rows = padded(x.n_q()), keys = padded(x.n_k());
    const int64_t pairs = rows * keys / 8, by_rows = rows / kBlock * groups_of(x.n_k()) * 4;
    one_way = pairs;
    peaks = one_way + (has_one_way_bits(x) ? pairs : 0);
    occupied = peaks + (keeps_peaks(x) ? rows * keys / kBlock * int64_t(sizeof(Half)) : 0);
    occupied_columns = occupied + by_rows;
    offered = occupied_columns + keys / kBlock * groups_of(x.n_q()) * 4;
    bytes = offered + (has_one_way_bits(x) ? by_rows : 0);
  }
};

// What is kept of a head, where a backward follows; otherwise what a forward needs itself.
Kept kept_of(const Arguments& x, bool keep) {
  const int64_t n = x.n_q(), halves = x.type() == ScalarType::Float ? 0 : 2;
  return Kept(x, x.n_q(), KeptBits(x).bytes, keep ? n * x.dim_v() * halves : 0, keep ? 3 * n * 4 : 0);
}

void check_all(const Arguments& x) {
  x.check_all();
  check(x.dim() <= 256 && x.dim_v() <= 256, "D", "at most 256");
  const int64_t* const window = x.options.window;
  check(!x.beta || (x.options.depth <= 1 && window[0] == 1 && window[1] == window[2]), "window",
        "square: others do not work on a GPU yet");
  check(x.n_q() < 1 << 28 && x.n_k() < 1 << 28, "N", "below 2^28");  // eight rows of a map in an int
  const ScalarType type = x.type();
  check(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, "query",
        "float16, bfloat16 or float32");
}

// Whether the kernels for compute capability 9.0 run a call: THE place that decides it. Only where they are asked for,
// as long as no GPU has shown that they are right there and faster. They take float32 as TF32, if `tf32` allows it and
// its tiles fit.
template <class T>
bool runs_on_hopper(const Arguments& x, bool tf32) {
  const char* const asked = std::getenv("ASA_OPS_HOPPER");
  if (asked == nullptr || std::string(asked) != "1") return false;
  if (!(static_cast<float>(x.options.scale * kLog2E) > 0)) return false;
  if (std::is_same_v<T, float> && !(tf32 && padded_width(std::max(x.dim(), x.dim_v())) <= 128)) return false;
  // Entries of lists are counted in 32 bits.
  if (x.n_heads() * (padded(x.n_q()) / kBlock) > INT32_MAX / (padded(x.n_k()) / kBlock)) return false;
#if defined(__CUDACC__)
  return std::string(ASA_OPS_CUDA_ARCHS).find("90a") != std::string::npos && compute_capability() == 90;
#else
  return true;
#endif
}

// What a backward pass writes; gradients of thresholds, of every row, where they are asked for.
struct Gradients {
  Tensor dq, dk, dv;
  Optional dalpha, dbeta;
};

template <class T>
class Call {
 public:
  // `keep`: whether `saved` has, or gets, what a backward needs. `tf32`: whether products of float32 may take TF32.
  Call(const Arguments& arguments, const Outputs& saved, bool keep, bool tf32)
      : arguments_(arguments), scratch_(arguments.query), stream_(current_stream(arguments.query)) {
    const Arguments& x = arguments;
    const Options& options = x.options;
    p_.heads = static_cast<int>(x.heads()), p_.n_heads = static_cast<int>(x.batch() * x.heads());
    p_.dim = static_cast<int>(x.dim()), p_.dim_v = static_cast<int>(x.dim_v());
    p_.width = padded_width(p_.dim), p_.width_v = padded_width(p_.dim_v);
    on_hopper_ = runs_on_hopper<T>(x, tf32);
    if (on_hopper_) p_.width = p_.width_v = std::max(p_.width, p_.width_v);
    p_.per_image = x.real ? 1 : 0;
    p_.window = x.beta ? static_cast<int>(options.window[2]) : 0;
    p_.topk = options.topk < x.n_k() ? static_cast<int>(options.topk) : 0;
    p_.has_bits = x.has_neighbours();
    p_.mutual = options.reciprocal && p_.has_bits;
    p_.few = p_.mutual && p_.topk > 0 && p_.topk <= kFew;
    p_.scale = static_cast<float>(options.scale), p_.scale2 = static_cast<float>(options.scale * kLog2E);
    p_.alpha = multiplier(x.alpha), p_.beta = multiplier(x.beta);
    const bool map = x.is_map();
    p_.keys = new_order(x.key, x.real, map ? options.depth * options.height : 1, map ? options.width : x.n_k());
    // One order for each image if keys have padding, as kernels expect.
    p_.rows = x.n_q() == x.n_k() ? p_.keys : new_order(x.query, std::nullopt, 1, x.n_q(), x.real ? x.batch() : 1);

    saved_.out = data<T>(saved.out), saved_.survivors = data<int32_t>(saved.survivors);
    saved_.lse = data<float>(saved.lse), saved_.lse_kept = data<float>(saved.lse_kept);
    const Kept kept = kept_of(x, keep);
    char* const first = keep ? data<char>(saved.kept)
                             : reinterpret_cast<char*>(scratch_.template get<uint8_t>(kept.bytes * p_.n_heads));
    const auto piece = [&](auto& numbers, int64_t begin, int64_t end) {
      if (begin < end) numbers = {reinterpret_cast<decltype(numbers.data)>(first + begin), kept.bytes};
      numbers.stride /= sizeof(*numbers.data);
    };
    piece(saved_.kappa2, kept.kappa, kept.log_mean), piece(saved_.log_mean2, kept.log_mean, kept.local);
    piece(saved_.local, kept.local, kept.residual), piece(saved_.residual, kept.residual, kept.base2);
    piece(saved_.base2, kept.base2, kept.bytes);
    if (p_.has_bits) set_bits(first + kept.bits, kept.bytes);
  }

  void forward() {
    if (on_hopper_ && is_dense()) {  // no thresholds, so no statistics but those of the output
      reserve_cleared(lists_of_pairs());
      uint32_t* const counters = get_cleared(lists_of_pairs());
      arrange(p_, arranging(kForward), stream_);
      return aggregate(every_block(true, 2), counters);
    }
    const int row_blocks = p_.rows.blocks(), key_blocks = p_.keys.blocks();
    const int64_t rows = all_rows();
    const int64_t tile_words = int64_t(row_blocks) * groups_of(arguments_.n_k());
    reserve_cleared(p_.n_heads * (3 * tile_words + 3) + lists_of_pairs());
    Plan plan{};
    Statistics& statistics = plan.statistics;
    if (on_hopper_)
      statistics = hopper::cut_statistics(row_blocks, key_blocks, p_.n_heads);
    else
      statistics.splits = parts_of(int64_t(p_.n_heads) * row_blocks, std::min(8, key_blocks));
    statistics.largest = scratch_.template get<float>(statistics.splits * rows);
    statistics.total = scratch_.template get<float>(statistics.splits * rows);
    uint32_t* done = nullptr;
    if (p_.has_bits) {
      const auto new_bounds = [&] {  // of the scores of a row with a block of keys
        const int64_t stride = int64_t(key_blocks) * p_.rows.padded;
        return PerHead<Half>{scratch_.template get<Half>(p_.n_heads * stride), stride};
      };
      if (p_.peaks.data == nullptr) p_.peaks = new_bounds();
      // With alpha a row with a score that is NaN, which no floor shows, has no neighbours.
      if (on_hopper_ && arguments_.alpha) p_.floors = new_bounds();
      plan.thresholds = {scratch_.template get<float>(rows), scratch_.template get<float>(rows),
                         p_.topk > 0 ? scratch_.template get<float>(rows) : nullptr};
      // Threshold gradients read A_ji of pairs (i, j) in the band below the threshold of i: in these tiles too.
      plan.band2 = p_.one_way.words != nullptr ? band() * static_cast<float>(kLog2E) : 0;
      const auto tile_bits = [&](uint32_t* words) { return TileBits{words, tile_words, groups_of(arguments_.n_k())}; };
      plan.reached = tile_bits(scratch_.template get<uint32_t>(p_.n_heads * tile_words));
      plan.reached_back = tile_bits(get_cleared(p_.n_heads * tile_words));
      plan.local = tile_bits(get_cleared(p_.n_heads * tile_words));
      if (p_.floors.data != nullptr) {
        plan.whole = tile_bits(scratch_.template get<uint32_t>(p_.n_heads * tile_words));
        plan.whole_back = tile_bits(get_cleared(p_.n_heads * tile_words));
      }
      plan.done = get_cleared(p_.n_heads), plan.entries = get_cleared(p_.n_heads), done = get_cleared(p_.n_heads);
      plan.lists = new_lists(true, blocks_of_lists());
    }
    uint32_t* const counters = get_cleared(lists_of_pairs());
    arrange(p_, arranging(kForward), stream_);
    if (on_hopper_)
      hopper::find_statistics(p_, statistics, stream_);
    else
      find_statistics(p_, statistics, stream_);
    if (p_.topk > 0) find_kth(p_, saved_.kappa2, stream_);
    make_plan(p_, plan, saved_, stream_);
    Lists lists{};
    if (p_.has_bits) {
      lists = new_lists(true, blocks_of_lists());
      if (on_hopper_)
        hopper::find_survivors(p_, plan, saved_, done, lists, stream_);
      else
        find_survivors(p_, plan, saved_, done, lists, stream_);
    }
    if (on_hopper_ && has_tiles()) return aggregate(lists, counters);
    Parts values;
    Totals totals{};
    if (has_tiles()) {
      values = new_parts(scratch_, true, p_.width_v);
      const int64_t numbers = values.splits * rows;
      totals = {scratch_.template get<float>(numbers), scratch_.template get<float>(numbers),
                scratch_.template get<int32_t>(numbers)};
      sum_survivors(Sum::kValues, p_, lists.entries != nullptr ? lists : every_block(true), {}, values, totals,
                    stream_);
    }
    finish_out(p_, values, totals, saved_, stream_);
  }

  void backward(const Tensor& d_out, const Gradients& gradients) {
    const int64_t rows = all_rows();
    const auto numbers = [&] { return scratch_.template get<float>(rows); };
    // Zeroed before the first kernel, which notes both.
    auto* const noted = scratch_.template get<uint32_t>(3 * p_.n_heads);
    clear_memory(noted, 3 * p_.n_heads * sizeof(uint32_t), stream_);
    if (std::is_same_v<T, Half>) p_.bounds = noted + p_.n_heads;
    const RowGradients row{numbers(), numbers(), numbers(), numbers(), numbers(), noted};
    float *const dalpha = data<float>(gradients.dalpha), *const dbeta = data<float>(gradients.dbeta);  // of every row
    Learning learning{band(), dalpha, dbeta, nullptr, nullptr, 0, nullptr};
    const bool on_hopper = on_hopper_ && has_tiles();
    const int64_t blocks = int64_t(p_.n_heads) * p_.rows.blocks(), key_blocks = int64_t(p_.n_heads) * p_.keys.blocks();
    reserve_cleared(blocks + lists_of_pairs() + key_blocks);
    if (dalpha != nullptr || dbeta != nullptr) {
      if (dalpha != nullptr) learning.splits = parts_of(blocks, std::min(kMaxParts, p_.keys.blocks()));
      learning.entries = scratch_.template get<uint32_t>(blocks * (p_.keys.blocks() + learning.splits));
      learning.parts = scratch_.template get<float>((learning.splits + 1) * rows);
      learning.done = get_cleared(blocks);
    }
    uint32_t *const row_counters = get_cleared(lists_of_pairs()), *const key_counters = get_cleared(key_blocks);
    Arranging<T> all = arranging(kBackward);
    all.gradient = tokens(d_out, p_.rows, p_.width_v, true);
    p_.d_out = all.gradient.out, p_.d_out_transposed = all.gradient.transposed;
    const bool listed = p_.has_bits && !p_.few;
    const int row_blocks = on_hopper ? blocks_of_lists() : 1;  // of a list
    const Lists by_rows = listed ? new_lists(true, row_blocks) : every_block(true, row_blocks);
    const Lists by_columns = listed ? new_lists(false) : every_block(false);
    arrange_backward(p_, all, saved_, row, by_rows, by_columns, stream_);
    const auto learn = [&] {
      if (dalpha != nullptr || dbeta != nullptr) find_threshold_gradients(p_, saved_, row, learning, stream_);
    };
    if (on_hopper) {
      learn();
      {
        Scratch scratch(arguments_.query);
        const int programs = hopper::programs_of(by_rows, p_.n_heads);
        const auto parts = new_partial_sums(scratch, by_rows, programs, row_counters);
        hopper::find_dq(p_, by_rows, row, parts, programs, data<T>(gradients.dq), stream_);
      }
      Scratch scratch(arguments_.query);
      const int programs = hopper::programs_of(by_columns, p_.n_heads);
      const auto parts = new_partial_sums(scratch, by_columns, programs, key_counters);
      hopper::find_dkv(p_, by_columns, row, parts, programs, data<T>(gradients.dk), data<T>(gradients.dv), stream_);
      return;
    }
    {
      Scratch scratch(arguments_.query);
      if constexpr (std::is_same_v<T, float>)
        if (!on_hopper_) {  // TF32 rounds more than delta is off
          Parts errors;
          if (has_tiles())
            sum_survivors(Sum::kDelta, p_, by_rows, row, errors = new_parts(scratch, true, 1), {}, stream_);
          correct_delta(p_, saved_, row, errors, stream_);
        }
      Parts sums;
      if (has_tiles())
        sum_survivors(Sum::kDq, p_, by_rows, row, sums = new_parts(scratch, true, p_.width), {}, stream_);
      finish_dq(p_, saved_, row, sums, data<T>(gradients.dq), stream_);
    }
    learn();
    Scratch scratch(arguments_.query);
    Parts sums_k, sums_v;
    if (has_tiles()) {
      sum_survivors(Sum::kDk, p_, by_columns, row, sums_k = new_parts(scratch, false, p_.width), {}, stream_);
      sum_survivors(Sum::kDv, p_, by_columns, row, sums_v = new_parts(scratch, false, p_.width_v), {}, stream_);
    }
    finish_dkv(p_, saved_, row, sums_k, sums_v, data<T>(gradients.dk), data<T>(gradients.dv), stream_);
  }

  void graph(const int64_t* row_offsets, int32_t* col_indices, int64_t columns) {
    arrange(p_, arranging(kForward), stream_);  // for the orders
    write_columns(p_, saved_, row_offsets, col_indices, columns, stream_);
  }

 private:
  enum Pass { kForward, kBackward };

  // Blocks of rows of a list.
  int blocks_of_lists() const { return on_hopper_ ? 2 : 1; }

  // Lists of two blocks of rows.
  int64_t lists_of_pairs() const { return int64_t(p_.n_heads) * every_block(true, 2).tiles; }

  hopper::PartialSums new_partial_sums(Scratch& scratch, const Lists& lists, int programs, uint32_t* done) const {
    const int64_t rows = int64_t(2) * programs * lists.blocks * kBlock;
    // Two sums of every key, or one of every query with two numbers.
    return {scratch.get<float>(rows * p_.width * (lists.blocks == 1 ? 2 : 1)), scratch.get<float>(2 * rows), done};
  }

  void aggregate(const Lists& lists, uint32_t* counters) {
    const int programs = hopper::programs_of(lists, p_.n_heads);
    hopper::aggregate(p_, lists, saved_, new_partial_sums(scratch_, lists, programs, counters), programs, stream_);
  }

  bool is_dense() const { return !p_.has_bits && p_.window == 0; }

  Order new_order(const Tensor& x, const Optional& real, int64_t height, int64_t width, int64_t images = 1) {
    if (real) images = real->size(0);
    const int n = static_cast<int>(x.size(2)), room = padded(n);
    return {n,
            room,
            static_cast<int>(height),
            static_cast<int>(width),
            data<const bool>(real),
            scratch_.template get<int32_t>(images * room),
            scratch_.template get<int32_t>(images * n),
            scratch_.template get<int32_t>(images)};
  }

  // `summed`: whether products sum over the tokens, which takes them transposed in TF32.
  Tokens<T> tokens(const Tensor& x, const Order& order, int width, bool summed) {
    const int64_t count = int64_t(p_.n_heads) * order.padded * width;
    T* const out = scratch_.template get<T>(count);
    T* const transposed = summed && takes_tf32() && has_tiles() ? scratch_.template get<T>(count) : nullptr;
    const int dim = static_cast<int>(x.size(3));
    return {data<const T>(x), strides_of(x, p_.heads), order, dim, width, reads_by_groups(x), out, transposed};
  }

  bool takes_tf32() const { return std::is_same_v<T, float> && on_hopper_; }

  // Whether every token lies at a multiple of 16 bytes, and is as long.
  static bool reads_by_groups(const Tensor& x) {
    constexpr int64_t kGroup = 16 / sizeof(T);
    bool aligned = x.stride(3) == 1 && x.size(3) % kGroup == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
    for (int i = 0; i < 3; ++i) aligned = aligned && (x.size(i) == 1 || x.stride(i) % kGroup == 0);
    return aligned;
  }

  // The inputs, and room for them arranged. Call it last: it takes what was asked for to be cleared.
  Arranging<T> arranging(Pass pass) {
    p_.not_finite = scratch_.template get<uint32_t>(int64_t(p_.n_heads) * p_.keys.padded / 32);
    p_.symmetric = is_same(arguments_.query, arguments_.key);
    Arranging<T> all{};
    all.value = tokens(arguments_.value, p_.keys, p_.width_v, pass == kForward);
    all.query = tokens(arguments_.query, p_.rows, p_.width, pass == kBackward);
    if (!p_.symmetric) all.key = tokens(arguments_.key, p_.keys, p_.width, pass == kBackward);
    all.to_tf32 = takes_tf32();
    all.cleared = cleared_, all.cleared_words = cleared_words_;
    const Tokens<T>& key = p_.symmetric ? all.query : all.key;
    p_.q = all.query.out, p_.k = key.out, p_.v = all.value.out;
    p_.q_transposed = all.query.transposed, p_.k_transposed = key.transposed, p_.v_transposed = all.value.transposed;
    return all;
  }

  // Words that the first kernel of a pass sets to 0.
  void reserve_cleared(int64_t words) { cleared_ = scratch_.template get<uint32_t>(words); }
  uint32_t* get_cleared(int64_t words) {
    cleared_words_ += words;
    return cleared_ + cleared_words_ - words;
  }

  void set_bits(char* first, int64_t stride) {
    const KeptBits kept(arguments_);
    const auto words = [&](int64_t at) { return reinterpret_cast<uint32_t*>(first + at); };
    p_.survivors = {words(0), stride / 4};
    p_.occupied = {words(kept.occupied), stride / 4, groups_of(arguments_.n_k())};
    p_.occupied_columns = {words(kept.occupied_columns), stride / 4, groups_of(arguments_.n_q())};
    if (has_one_way_bits(arguments_)) {
      p_.one_way = {words(kept.one_way), stride / 4};
      p_.offered = {words(kept.offered), stride / 4, groups_of(arguments_.n_k())};
    }
    if (keeps_peaks(arguments_)) p_.peaks = {reinterpret_cast<Half*>(first + kept.peaks), stride / 2};
  }

  float band() const { return static_cast<float>(arguments_.options.band); }

  int64_t all_rows() const { return int64_t(p_.n_heads) * p_.rows.padded; }

  // Whether tiles sum over survivors: neighbours, unless they are few, or everybody.
  bool has_tiles() const { return p_.has_bits ? !p_.few : p_.window == 0; }

  Parts new_parts(Scratch& scratch, bool of_rows, int width) const {
    const Order& own = of_rows ? p_.rows : p_.keys;
    const int splits = parts_of(int64_t(p_.n_heads) * own.blocks(), kMaxParts);
    return {scratch.get<float>(int64_t(splits) * p_.n_heads * own.padded * width), splits};
  }

  // Every block, without a list; tiles of so many blocks.
  Lists every_block(bool of_rows, int blocks = 1) const {
    Lists lists;
    lists.blocks = blocks;
    lists.tiles = ((of_rows ? p_.rows : p_.keys).blocks() + blocks - 1) / blocks;
    lists.others = (of_rows ? p_.keys : p_.rows).blocks();
    return lists;
  }

  // Room for lists.
  Lists new_lists(bool of_rows, int blocks = 1) {
    Lists lists = every_block(of_rows, blocks);
    const int64_t tiles = int64_t(p_.n_heads) * lists.tiles;
    lists.entries = scratch_.template get<uint32_t>(tiles * lists.others);
    lists.lengths = scratch_.template get<int32_t>(tiles);
    return lists;
  }

  const Arguments& arguments_;
  Problem<T> p_{};
  Saved<T> saved_{};
  bool on_hopper_ = false;
  Scratch scratch_;
  uint32_t* cleared_ = nullptr;
  int64_t cleared_words_ = 0;
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
                                                           bool keep, bool tf32) {
  const Arguments x = arguments_of(query, key, value, alpha, beta, key_padding_mask,
                                   Options(grid, window, topk, reciprocal, scale, keep ? band : 0));
  const Outputs outputs = x.new_outputs(keep ? kept_of(x, true).bytes : 0);
  if (x.is_empty() || (x.real && x.n_q() == x.n_k())) Arguments::clear(outputs);  // kernels do not write padding
  if (!x.is_empty()) for_type(query, [&](auto zero) { Call<decltype(zero)>(x, outputs, keep, tf32).forward(); });
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
                                                           double scale, double band, bool tf32) {
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
    for_type(query, [&](auto zero) { Call<decltype(zero)>(x, saved, true, tf32).backward(grad_out, gradients); });
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
    Call<decltype(zero)>(x, saved, true, false)
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
