// The launches of a call of adaptive sparse attention on a GPU in their order.

#pragma once

#include "arguments.h"
#include "hopper/launchers.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <type_traits>
#include <utility>

namespace asa_ops::cuda {

template <class T>
class Call {
 public:
  // Of a whole map. `keep`: whether `saved` has, or gets, what a backward needs. `tf32`: whether products of float32
  // may take TF32.
  Call(const Arguments& x, const Outputs& saved, bool keep, bool tf32)
      : Call(x, saved, Computed::whole(x), runs_on_hopper<T>(x, tf32)) {
    const Kept kept = kept_of(x, keep);
    set_kept(kept, KeptBits(x), keep ? data<char>(saved.kept) : new_kept(kept));
  }

  // Of some rows and keys, by the general set of kernels.
  Call(const Arguments& x, const Outputs& saved, const Computed& computed) : Call(x, saved, computed, false) {}

  // Where what is kept lies.
  void set_kept(const Kept& kept, const KeptBits& bits, char* first) {
    const auto piece = [&](auto& numbers, int64_t begin, int64_t end) {
      if (begin < end) numbers = {reinterpret_cast<decltype(numbers.data)>(first + begin), kept.bytes};
      numbers.stride /= sizeof(*numbers.data);
    };
    piece(saved_.kappa2, kept.kappa, kept.log_mean), piece(saved_.log_mean2, kept.log_mean, kept.local);
    piece(saved_.local, kept.local, kept.residual), piece(saved_.residual, kept.residual, kept.base2);
    piece(saved_.base2, kept.base2, kept.bytes);
    if (p_.has_bits && kept.bits < kept.kappa) set_bits(bits, first + kept.bits, kept.bytes);
  }
  char* new_kept(const Kept& kept) {
    return reinterpret_cast<char*>(scratch_.template get<uint8_t>(kept.bytes * p_.n_heads));
  }

  // Of a whole map.
  void forward() {
    if (on_hopper_ && is_dense()) {  // no thresholds, so no statistics but those of the output
      reserve_cleared(lists_of_pairs());
      uint32_t* const counters = get_cleared(lists_of_pairs());
      arrange(p_, arranging(kForward), stream_);
      return aggregate(every_block(true, 2), counters);
    }
    const int64_t tile_words = int64_t(p_.rows.blocks()) * groups_of(arguments_.n_k());
    reserve_cleared(p_.n_heads * (3 * tile_words + 3) + lists_of_pairs());
    Plan plan{};
    plan.statistics = new_statistics();
    uint32_t* done = nullptr;
    if (p_.has_bits) {
      if (p_.peaks.data == nullptr) p_.peaks = new_bounds();
      // With alpha a row with a score that is NaN, which no floor shows, has no neighbours.
      if (on_hopper_ && arguments_.alpha) p_.floors = new_bounds();
      set_thresholds(plan);
      plan.reached = tiles_of(p_.rows, scratch_.template get<uint32_t>(p_.n_heads * tile_words), tile_words);
      if (p_.mutual) plan.reached_back = tiles_of(p_.rows, get_cleared(p_.n_heads * tile_words), tile_words);
      plan.local = tiles_of(p_.rows, get_cleared(p_.n_heads * tile_words), tile_words);
      if (p_.floors.data != nullptr) {
        plan.whole = tiles_of(p_.rows, scratch_.template get<uint32_t>(p_.n_heads * tile_words), tile_words);
        if (p_.mutual) plan.whole_back = tiles_of(p_.rows, get_cleared(p_.n_heads * tile_words), tile_words);
      }
      plan.done = get_cleared(p_.n_heads), plan.entries = get_cleared(p_.n_heads), done = get_cleared(p_.n_heads);
      plan.lists = new_lists(true, blocks_of_lists());
    }
    uint32_t* const counters = get_cleared(lists_of_pairs());
    arrange(p_, arranging(kForward), stream_);
    if (on_hopper_)
      hopper::find_statistics(p_, plan.statistics, stream_);
    else
      find_statistics(p_, plan.statistics, stream_);
    if (p_.topk > 0) find_kth(p_, saved_.kappa2, stream_);
    make_plan(p_, plan, saved_, stream_);
    Lists lists{};
    if (p_.has_bits) {
      if (has_tiles()) lists = new_lists(true, blocks_of_lists());
      if (on_hopper_)
        hopper::find_survivors(p_, plan, saved_, done, lists, stream_);
      else
        find_survivors(p_, plan, saved_, done, lists, stream_);
    }
    if (on_hopper_ && has_tiles()) return aggregate(lists, counters);
    find_out(lists);
  }

