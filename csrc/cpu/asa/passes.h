// The passes of a call in their order, for one head: of all its rows, or of those that one of several processes has.
#pragma once

#include "call.h"

#include <vector>

namespace asa_ops::cpu {

// Bytes of scores that a forward keeps, of one head: those of 2,048 tokens in float32. More of them leave the caches, and
// memory takes longer than forming them again where few pairs survive.
constexpr int64_t kKeptScores = 35 * 512 * 1024;

template <class T>
bool keeps_scores(const Kernels<T>& kernels, const Problem<T>& p) {
  const double rows = p.blocks_q * kBlock, bytes = kernels.score_stride(p) * sizeof(T);
  return p.thresholded && !p.is_one_block() && p.parts == 0 && rows * bytes <= kKeptScores;
}

// The outputs that scan() begins, row by row: how far it came, what Problem says of the sum, and the sum.
constexpr int64_t kBegunNumbers = 5;

// Which passes of a forward run. One that runs alone leaves, or finds, in `begun` the outputs that scan() begins,
// [rows][kBegunNumbers + dim_v].
template <class T>
struct Passes {
  bool scan = true, aggregate = true;
  T* begun = nullptr;
};

template <class T>
void write_begun(const Problem<T>& p, T* to) {
  for (int64_t i = p.begin; i < p.end; ++i, to += kBegunNumbers + p.dim_v) {
    std::fill_n(to, kBegunNumbers + p.dim_v, T(0));
    if (p.begun == nullptr) continue;
    to[0] = static_cast<T>(p.begun[i]);  // of a scan that runs alone nothing is complete, so never Begun::survivors
    to[1] = p.shift[i], to[2] = p.factor[i];
    if (p.begun[i] != Begun::neighbours) continue;
    to[3] = p.mass[i], to[4] = p.squares[i];
    std::copy_n(p.out + i * p.dim_v, p.dim_v, to + kBegunNumbers);
  }
}

template <class T>
void read_begun(const Problem<T>& p, const T* from) {
  for (int64_t i = p.begin; i < p.end; ++i, from += kBegunNumbers + p.dim_v) {
    const auto is = [&](Begun begun) { return from[0] == static_cast<T>(begun); };
    const bool may_be_put_off = p.parts == 0 && p.n_q == p.n_k && p.not_finite == nullptr;
    check(is(Begun::nothing) || is(Begun::neighbours) || (is(Begun::put_off) && may_be_put_off), "begun",
          "what rows_scan returned");
    p.begun[i] = static_cast<Begun>(static_cast<uint8_t>(from[0]));
    p.shift[i] = from[1], p.factor[i] = from[2], p.mass[i] = from[3], p.squares[i] = from[4];
    std::copy_n(from + kBegunNumbers, p.dim_v, p.out + i * p.dim_v);
  }
}

// Runs passes of a forward for some rows of a head. `p` says where to write, but for the output; without p.keeps what a
// backward would read goes to scratch.
template <class T>
void forward_head(const Call& call, Problem<T> p, int64_t i, int64_t threads, const Optional& out,
                  const Passes<T>& passes) {
  const auto& kernels = table<T>();
  const int64_t rows = p.end - p.begin;
  p.parts = parts_of(p, call.tokens(call.x.query, i), call.tokens(call.x.key, i));
  Workspace workspace(threads);
  Inputs<T> inputs(call, kernels, p, i, workspace);
  std::optional<Written<T>> written;
  if (out) written.emplace(kernels, call.tokens(*out, i), rows, workspace);
  const auto kept = workspace.add<char>(p.keeps ? 0 : call.kept.bytes);
  const bool one_block = p.is_one_block();
  p.keeps_scores = keeps_scores(kernels, p);
  const bool begins = p.thresholded && !one_block && !p.keeps_scores;
  const auto scores = workspace.add<T>(p.keeps_scores ? parts(rows, kBlock) * kBlock * kernels.score_stride(p) : 0);
  const auto sums = workspace.add<T>(out ? 0 : rows * p.dim_v);
  const int64_t begun_rows = begins ? rows : 0;
  const auto begun = workspace.add<Begun>(begun_rows);
  const auto complete = workspace.add<uint8_t>(begins ? p.blocks_q : 0);
  const auto shift = workspace.add<T>(begun_rows), factor = workspace.add<T>(begun_rows);
  const auto mass = workspace.add<T>(begun_rows), squares = workspace.add<T>(begun_rows);
  const auto sizes = workspace.add<T>(begins ? p.blocks_k * kBlock : 0);
  const bool sliced = p.parts == 0 && !one_block;
  const Packed<T> k_panels(kernels, p.n_k, p.dim, p.parts == 0, Packing::panels, workspace);
  const Packed<T> v_slices(kernels, p.n_k, p.dim_v, sliced, Packing::slices, workspace);
  const Tiles<T> k_tiles(kernels, p.n_k, p.dim, p.parts, Tiled::columns, workspace);
  const Tiles<T> v_tiles(kernels, p.n_k, p.dim_v, one_block ? 0 : p.parts, Tiled::terms, workspace);
  workspace.add_share(one_block ? kernels.forward_block_bytes(p) : kernels.scan_bytes(p));
  workspace.add_share(one_block ? 0 : kernels.aggregate_bytes(p));
  workspace.allocate_all();
  if (p.keeps)
    prefer_huge_pages(p.bits, p.thresholded ? call.words() * 8 : 0);
  else
    call.set_kept(p, kept.get(workspace));
  inputs.get(workspace);
  if (one_block && i + 1 < call.x.n_heads()) {
    prefetch(call.tokens(call.x.query, i + 1), p.n_q);
    for (const Tensor& x : {call.x.key, call.x.value}) prefetch(call.tokens(x, i + 1), p.n_k);
  }
  p.out = row_zero(written ? written->get(workspace) : sums.get(workspace), p.begin * p.dim_v);
  if (begins) {
    if (passes.scan && passes.aggregate) std::fill_n(p.complete = complete.get(workspace), p.blocks_q, uint8_t{0});
    p.begun = begun.get(workspace) - p.begin;
    p.shift = shift.get(workspace) - p.begin, p.factor = factor.get(workspace) - p.begin;
    p.mass = mass.get(workspace) - p.begin, p.squares = squares.get(workspace) - p.begin;
    kernels.find_sizes(p.v, p.n_k, p.dim_v, p.sizes = sizes.get(workspace));
    if (passes.scan)
      std::fill_n(p.begun + p.begin, rows, Begun::nothing);
    else
      read_begun(p, passes.begun);
  }
  if (p.keeps_scores) p.scores = scores.get(workspace);
  p.k_panels = k_panels.pack(p.k, workspace), p.v_slices = v_slices.pack(p.v, workspace);
  p.k_tiles = k_tiles.pack(p.k, workspace), p.v_tiles = v_tiles.pack(p.v, workspace);
  if (one_block) return kernels.forward_block(p, workspace.share(0)), written->finish(workspace);
  const auto run_scan = [&](const auto& kernel) {
    run({p.begin / kBlock, parts(p.end, kBlock)}, workspace,
        [&](Queue& queue, void* scratch) { kernel(p, queue, scratch); });
  };
  if (passes.scan && p.scanned()) run_scan(kernels.scan);
  if (p.thresholded && !passes.aggregate) write_begun(p, passes.begun);
  if (!passes.aggregate) return;
  if ((p.keeps_scores && !passes.scan) ||
      (begins && std::count(p.begun + p.begin, p.begun + p.end, Begun::put_off) > 0))
    run_scan(kernels.scan_again);
  run({0, parts(rows, p.q_at_a_time)}, workspace,
      [&](Queue& queue, void* scratch) { kernels.aggregate(p, queue, scratch); });
  written->finish(workspace);
}

// How the backward treats rows, and where their entries lie.
struct Layout {
  std::vector<Kind> kinds;
  std::vector<int32_t> keys, listed;
  std::vector<int64_t> numbers, columns;
  Groups groups;

