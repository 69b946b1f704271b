// Criss-cross attention on a CPU, for one instruction set: after asa_kernels.h, whose vectors and products it uses.
//
// Maps stay as they are, [channels][height][width]. A row is a dense product of everybody with everybody, its scores laid
// out [key][query]. Columns are taken as many side by side as a vector has lanes: there a product of "vectors" multiplies
// lane by lane. So the softmax runs over vectors, never within one. Strips of the maps are copied into scratch, where they
// lie without gaps, padded to whole vectors by zeros.
//
// Forward: columns first, their own softmax; then rows, which merge theirs with it. Backward: rows form dp and dv, columns
// all they need and then, knowing both parts of delta, their dq and dk, rows theirs.

#include "criss_cross.h"

namespace asa_ops::cpu::ASA_ISA {
namespace {

constexpr int64_t kPairBytes = 1280 * 1024;  // of scores and the like in work, about, and at least kFewestQueries
constexpr int64_t kFewestQueries = 16;
constexpr int64_t kChannels = 24;  // of values in work
constexpr int64_t kTogether = 64;  // terms of a sum added one after the other; more are added in parts, which round less

// A strip of a map: `lines` rows of one channel, or one row, of `count` pixels side by side.
template <class T>
struct Strip {
  int64_t line, first, lines, count;  // pixels [line, line + lines) x [first, first + count)
  int64_t vectors() const { return (count + kLanes<T> - 1) / kLanes<T>; }
};

// packed[channels][stride], each the strip's lines one after the other in whole vectors, times factor; what is left of
// `stride` is 0.
template <class T>
void gather(const CrissCross<T>& p, const T* x, int64_t channels, const Strip<T>& strip, T* packed, int64_t stride, T factor = 1) {
  const int64_t width = strip.vectors() * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = x + (c * p.height + strip.line) * p.width + strip.first;
    T* to = packed + c * stride;
    for (int64_t l = 0; l < strip.lines; ++l, from += p.width, to += width)
      for (int64_t i = 0; i < strip.count; i += kLanes<T>)
        store(to + i, load_some(from + i, smaller(kLanes<T>, strip.count - i)) * factor);
    for (; to < packed + (c + 1) * stride; to += kLanes<T>) store(to, Vec<T>{});
  }
}

// The reverse: f(vector of the map, vector of packed, offset in a channel of packed) is what the map gets.
template <class T, class F>
ASA_INLINE void scatter(const CrissCross<T>& p, const T* packed, int64_t stride, int64_t channels, const Strip<T>& strip, T* x, const F& f) {
  const int64_t width = strip.vectors() * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t l = 0; l < strip.lines; ++l) {
      T* const to = x + (c * p.height + strip.line + l) * p.width + strip.first;
      for (int64_t i = 0; i < strip.count; i += kLanes<T>) {
        const int64_t n = smaller(kLanes<T>, strip.count - i), offset = l * width + i;
        store_some(to + i, n, f(load_some(to + i, n), load(packed + c * stride + offset), offset));
      }
    }
}

// Where element (row, term) of a factor lies that consists of vectors: x + row * by_row + term * by_term.
template <class T>
struct Factor {
  const T* x;
  int64_t by_row, by_term;
};