  void backward(const Tensor& d_out, const Gradients& gradients) {
    // Zeroed before the first kernel, which notes both.
    auto* const noted = scratch_.template get<uint32_t>(3 * p_.n_heads);
    clear_memory(noted, 3 * p_.n_heads * sizeof(uint32_t), stream_);
    if (std::is_same_v<T, Half>) p_.bounds = noted + p_.n_heads;
    const RowGradients row = row_gradients(scratch_.template get<float>(kRowGradients * all_rows()), noted);
    const bool on_hopper = on_hopper_ && has_tiles();
    const int64_t key_blocks = int64_t(p_.n_heads) * p_.keys.blocks();
    reserve_cleared(int64_t(p_.n_heads) * p_.rows.blocks() + lists_of_pairs() + key_blocks);
    const Learning learning = new_learning(gradients);
    uint32_t *const row_counters = get_cleared(lists_of_pairs()), *const key_counters = get_cleared(key_blocks);
    Arranging<T> all = arranging(kBackward);
    all.gradient = tokens(d_out, p_.rows, p_.width_v, true);
    p_.d_out = all.gradient.out, p_.d_out_transposed = all.gradient.transposed;
    const auto [by_rows, by_columns] = lists_of_survivors(on_hopper ? blocks_of_lists() : 1);
    arrange_backward(p_, all, saved_, row, by_rows, by_columns, stream_);
    if (on_hopper) {
      learn(row, learning);
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
    if (!on_hopper_) end_delta(row, by_rows);  // TF32 rounds more than delta is off
    find_dq(row, by_rows, gradients);
    learn(row, learning);
    find_dkv(row, by_columns, gradients);
  }

  // Of some rows and keys: the stages between which processes that share a map tell each other of their rows.

  // `numbers` and `flags` of these rows; peaks null: they are not kept.
  void scan(float* numbers, uint8_t* flags, Half* peaks) {
    Plan plan{};
    plan.statistics = new_statistics();
    if (p_.has_bits) {
      p_.peaks = peaks == nullptr ? new_bounds() : bounds_of(peaks);
      set_thresholds(plan);
      const int64_t words = int64_t(p_.rows.count) * groups_of(arguments_.n_k());
      plan.reached = tiles_of(p_.rows, scratch_.template get<uint32_t>(p_.n_heads * words), words);
    }
    arrange(p_, arranging(kForward), stream_);
    find_statistics(p_, plan.statistics, stream_);
    if (p_.topk > 0) find_kth(p_, saved_.kappa2, stream_);
    make_plan(p_, plan, saved_, stream_);
    tell_rows(p_, plan, saved_, numbers, flags, stream_);
  }

  // `numbers` and `flags` of all rows.
  void attend(const float* numbers, const uint8_t* flags) {
    const Order every_row = whole(p_.rows);
    const int64_t words = int64_t(every_row.count) * groups_of(arguments_.n_k());
    reserve_cleared(p_.n_heads * (words + 2));
    Plan plan{};
    Lists lists{}, of_keys{};
    uint32_t* done = nullptr;
    if (p_.has_bits) {
      set_thresholds(plan);
      plan.reached = tiles_of(every_row, scratch_.template get<uint32_t>(p_.n_heads * words), words);
      plan.local = tiles_of(every_row, get_cleared(p_.n_heads * words), words);
      plan.done = get_cleared(p_.n_heads), done = get_cleared(p_.n_heads);
      plan.lists = new_lists(true);
      if (has_tiles()) lists = new_lists(true);
      if (p_.columns.words != nullptr && !p_.mutual) of_keys = with_room(every_block(every_row, p_.keys));
    }
    arrange(p_, arranging(kForward), stream_);
    take_rows(p_, plan, of_keys, saved_, numbers, flags, stream_);
    if (p_.has_bits) find_survivors(p_, plan, saved_, done, lists, stream_);
    if (of_keys.entries != nullptr) {  // neighbours one way: the pairs of all rows with these keys, of no rows
      Problem<T> problem = p_;
      problem.rows.count = 0;
      plan.lists = of_keys;
      find_survivors(problem, plan, saved_, done, Lists{}, stream_);
    }
    find_out(lists);
  }

  // Of these rows: the gradient of the output, arranged; RowGradients; and what is noted of heads, [3, n_heads].
  void begin_backward(const Tensor& d_out, T* arranged, float* of_rows, uint32_t* noted) {
    clear_memory(noted, 3 * p_.n_heads * sizeof(uint32_t), stream_);
    if (std::is_same_v<T, Half>) p_.bounds = noted + p_.n_heads;
    const RowGradients row = row_gradients(of_rows, noted);
    Arranging<T> all = arranging(kBackward);
    all.gradient = tokens(d_out, p_.rows, p_.width_v, true);
    p_.d_out = all.gradient.out = arranged;
    const auto [by_rows, by_columns] = lists_of_survivors(1);
    arrange_backward(p_, all, saved_, row, by_rows, by_columns, stream_);
    end_delta(row, by_rows);
  }

  // The same of all rows. `numbers`: null, or local survivors of all rows are among them.
  void end_backward(const T* d_out, float* of_rows, uint32_t* noted, Half* peaks, const float* numbers,
                    const Gradients& gradients) {
    const RowGradients row = row_gradients(of_rows, noted);
    reserve_cleared(int64_t(p_.n_heads) * p_.rows.count);
    if (peaks != nullptr) p_.peaks = bounds_of(peaks);
    const Learning learning = new_learning(gradients);
    const Arranging<T> all = arranging(kBackward);
    const auto [by_rows, by_columns] = lists_of_survivors(1);
    arrange_backward(p_, all, saved_, row, by_rows, by_columns, stream_);
    if (numbers != nullptr) take_rows(p_, {}, {}, saved_, numbers, nullptr, stream_);
    p_.d_out = d_out;
    if (std::is_same_v<T, Half>) p_.bounds = noted + p_.n_heads;
    find_dq(row, by_rows, gradients);
    learn(row, learning);
    find_dkv(row, by_columns, gradients);
  }

  void graph(const int64_t* row_offsets, int32_t* col_indices, int64_t columns) {
    arrange(p_, arranging(kForward), stream_);  // for the orders
    write_columns(p_, saved_, row_offsets, col_indices, columns, stream_);
  }

 private:
  enum Pass { kForward, kBackward };

  Call(const Arguments& x, const Outputs& saved, const Computed& computed, bool on_hopper)
      : arguments_(x), on_hopper_(on_hopper), scratch_(x.query), stream_(current_stream(x.query)) {
    const Options& options = x.options;
    p_.heads = static_cast<int>(x.heads()), p_.n_heads = static_cast<int>(x.batch() * x.heads());
    p_.dim = static_cast<int>(x.dim()), p_.dim_v = static_cast<int>(x.dim_v());
    p_.width = padded_width(p_.dim), p_.width_v = padded_width(p_.dim_v);
    if (on_hopper_) p_.width = p_.width_v = std::max(p_.width, p_.width_v);
    p_.per_image = x.real ? 1 : 0;
    p_.window = static_cast<int>(x.positions());
    std::copy_n(options.window, 3, p_.sides);
    p_.topk = options.topk < x.n_k() ? static_cast<int>(options.topk) : 0;
    p_.has_bits = x.has_neighbours();
    p_.mutual = options.reciprocal && p_.has_bits;
    p_.few = takes_few(x);
    p_.scale = static_cast<float>(options.scale), p_.scale2 = static_cast<float>(options.scale * kLog2E);
    p_.alpha = multiplier(x.alpha), p_.beta = multiplier(x.beta);
    const bool map = x.is_map();
    p_.keys = new_order(x.key, x.real, map ? options.depth : 1, map ? options.height : 1,
                        map ? options.width : x.n_k() - options.extra, options.extra);
    // One order for each image if keys have padding, as kernels expect.
    p_.rows = x.n_q() == x.n_k() ? p_.keys : new_order(x.query, std::nullopt, 1, 1, x.n_q(), 0, x.real ? x.batch() : 1);

    p_.rows.first = computed.rows.first, p_.rows.count = computed.rows.count;
    p_.keys.first = computed.keys.first, p_.keys.count = computed.keys.count;

    saved_.out = data<T>(saved.out), saved_.survivors = data<int32_t>(saved.survivors);
    saved_.lse = data<float>(saved.lse), saved_.lse_kept = data<float>(saved.lse_kept);
  }

  static Order whole(Order order) {
    order.first = 0, order.count = order.blocks();
    return order;
  }

  // Bits of tiles, those of a head `words` after one another, from the first block of rows on that is computed.
  TileBits tiles_of(const Order& rows, uint32_t* first, int64_t words) const {
    const int groups = groups_of(arguments_.n_k());
    return {first - int64_t(rows.first) * groups, words, groups};
  }

  // Of the scores of a row with a block of keys.
  PerHead<Half> bounds_of(Half* first) const {
    return {first - p_.rows.first * kBlock, int64_t(p_.keys.blocks()) * p_.rows.computed()};
  }
  PerHead<Half> new_bounds() {
    return bounds_of(scratch_.template get<Half>(int64_t(p_.n_heads) * p_.keys.blocks() * p_.rows.computed()));
  }

  // Sums are cut into as many parts for some rows as for all of them.
  Statistics new_statistics() {
    const int row_blocks = p_.rows.blocks(), key_blocks = p_.keys.blocks();
    Statistics statistics{};
    if (on_hopper_)
      statistics = hopper::cut_statistics(row_blocks, key_blocks, p_.n_heads);
    else
      statistics.splits = parts_of(int64_t(p_.n_heads) * row_blocks, std::min(8, key_blocks));
    const int64_t numbers = int64_t(statistics.splits) * p_.n_heads * p_.rows.computed();
    statistics.largest = scratch_.template get<float>(numbers);
    statistics.total = scratch_.template get<float>(numbers);
    return statistics;
  }

  void set_thresholds(Plan& plan) {
    const auto numbers = [&] { return scratch_.template get<float>(all_rows()); };
    plan.thresholds = {numbers(), numbers(), p_.topk > 0 ? numbers() : nullptr};
    // Threshold gradients read A_ji of pairs (i, j) in the band below the threshold of i: in these tiles too.
    plan.band2 = has_one_way_bits(arguments_) ? band() * static_cast<float>(kLog2E) : 0;
  }

  // The rows' outputs, from tiles of survivors that are listed, if they are.
  void find_out(const Lists& lists) {
    Parts values;
    Totals totals{};
    if (has_tiles()) {
      values = new_parts(scratch_, true, p_.width_v);
      const int64_t numbers = int64_t(values.splits) * p_.n_heads * p_.rows.computed();
      totals = {scratch_.template get<float>(numbers), scratch_.template get<float>(numbers),
                scratch_.template get<int32_t>(numbers)};
      sum_survivors(Sum::kValues, p_, lists.entries != nullptr ? lists : every_block(true), {}, values, totals,
                    stream_);
    }
    finish_out(p_, values, totals, saved_, stream_);
  }

  // Lists of survivors, by rows and by columns, that arrange_backward() writes.
  std::pair<Lists, Lists> lists_of_survivors(int row_blocks) {
    const bool listed = p_.has_bits && !p_.few;
    if (listed) return {new_lists(true, row_blocks), new_lists(false)};
    return {every_block(true, row_blocks), every_block(false)};
  }

  // The fields of RowGradients, one after another.
  RowGradients row_gradients(float* first, uint32_t* noted) const {
    const int64_t rows = all_rows();
    return {first, first + rows, first + 2 * rows, first + 3 * rows, first + 4 * rows, noted};
  }

  Learning new_learning(const Gradients& gradients) {
    float *const dalpha = data<float>(gradients.dalpha), *const dbeta = data<float>(gradients.dbeta);  // of every row
    Learning learning{band(), dalpha, dbeta, nullptr, nullptr, 0, nullptr};
    if (dalpha == nullptr && dbeta == nullptr) return learning;
    const int64_t blocks = int64_t(p_.n_heads) * p_.rows.count;
    if (dalpha != nullptr)
      learning.splits = parts_of(int64_t(p_.n_heads) * p_.rows.blocks(), std::min(kMaxParts, p_.keys.blocks()));
    learning.entries = scratch_.template get<uint32_t>(blocks * (p_.keys.blocks() + learning.splits));
    learning.parts = scratch_.template get<float>((learning.splits + 1) * blocks * kBlock);
    learning.done = get_cleared(blocks);
    return learning;
  }

  void learn(const RowGradients& row, const Learning& learning) const {
    if (learning.entries != nullptr) find_threshold_gradients(p_, saved_, row, learning, stream_);
  }

  void end_delta(const RowGradients& row, const Lists& by_rows) {
    if constexpr (std::is_same_v<T, float>) {
      Scratch scratch(arguments_.query);
      Parts errors;
      if (has_tiles()) sum_survivors(Sum::kDelta, p_, by_rows, row, errors = new_parts(scratch, true, 1), {}, stream_);
      correct_delta(p_, saved_, row, errors, stream_);
    }
  }

  void find_dq(const RowGradients& row, const Lists& by_rows, const Gradients& gradients) {
    Scratch scratch(arguments_.query);
    Parts sums;
    if (has_tiles()) sum_survivors(Sum::kDq, p_, by_rows, row, sums = new_parts(scratch, true, p_.width), {}, stream_);
    finish_dq(p_, saved_, row, sums, data<T>(gradients.dq), stream_);
  }

  void find_dkv(const RowGradients& row, const Lists& by_columns, const Gradients& gradients) {
    Scratch scratch(arguments_.query);
    Parts sums_k, sums_v;
    if (has_tiles()) {
      sum_survivors(Sum::kDk, p_, by_columns, row, sums_k = new_parts(scratch, false, p_.width), {}, stream_);
      sum_survivors(Sum::kDv, p_, by_columns, row, sums_v = new_parts(scratch, false, p_.width_v), {}, stream_);
    }
    finish_dkv(p_, saved_, row, sums_k, sums_v, data<T>(gradients.dk), data<T>(gradients.dv), stream_);
  }

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

  Order new_order(const Tensor& x, const Optional& real, int64_t depth, int64_t height, int64_t width, int64_t extra,
                  int64_t images = 1) {
    if (real) images = real->size(0);
    const int n = static_cast<int>(x.size(2)), room = padded(n);
    int32_t* const counts = scratch_.template get<int32_t>(2 * images);
    return {n,
            room,
            0,
            room / kBlock,
            static_cast<int>(depth),
            static_cast<int>(height),
            static_cast<int>(width),
            static_cast<int>(extra),
            data<const bool>(real),
            scratch_.template get<int32_t>(images * room),
            scratch_.template get<int32_t>(images * n),
            counts,
            counts + images};
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
    const Order rows = whole(p_.rows), keys = whole(p_.keys);
    all.value = tokens(arguments_.value, keys, p_.width_v, pass == kForward);
    all.query = tokens(arguments_.query, rows, p_.width, pass == kBackward);
    if (!p_.symmetric) all.key = tokens(arguments_.key, keys, p_.width, pass == kBackward);
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

  void set_bits(const KeptBits& kept, char* first, int64_t stride) {
    const Arguments& x = arguments_;
    const auto words = [&](int64_t at) { return reinterpret_cast<uint32_t*>(first + at); };
    const auto bits_of_keys = [&](int64_t at) {
      return PairBits{words(at) - int64_t(p_.keys.first) * 2 * p_.rows.padded, stride / 4, p_.rows.padded};
    };
    p_.survivors = {words(0) - p_.rows.first * kBlock, stride / 4, p_.rows.computed()};
    if (kept.columns < kept.one_way) p_.columns = bits_of_keys(kept.columns);
    p_.occupied = tiles_of(p_.rows, words(kept.occupied), stride / 4);
    const int groups = groups_of(x.n_q());
    p_.occupied_columns = {words(kept.occupied_columns) - int64_t(p_.keys.first) * groups, stride / 4, groups};
    if (has_one_way_bits(x)) {
      p_.one_way = bits_of_keys(kept.one_way);
      p_.offered = tiles_of(p_.rows, words(kept.offered), stride / 4);
    }
    if (kept.peaks < kept.occupied) p_.peaks = {reinterpret_cast<Half*>(first + kept.peaks), stride / 2};
  }

  float band() const { return static_cast<float>(arguments_.options.band); }

  int64_t all_rows() const { return int64_t(p_.n_heads) * p_.rows.padded; }

  // Whether tiles sum over survivors: neighbours, unless they are few, or everybody.
  bool has_tiles() const { return p_.has_bits ? !p_.few : p_.window == 0; }

  Parts new_parts(Scratch& scratch, bool of_rows, int width) const {
    const Order& own = of_rows ? p_.rows : p_.keys;
    const int splits = parts_of(int64_t(p_.n_heads) * own.blocks(), kMaxParts);
    return {scratch.get<float>(int64_t(splits) * p_.n_heads * own.computed() * width), splits};
  }

  // Every block, without a list; tiles of so many blocks.
  Lists every_block(const Order& own, const Order& other, int blocks = 1) const {
    Lists lists;
    lists.blocks = blocks, lists.first = own.first;
    lists.tiles = (own.count + blocks - 1) / blocks;
    lists.others = other.blocks();
    return lists;
  }
  Lists every_block(bool of_rows, int blocks = 1) const {
    return every_block(of_rows ? p_.rows : p_.keys, of_rows ? p_.keys : p_.rows, blocks);
  }

  // Room for lists.
  Lists with_room(Lists lists) {
    const int64_t tiles = int64_t(p_.n_heads) * lists.tiles;
    lists.entries = scratch_.template get<uint32_t>(tiles * lists.others);
    lists.lengths = scratch_.template get<int32_t>(tiles);
    return lists;
  }
  Lists new_lists(bool of_rows, int blocks = 1) { return with_room(every_block(of_rows, blocks)); }

  const Arguments& arguments_;
  const bool on_hopper_;
  Problem<T> p_{};
  Saved<T> saved_{};
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

}  // namespace asa_ops::cuda