  explicit Layout(int64_t rows)
      : kinds(rows),
        keys(rows),
        listed(rows),
        numbers(rows + 1),
        columns(rows + 1),
        groups{kinds.data(), keys.data(), listed.data(), numbers.data(), columns.data()} {}
  Layout(const Layout&) = delete;
};

template <class T>
void find_layout(const Kernels<T>& kernels, const Problem<T>& p, int64_t threads, const Layout& layout) {
  Workspace workspace(threads);
  workspace.add_share(kernels.find_groups_bytes(p));
  workspace.allocate_all();
  run({0, parts(p.end - p.begin, p.q_at_a_time)}, workspace,
      [&](Queue& queue, void* scratch) { kernels.find_groups(p, layout.groups, queue, scratch); });
  kernels.lay_out(p, layout.groups);
}

template <class T>
void check_survivors(const Problem<T>& p) {
  check(std::all_of(p.survivors, p.survivors + p.n_q, [&](int32_t x) { return x >= 0 && x <= p.n_k; }), "survivors",
        "between 0 and N_k");
}

// Bytes of survivors with their gradients that a backward holds at a time, for one head; kMostRows queries at least.
constexpr int64_t kSlabBytes = 16 * 1024 * 1024;

// Where the slabs of a head end: it decides in which order dk and dv are summed.
template <class T>
std::vector<int64_t> ends_of_slabs(const Problem<T>& p, const Layout& layout) {
  std::vector<int64_t> ends;
  const int64_t row = (p.blocks_k + 1) * sizeof(int32_t);
  for (int64_t begin = p.begin, end; begin < p.end; begin = end) {
    const auto longer = [&] { return std::min(p.end, end + kMostRows); };
    const auto bytes = [&](int64_t to) {
      return (layout.numbers[to] - layout.numbers[begin]) * static_cast<int64_t>(2 * sizeof(T)) +
             (layout.columns[to] - layout.columns[begin]) * static_cast<int64_t>(sizeof(int32_t)) + (to - begin) * row;
    };
    end = begin;
    do end = longer();
    while (end < p.end && bytes(longer()) <= kSlabBytes);
    ends.push_back(end);
  }
  return ends;
}

// What a backward writes: dq of the rows of a call; dk and dv of its keys, or of a part of them.
struct Gradients {
  Optional dq, dk, dv;
};

// How the rows of a head lie, for the passes to come: of all its keys, and of those that are summed here.
struct Slabs {
  std::vector<int64_t> ends;
  Layout layout;
};

// Sums up dq, dk and dv slab by slab, as far as they are wanted. `p` holds what is known of the problem but for tokens;
// `keys` says which keys are its own. dk_sum and dv_sum are those of the heads before it that share its keys; null: none do.
template <class T>
void sum_slabs(const Call& call, Problem<T> p, int64_t i, int64_t threads, const Slabs& slabs, Range keys,
               const Tensor& d_out, const Optional& out, const Optional& nan_rows, const Gradients& gradients,
               T* dk_sum, T* dv_sum) {
  const auto& kernels = table<T>();
  const Layout& layout = slabs.layout;
  const bool any_whole = std::count(layout.kinds.begin() + p.begin, layout.kinds.begin() + p.end, Kind::whole) > 0;
  int64_t entries = 0, listed = 0, rows = 0, begin = p.begin;  // of the largest slab
  for (const int64_t end : slabs.ends) {
    entries = std::max(entries, layout.numbers[end] - layout.numbers[begin]);
    listed = std::max(listed, layout.columns[end] - layout.columns[begin]);
    rows = std::max(rows, end - begin);
    begin = end;
  }
  p.q_at_a_time = std::min(p.q_at_a_time, Call::at_a_time(parts(rows, kBlock), threads));
  Workspace workspace(threads);
  Problem<T> all = call.head<T>(i, threads);
  all.survivors = p.survivors;
  Inputs<T> inputs(call, kernels, all, i, workspace);
  const OutputGradient<T> output(call, kernels, all, i, d_out, out, nan_rows, workspace);
  const auto written = [&](const Optional& x, int64_t n, T* sum) {
    return std::optional<Written<T>>(x ? std::optional(Written<T>(kernels, call.tokens(*x, i), n, workspace, sum))
                                       : std::nullopt);
  };
  const auto dq = written(gradients.dq, p.end - p.begin, nullptr);
  const auto dk = written(gradients.dk, p.n_k, dk_sum), dv = written(gradients.dv, p.n_k, dv_sum);
  const bool any_panels = any_whole && p.parts == 0;
  const Packed<T> k_panels(kernels, p.n_k, p.dim, any_panels, Packing::panels, workspace);
  const Packed<T> v_panels(kernels, p.n_k, p.dim_v, any_panels, Packing::panels, workspace);
  const Packed<T> k_slices(kernels, p.n_k, p.dim, any_panels && dq, Packing::slices, workspace);
  const Packed<T> q_slices(kernels, p.n_q, p.dim, any_panels && dk, Packing::slices, workspace);
  const Packed<T> d_out_slices(kernels, p.n_q, p.dim_v, any_panels && dk, Packing::slices, workspace);
  const int64_t tiled = any_whole ? p.parts : 0, tiled_rows = dq ? tiled : 0, tiled_columns = dk ? tiled : 0;
  const Tiles<T> k_tiles(kernels, p.n_k, p.dim, tiled, Tiled::columns, workspace);
  const Tiles<T> v_tiles(kernels, p.n_k, p.dim_v, tiled, Tiled::columns, workspace);
  const Tiles<T> k_terms(kernels, p.n_k, p.dim, tiled_rows, Tiled::terms, workspace);
  const Kind* const kinds = layout.kinds.data();
  const Tiles<T> q_left(kernels, p.n_q, p.dim, tiled_columns, Tiled::left_terms, workspace, kinds);
  const Tiles<T> d_out_left(kernels, p.n_q, p.dim_v, tiled_columns, Tiled::left_terms, workspace, kinds);
  const auto probability = workspace.add<T>(entries), ds = workspace.add<T>(entries);
  const auto columns = workspace.add<int32_t>(listed), starts = workspace.add<int32_t>((p.blocks_k + 1) * rows);
  workspace.add_share(kernels.backward_rows_bytes(p));
  workspace.add_share(kernels.backward_columns_bytes(p));
  workspace.allocate_all();
  inputs.get(workspace);
  p.q = all.q, p.k = all.k + keys.begin * p.dim, p.v = all.v + keys.begin * p.dim_v;
  p.d_out = output.without_empty_rows(output.get(workspace), workspace);
  if (dq) p.dq = row_zero(dq->get(workspace), p.begin * p.dim);
  if (dk) {
    p.dk = dk->get(workspace), p.dv = dv->get(workspace);
    std::fill_n(p.dk, p.n_k * p.dim, T(0));
    std::fill_n(p.dv, p.n_k * p.dim_v, T(0));
  }
  p.k_panels = k_panels.pack(p.k, workspace), p.v_panels = v_panels.pack(p.v, workspace);
  p.k_slices = k_slices.pack(p.k, workspace), p.q_slices = q_slices.pack(p.q, workspace);
  p.d_out_slices = d_out_slices.pack(p.d_out, workspace);
  p.k_tiles = k_tiles.pack(p.k, workspace), p.v_tiles = v_tiles.pack(p.v, workspace);
  p.k_terms = k_terms.pack(p.k, workspace);
  p.q_left = q_left.pack(p.q, workspace), p.d_out_left = d_out_left.pack(p.d_out, workspace);
  begin = p.begin;  // and a multiple of kMostRows whatever the number of threads, which must not show in the sums
  for (const int64_t end : slabs.ends) {
    const Slab<T> slab{begin,
                       end,
                       layout.groups,
                       probability.get(workspace),
                       ds.get(workspace),
                       columns.get(workspace),
                       starts.get(workspace)};
    run({(begin - p.begin) / p.q_at_a_time, parts(end - p.begin, p.q_at_a_time)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_rows(p, slab, queue, scratch); });
    if (dk)
      run({0, parts(p.n_k, p.k_at_a_time)}, workspace,
          [&](Queue& queue, void* scratch) { kernels.backward_columns(p, slab, queue, scratch); });
    begin = end;
  }
  for (const auto& x : {&dq, &dk, &dv})
    if (*x) (*x)->finish(workspace);
}

// Bytes of sums that learn_alpha() holds at a time, for one head.
constexpr int64_t kAlphaBytes = 4 * 1024 * 1024;

// Writes dalpha of the rows of a call.
template <class T>
void learn_alpha(const Kernels<T>& kernels, const Problem<T>& p, int64_t threads) {
  const int64_t blocks = parts(p.end - p.begin, kBlock), rows = blocks * kBlock;
  if (blocks == 0) return;
  const int64_t distances = p.reciprocal ? p.blocks_q / 2 + 1 : p.blocks_k;
  const int64_t fitting = kAlphaBytes / (2 * rows * static_cast<int64_t>(sizeof(T)));
  const int64_t at_a_time = std::clamp<int64_t>(fitting, 1, distances);
  Workspace workspace(threads);
  const Packed<T> q(kernels, p.n_q, p.dim, p.reciprocal, Packing::blocks, workspace);
  const Packed<T> k(kernels, p.n_k, p.dim, true, Packing::blocks, workspace);
  const Packed<T> v(kernels, p.n_k, p.dim_v, true, Packing::blocks, workspace);
  const Packed<T> d_out(kernels, p.n_q, p.dim_v, p.reciprocal, Packing::blocks, workspace);
  const auto ahead = workspace.add<T>(at_a_time * rows), behind = workspace.add<T>(at_a_time * rows);
  workspace.add_share(kernels.backward_alpha_bytes(p));
  workspace.allocate_all();
  std::vector<uint64_t> learns(p.blocks_q);
  for (int64_t i = 0; i < p.n_q; ++i)
    if ((!p.real_q || p.real_q[i]) && !(p.alpha[i] < T(kLeastMultiplier)))
      learns[i / kBlock] |= uint64_t{1} << i % kBlock;
  AlphaPairs<T> pairs{q.pack(p.q, workspace), k.pack(p.k, workspace), v.pack(p.v, workspace),
                      d_out.pack(p.d_out, workspace), learns.data()};
  pairs.ahead = ahead.get(workspace), pairs.behind = behind.get(workspace);
  std::fill_n(p.dalpha + p.begin, p.end - p.begin, T(0));
  for (; pairs.first < distances; pairs.first = pairs.last) {
    pairs.last = std::min(distances, pairs.first + at_a_time);
    const int64_t count = (pairs.last - pairs.first) * rows;
    std::fill_n(pairs.ahead, count, T(0));
    std::fill_n(pairs.behind, count, T(0));
    run({p.begin / kBlock, p.begin / kBlock + blocks}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_alpha(p, pairs, queue, scratch); });
    for (int64_t x = 0; x < count; x += rows)
      for (int64_t i = p.begin; i < p.end; ++i)
        p.dalpha[i] += pairs.ahead[x + i - p.begin] + pairs.behind[x + i - p.begin];
  }
  for (int64_t i = p.begin; i < p.end; ++i)
    if (learns[i / kBlock] >> i % kBlock & 1) p.dalpha[i] /= -p.alpha[i];
}