template <int kX, int kY, class T>
static void lane_tile(Factor<T> a, Factor<T> b, int64_t terms, T* c, int64_t c_row, int64_t c_column) {
  Vec<T> sum[kX][kY] = {};
  for (int64_t t = 0; t < terms; ++t, a.x += a.by_term, b.x += b.by_term) {
    Vec<T> left[kX];
#pragma GCC unroll 8
    for (int x = 0; x < kX; ++x) left[x] = load(a.x + x * a.by_row);
#pragma GCC unroll 8
    for (int y = 0; y < kY; ++y) {
      const Vec<T> right = load(b.x + y * b.by_row);
#pragma GCC unroll 8
      for (int x = 0; x < kX; ++x) sum[x][y] += left[x] * right;
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < kX; ++x)
#pragma GCC unroll 8
    for (int y = 0; y < kY; ++y) {
      T* const p = c + x * c_row + y * c_column;
      store(p, load(p) + sum[x][y]);
    }
}

#if defined(ASA_AVX512)
constexpr int kTileX = 4, kTileY = 6;
#else
constexpr int kTileX = 3, kTileY = 4;
#endif

// Tiles of a strip of kX rows, as wide as fits.
template <int kX, class T>
static void lane_rows(Factor<T> a, Factor<T> b, int64_t columns, int64_t terms, T* c, int64_t c_row, int64_t c_column) {
  int64_t y = 0;
  const auto tile = [&](auto width) {
    for (; columns - y >= width; y += width)
      lane_tile<kX, width>(a, {b.x + y * b.by_row, b.by_row, b.by_term}, terms, c + y * c_column, c_row, c_column);
  };
  tile(std::integral_constant<int, kTileY>());
  tile(std::integral_constant<int, 4>());
  tile(std::integral_constant<int, 2>());
  tile(std::integral_constant<int, 1>());
}

// c(x, y) += sum over terms of a(x, term) * b(y, term), lane by lane.
template <class T>
static void add_lanes(Factor<T> a, Factor<T> b, int64_t rows, int64_t columns, int64_t terms, T* c, int64_t c_row, int64_t c_column) {
  for (int64_t t = 0; t < terms; t += kTogether) {
    int64_t x = 0;
    const auto strip = [&](auto height) {
      for (; rows - x >= height; x += height)
        lane_rows<height>({a.x + x * a.by_row + t * a.by_term, a.by_row, a.by_term}, {b.x + t * b.by_term, b.by_row, b.by_term},
                          columns, smaller(kTogether, terms - t), c + x * c_row, c_row, c_column);
    };
    strip(std::integral_constant<int, kTileX>());
    strip(std::integral_constant<int, 1>());
  }
}

template <class T>
void clear(T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

// Queries at a time of a line of n keys, a multiple of `step`, each pair taking `size` numbers: parts of about equal length.
template <class T>
int64_t queries_at_a_time(int64_t n, int64_t size, int64_t step) {
  const int64_t fitting = larger(kFewestQueries, kPairBytes / (n * size * static_cast<int64_t>(sizeof(T))));
  const int64_t parts = (n + fitting - 1) / fitting;
  return rounded_up((n + parts - 1) / parts, step);
}

// f(0) + f(1) + ..., in parts, which rounds less.
template <class T, class F>
ASA_INLINE Vec<T> sum_over(int64_t count, const F& f) {
  constexpr int64_t kPart = 16;
  Vec<T> sum = {};
  for (int64_t begin = 0; begin < count; begin += kPart) {
    Vec<T> part = {};
    for (int64_t j = begin; j < smaller(count, begin + kPart); ++j) part += f(j);
    sum += part;
  }
  return sum;
}

// s[key][query] of a line, both in whole vectors, to exp(s - largest), where largest is that of a query over all keys.
// Scores of a query that are all -inf have a sum, and `largest` tells.
template <class T>
ASA_INLINE Vec<T> exponentials_of(T* s, int64_t keys, int64_t stride, Vec<T>& largest) {
  largest = splat(T(-kInfinity));
  for (int64_t j = 0; j < keys; ++j) largest = maximum(largest, load(s + j * stride));
  const Vec<T> shift = select<T>(largest == splat(T(-kInfinity)), Vec<T>{}, largest);
  return sum_over<T>(keys, [&](int64_t j) {
    const Vec<T> e = exponential(load(s + j * stride) - shift);
    store(s + j * stride, e);
    return e;
  });
}

// s[key][query] of a line to probabilities, given the query's largest score and its sum, over row and column.
template <class T>
ASA_INLINE void probabilities(T* s, int64_t keys, int64_t stride, Vec<T> largest, Vec<T> total) {
  for (int64_t j = 0; j < keys; ++j) store(s + j * stride, exponential(load(s + j * stride) - largest) / total);
}

// The part of a line's keys in <do, out>: the sum of p dp. Formed from out it would not fit the p of the backward to the
// last digit, and what is left over would be added up.
template <class T>
ASA_INLINE Vec<T> mean_product(const T* p, const T* dp, int64_t keys, int64_t stride) {
  return sum_over<T>(keys, [&](int64_t j) { return load(p + j * stride) * load(dp + j * stride); });
}

// dp[key][query] of a line to ds.
template <class T>
ASA_INLINE void score_gradients_of(const T* p, T* dp, int64_t keys, int64_t stride, Vec<T> delta) {
  for (int64_t j = 0; j < keys; ++j) store(dp + j * stride, load(p + j * stride) * (load(dp + j * stride) - delta));
}

// Memory of a thread for columns in the lanes of vectors.
template <class T>
struct ColumnScratch {
  int64_t n, at_a_time;
  T *q, *k, *s, *ds, *v, *d_out, *sums, *statistics;

  ColumnScratch(Arena& arena, const CrissCross<T>& p, bool backward) : n(p.height) {
    constexpr int64_t L = kLanes<T>;
    at_a_time = smaller(n, queries_at_a_time<T>(n, backward ? 2 * L : L, kTileY));
    const int64_t pairs = n * at_a_time * L;
    q = arena.take<T>(p.dim * at_a_time * L);
    k = arena.take<T>(p.dim * n * L);
    s = arena.take<T>(pairs);
    ds = arena.take<T>(backward ? pairs : 0);
    v = arena.take<T>(kChannels * n * L);
    d_out = arena.take<T>(backward ? kChannels * at_a_time * L : 0);
    sums = arena.take<T>(larger(kChannels, backward ? p.dim : 0) * n * L);
    statistics = arena.take<T>(at_a_time * L);
  }
};

template <class T>
int64_t column_groups(const CrissCross<T>& p) {
  return (p.width + kLanes<T> - 1) / kLanes<T>;
}

template <class T>
int64_t blocks_of_column(const CrissCross<T>& p) {
  Arena arena(nullptr);
  const ColumnScratch<T> w(arena, p, false);
  return (p.height + w.at_a_time - 1) / w.at_a_time;
}

template <class T>
int64_t column_blocks(const CrissCross<T>& p) {
  return column_groups(p) * blocks_of_column(p);
}

// s[key][query] of some queries of a group of columns; w.k holds the keys.
template <class T>
void score_columns(const CrissCross<T>& p, const ColumnScratch<T>& w, const Strip<T>& queries) {
  constexpr int64_t L = kLanes<T>;
  const int64_t rows = queries.lines;
  gather(p, p.q, p.dim, queries, w.q, rows * L, p.scale);
  clear(w.s, w.n * rows * L);
  add_lanes<T>({w.k, L, w.n * L}, {w.q, L, rows * L}, w.n, rows, p.dim, w.s, rows * L, L);
}

template <class T>
void forward_columns(const CrissCross<T>& p, Queue& queue, void* scratch) {
  constexpr int64_t L = kLanes<T>;
  Arena arena(scratch);
  const ColumnScratch<T> w(arena, p, false);
  const int64_t blocks = blocks_of_column(p), n = w.n;
  const Vec<T> nobody = splat(T(-kInfinity));

  for (int64_t block; queue.take(block);) {
    const int64_t first = block / blocks * L, begin = block % blocks * w.at_a_time;
    const int64_t count = smaller(L, p.width - first), rows = smaller(w.at_a_time, n - begin);
    const Strip<T> whole{0, first, n, count}, queries{begin, first, rows, count};
    gather(p, p.k, p.dim, whole, w.k, n * L);
    score_columns(p, w, queries);
    for (int64_t r = 0; r < rows; ++r) {
      T* const s = w.s + r * L;
      T* const itself = s + (begin + r) * rows * L;
      store(itself, nobody);
      Vec<T> largest, sum = exponentials_of(s, n, rows * L, largest) - load(itself);
      store(itself, Vec<T>{});
      const auto empty = largest == nobody;
      const int64_t at = (begin + r) * p.width + first;
      store_some(p.largest + at, count, largest);
      store_some(p.total + at, count, select<T>(empty, Vec<T>{}, sum));
      store(w.statistics + r * L, select<T>(empty, Vec<T>{}, 1 / sum));
    }
    for (int64_t c = 0; c < p.dim_v; c += kChannels) {
      const int64_t channels = smaller(kChannels, p.dim_v - c), offset = c * p.height * p.width;
      gather(p, p.v + offset, channels, whole, w.v, n * L);
      clear(w.sums, channels * rows * L);
      add_lanes<T>({w.v, n * L, L}, {w.s, L, rows * L}, channels, rows, n, w.sums, rows * L, L);
      scatter(p, w.sums, rows * L, channels, queries, p.out + offset,
              [&](Vec<T>, Vec<T> x, int64_t at) { return x * load(w.statistics + at); });
    }
  }
}

// Memory of a thread for a row.
template <class T>
struct RowScratch {
  int64_t n, stride, at_a_time;  // stride: pixels of a row, padded
  T *q, *k, *s, *turned, *v, *d_out, *sums, *statistics;

  RowScratch(Arena& arena, const CrissCross<T>& p, bool backward) : n(p.width), stride(rounded_up(n, kPad)) {
    at_a_time = queries_at_a_time<T>(n, backward ? 2 : 1, kPad);
    q = arena.take<T>(p.dim * stride);
    k = arena.take<T>(rounded_up(p.dim, kRows) * stride);
    s = arena.take<T>(stride * at_a_time);
    turned = arena.take<T>(backward ? stride * at_a_time : 0);
    v = arena.take<T>(kChannels * stride);
    d_out = arena.take<T>(backward ? kChannels * at_a_time : 0);
    sums = arena.take<T>(larger(kChannels, backward ? rounded_up(p.dim, kRows) : 0) * stride);
    statistics = arena.take<T>(backward ? 0 : 2 * at_a_time);
  }
};

// c[rows][columns] += a b; a [rows][terms] by rows or by terms, rows padded to whole tiles.
template <Left kLeft, class T>
void add_rows(const T* a, int64_t a_stride, const T* b, int64_t rows, int64_t terms, int64_t columns, T* c) {
  for (int64_t t = 0; t < terms; t += kTogether)
    for (int64_t r = 0; r < rows; r += kRows)
      add_product<kLeft>(kLeft == Left::by_row ? a + r * a_stride + t : a + r + t * a_stride, a_stride, b + t * columns,
                         smaller(kTogether, terms - t), columns, c + r * columns);
}

// s[key][query] of some queries of a row; w.k holds the keys.
template <class T>
void score_row(const CrissCross<T>& p, const RowScratch<T>& w, const Strip<T>& queries, int64_t columns) {
  gather(p, p.q, p.dim, queries, w.q, columns, p.scale);
  clear(w.s, w.stride * columns);
  add_rows<Left::by_term>(w.k, w.stride, w.q, w.n, p.dim, columns, w.s);
}

template <class T>
void forward_rows(const CrissCross<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const RowScratch<T> w(arena, p, false);

  for (int64_t row; queue.take(row);) {
    const Strip<T> whole{row, 0, 1, w.n};
    gather(p, p.k, p.dim, whole, w.k, w.stride);
    for (int64_t begin = 0; begin < w.n; begin += w.at_a_time) {
      const Strip<T> queries{row, begin, 1, smaller(w.at_a_time, w.n - begin)};
      const int64_t columns = rounded_up(queries.count, kPad);
      T *const of_column = w.statistics, *const of_row = w.statistics + columns;
      score_row(p, w, queries, columns);
      for (int64_t i = 0; i < queries.count; i += kLanes<T>) {
        const int64_t count = smaller(kLanes<T>, queries.count - i);
        T *const at = p.largest + row * p.width + begin + i, *const at_total = p.total + row * p.width + begin + i;
        Vec<T> largest;
        const Vec<T> sum = exponentials_of(w.s + i, w.n, columns, largest), column = load_some(at, count);
        const Vec<T> base = maximum(column, largest), mine = exponential(largest - base);
        const Vec<T> other = load_some(at_total, count) * exponential(column - base), total = mine * sum + other;
        store(of_row + i, mine / total);
        store(of_column + i, other / total);
        store_some(at, count, base);
        store_some(at_total, count, total);
      }
      for (int64_t c = 0; c < p.dim_v; c += kChannels) {
        const int64_t channels = smaller(kChannels, p.dim_v - c), offset = c * p.height * p.width;
        gather(p, p.v + offset, channels, whole, w.v, w.stride);
        clear(w.sums, rounded_up(channels, kRows) * columns);
        add_rows<Left::by_row>(w.v, w.stride, w.s, channels, w.n, columns, w.sums);
        scatter(p, w.sums, columns, channels, queries, p.out + offset,
                [&](Vec<T> y, Vec<T> x, int64_t i) { return y * load(of_column + i) + x * load(of_row + i); });
      }
    }
  }
}

template <class T>
int64_t products(const CrissCross<T>& p) {
  return p.height * rounded_up(p.width, kPad) * rounded_up(p.width, kPad);
}

template <class T>
int64_t forward_bytes(const CrissCross<T>& p) {
  Arena columns(nullptr), rows(nullptr);
  ColumnScratch<T>(columns, p, false);
  RowScratch<T>(rows, p, false);
  return larger(columns.used, rows.used);
}

// turned[query][key] = x[key][query].
template <class T>
void turn(const T* x, int64_t keys, int64_t queries, T* turned) {
  for (int64_t i = 0; i < queries; i += kLanes<T>)
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t r = 0; r < kLanes<T>; ++r) turned[(i + r) * keys + j] = x[j * queries + i + r];
}

// What a map gets: x, or y + x, y being what it holds.
template <class T>
ASA_INLINE void give(const CrissCross<T>& p, const T* packed, int64_t stride, int64_t channels, const Strip<T>& strip, T* x,
                     bool first, T factor = 1) {
  if (first)
    scatter(p, packed, stride, channels, strip, x, [&](Vec<T>, Vec<T> x, int64_t) { return factor * x; });
  else
    scatter(p, packed, stride, channels, strip, x, [&](Vec<T> y, Vec<T> x, int64_t) { return y + factor * x; });
}

// Calls f(queries, columns, dp) for the queries of a row, as many at a time as there is room for, with p in w.s[key][query]
// and dp as it lies between the two passes over rows.
template <class T, class F>
ASA_INLINE void for_queries(const CrissCross<T>& p, const RowScratch<T>& w, int64_t row, const F& f) {
  gather(p, p.k, p.dim, {row, 0, 1, w.n}, w.k, w.stride);
  for (int64_t begin = 0; begin < w.n; begin += w.at_a_time) {
    const Strip<T> queries{row, begin, 1, smaller(w.at_a_time, w.n - begin)};
    const int64_t columns = rounded_up(queries.count, kPad);
    score_row(p, w, queries, columns);
    for (int64_t i = 0; i < queries.count; i += kLanes<T>) {
      const int64_t count = smaller(kLanes<T>, queries.count - i), at = row * p.width + begin + i;
      probabilities(w.s + i, w.n, columns, load_some(p.largest + at, count), load_some(p.total + at, count));
    }
    f(queries, columns, p.products + (row * w.stride + begin) * w.stride);
  }
}

template <class T>
void backward_values(const CrissCross<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const RowScratch<T> w(arena, p, true);
  const int64_t n = w.n, stride = w.stride;

  for (int64_t row; queue.take(row);) {
    const Strip<T> whole{row, 0, 1, n};
    for_queries(p, w, row, [&](const Strip<T>& queries, int64_t columns, T* dp) {
      turn(w.s, stride, columns, w.turned);
      clear(dp, stride * columns);
      for (int64_t c = 0; c < p.dim_v; c += kChannels) {
        const int64_t channels = smaller(kChannels, p.dim_v - c), offset = c * p.height * p.width;
        gather(p, p.v + offset, channels, whole, w.v, stride);
        gather(p, p.d_out + offset, channels, queries, w.d_out, columns);
        add_rows<Left::by_term>(w.v, stride, w.d_out, n, channels, columns, dp);
        clear(w.sums, rounded_up(channels, kRows) * stride);
        add_rows<Left::by_row>(w.d_out, columns, w.turned, channels, queries.count, stride, w.sums);
        give(p, w.sums, stride, channels, whole, p.dv + offset, queries.first == 0);
      }
      for (int64_t i = 0; i < queries.count; i += kLanes<T>)
        store_some(p.delta + row * p.width + queries.first + i, smaller(kLanes<T>, queries.count - i),
                   mean_product(w.s + i, dp + i, n, columns));
    });
  }
}

template <class T>
void backward_columns(const CrissCross<T>& p, Queue& queue, void* scratch) {
  constexpr int64_t L = kLanes<T>;
  Arena arena(scratch);
  const ColumnScratch<T> w(arena, p, true);
  const int64_t n = w.n;

  for (int64_t group; queue.take(group);) {
    const int64_t first = group * L, count = smaller(L, p.width - first);
    const Strip<T> whole{0, first, n, count};
    gather(p, p.k, p.dim, whole, w.k, n * L);
    for (int64_t begin = 0; begin < n; begin += w.at_a_time) {
      const Strip<T> queries{begin, first, smaller(w.at_a_time, n - begin), count};
      const int64_t rows = queries.lines, stride = rows * L;
      score_columns(p, w, queries);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (begin + r) * p.width + first;
        probabilities(w.s + r * L, n, stride, load_some(p.largest + at, count), load_some(p.total + at, count));
        store(w.s + (begin + r) * stride + r * L, Vec<T>{});
      }
      clear(w.ds, n * stride);
      for (int64_t c = 0; c < p.dim_v; c += kChannels) {
        const int64_t channels = smaller(kChannels, p.dim_v - c), offset = c * p.height * p.width;
        gather(p, p.v + offset, channels, whole, w.v, n * L);
        gather(p, p.d_out + offset, channels, queries, w.d_out, stride);
        add_lanes<T>({w.v, L, n * L}, {w.d_out, L, stride}, n, rows, channels, w.ds, stride, L);
        clear(w.sums, channels * n * L);
        add_lanes<T>({w.d_out, stride, L}, {w.s, stride, L}, channels, n, rows, w.sums, n * L, L);
        give(p, w.sums, n * L, channels, whole, p.dv + offset, false);
      }
      for (int64_t r = 0; r < rows; ++r) {
        T *const s = w.s + r * L, *const ds = w.ds + r * L, *const at = p.delta + (begin + r) * p.width + first;
        const Vec<T> delta = load_some(at, count) + mean_product(s, ds, n, stride);
        store_some(at, count, delta);
        score_gradients_of(s, ds, n, stride, delta);
      }
      clear(w.sums, p.dim * stride);
      add_lanes<T>({w.k, n * L, L}, {w.ds, L, stride}, p.dim, rows, n, w.sums, stride, L);
      give(p, w.sums, stride, p.dim, queries, p.dq, true, p.scale);
      clear(w.sums, p.dim * n * L);
      add_lanes<T>({w.q, stride, L}, {w.ds, stride, L}, p.dim, n, rows, w.sums, n * L, L);
      give(p, w.sums, n * L, p.dim, whole, p.dk, begin == 0);
    }
  }
}

