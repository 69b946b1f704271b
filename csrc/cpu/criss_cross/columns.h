// Columns, side by side in the lanes of vectors: their scratch and scores.

constexpr int64_t kPairBytes = 1280 * 1024;  // of scores formed at a time, about, but at least kFewestQueries
constexpr int64_t kFewestQueries = 16;

// Queries at a time of a line of n keys, a multiple of `step`, each pair taking `size` numbers: parts of about equal
// length.
template <class T>
int64_t queries_at_a_time(int64_t n, int64_t size, int64_t step) {
  const int64_t fitting = larger(kFewestQueries, kPairBytes / (n * size * static_cast<int64_t>(sizeof(T))));
  const int64_t parts = (n + fitting - 1) / fitting;
  return rounded_up((n + parts - 1) / parts, step);
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
  pack_strip(p, p.q, p.dim, queries, w.q, rows * L, p.scale);
  clear(w.s, w.n * rows * L);
  add_lanes<T>({w.k, L, w.n * L}, {w.q, L, rows * L}, w.n, rows, p.dim, w.s, rows * L, L);
}