// Writes dalpha and dbeta of the rows of a call, where `p` has room for them.
template <class T>
void learn_thresholds(const Call& call, Problem<T> p, int64_t i, int64_t threads, const Tensor& d_out,
                      const Optional& out, const Optional& nan_rows) {
  const auto& kernels = table<T>();
  Workspace workspace(threads);
  Inputs<T> inputs(call, kernels, p, i, workspace);
  const OutputGradient<T> output(call, kernels, p, i, d_out, out, nan_rows, workspace);
  workspace.add_share(kernels.backward_beta_bytes(p));
  workspace.allocate_all();
  inputs.get(workspace);
  p.d_out = output.get(workspace);
  if (p.dalpha) learn_alpha(kernels, p, threads);
  if (p.dbeta)
    run({p.begin / kBlock, parts(p.end, kBlock)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_beta(p, queue, scratch); });
}

// Fills col_indices with the survivors of the rows of a head; `offsets` are the sums of their numbers, of all heads.
template <class T>
void list_head(const Problem<T>& p, int64_t i, int64_t threads, const int64_t* offsets, int32_t* col_indices) {
  const auto& kernels = table<T>();
  const int64_t rows = p.end - p.begin;
  Workspace workspace(threads);
  workspace.add_share(kernels.list_survivors_bytes(p));
  workspace.allocate_all();
  run({0, parts(rows, p.q_at_a_time)}, workspace, [&](Queue& queue, void* scratch) {
    kernels.list_survivors(p, offsets + i * rows - p.begin, col_indices, queue, scratch);
  });
}

// The heads that share keys one after the other: calls f(head, threads, dk so far, dv so far) for each.
template <class T, class F>
void for_key_heads(const Call& call, int64_t n_k, const F& f) {
  const auto& kernels = table<T>();
  const Arguments& x = call.x;
  for_heads(x.n_heads() / x.group(), [&](int64_t key_head, int64_t threads) {
    const int64_t shared = x.group() > 1 ? n_k : 0;
    std::vector<T> dk(shared * padded(kernels, x.dim())), dv(shared * padded(kernels, x.dim_v()));
    for (int64_t i = key_head * x.group(); i < (key_head + 1) * x.group(); ++i)
      f(i, threads, shared > 0 ? dk.data() : nullptr, shared > 0 ? dv.data() : nullptr);
  });
}

}  // namespace asa_ops::cpu