template <class T>
void backward_rows(const CrissCross<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const RowScratch<T> w(arena, p, true);
  const int64_t n = w.n, stride = w.stride;

  for (int64_t row; queue.take(row);)
    for_queries(p, w, row, [&](const Strip<T>& queries, int64_t columns, T* ds) {
      for (int64_t i = 0; i < queries.count; i += kLanes<T>) {
        const T* const delta = p.delta + row * p.width + queries.first + i;
        score_gradients_of(w.s + i, ds + i, n, columns, load_some(delta, smaller(kLanes<T>, queries.count - i)));
      }
      clear(w.sums, rounded_up(p.dim, kRows) * columns);
      add_rows<Left::by_row>(w.k, stride, ds, p.dim, n, columns, w.sums);
      give(p, w.sums, columns, p.dim, queries, p.dq, false, p.scale);
      turn(ds, stride, columns, w.turned);
      clear(w.sums, rounded_up(p.dim, kRows) * stride);
      add_rows<Left::by_row>(w.q, columns, w.turned, p.dim, queries.count, stride, w.sums);
      give(p, w.sums, stride, p.dim, {row, 0, 1, n}, p.dk, false);
    });
}

template <class T>
int64_t backward_bytes(const CrissCross<T>& p) {
  Arena columns(nullptr), rows(nullptr);
  ColumnScratch<T>(columns, p, true);
  RowScratch<T>(rows, p, true);
  return larger(columns.used, rows.used);
}

template <class T>
constexpr CrissCrossKernels<T> criss_cross_kernels() {
  return {column_blocks<T>,  column_groups<T>, forward_bytes<T>, forward_columns<T>, forward_rows<T>,
          products<T>,       backward_bytes<T>, backward_values<T>, backward_columns<T>, backward_rows<T>};
}

}  // namespace

const CrissCrossKernels<float> kCrissCrossFloat = criss_cross_kernels<float>();
const CrissCrossKernels<double> kCrissCrossDouble = criss_cross_kernels<double>();

}  // namespace asa_ops::cpu::ASA_ISA
