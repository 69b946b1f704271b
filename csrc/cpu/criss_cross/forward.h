// The softmax of columns alone, then rows, which merge theirs with it.

template <class T>
void forward_columns(const CrissCross<T>& p, Queue& queue, void* scratch) {
  constexpr int64_t L = kLanes<T>;
  Arena arena(scratch);
  const ColumnScratch<T> w(arena, p, false);
  const int64_t blocks = blocks_of_column(p), n = w.n;
  const Vec<T> lowest = splat(T(-kInfinity));

  for (int64_t block; queue.take(block);) {
    const int64_t first = block / blocks * L, begin = block % blocks * w.at_a_time;
    const int64_t count = smaller(L, p.width - first), rows = smaller(w.at_a_time, n - begin);
    const Strip<T> whole{0, first, n, count}, queries{begin, first, rows, count};
    pack_strip(p, p.k, p.dim, whole, w.k, n * L);
    score_columns(p, w, queries);
    for (int64_t r = 0; r < rows; ++r) {
      T* const s = w.s + r * L;
      T* const itself = s + (begin + r) * rows * L;
      store(itself, lowest);
      Vec<T> largest, sum = exponentials_of(s, n, rows * L, largest) - load(itself);
      store(itself, Vec<T>{});
      const auto empty = largest == lowest;
      const int64_t at = (begin + r) * p.width + first;
      store_some(p.largest + at, count, largest);
      store_some(p.total + at, count, select<T>(empty, Vec<T>{}, sum));
      store(w.statistics + r * L, select<T>(empty, Vec<T>{}, 1 / sum));
    }
    for (int64_t c = 0; c < p.dim_v; c += kChannels) {
      const int64_t channels = smaller(kChannels, p.dim_v - c), offset = c * p.height * p.width;
      pack_strip(p, p.v + offset, channels, whole, w.v, n * L);
      clear(w.sums, channels * rows * L);
      add_lanes<T>({w.v, n * L, L}, {w.s, L, rows * L}, channels, rows, n, w.sums, rows * L, L);
      unpack_strip(p, w.sums, rows * L, channels, queries, p.out + offset,
                   [&](Vec<T>, Vec<T> x, int64_t at) { return x * load(w.statistics + at); });
    }
  }
}

template <class T>
void forward_rows(const CrissCross<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const RowScratch<T> w(arena, p, false);

  for (int64_t row; queue.take(row);) {
    const Strip<T> whole{row, 0, 1, w.n};
    pack_strip(p, p.k, p.dim, whole, w.k, w.stride);
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
        const Vec<T> base = maximum(column, largest), row_weight = exponential(largest - base);
        const Vec<T> column_total = load_some(at_total, count) * exponential(column - base),
                     total = row_weight * sum + column_total;
        store(of_row + i, row_weight / total);
        store(of_column + i, column_total / total);
        store_some(at, count, base);
        store_some(at_total, count, total);
      }
      for (int64_t c = 0; c < p.dim_v; c += kChannels) {
        const int64_t channels = smaller(kChannels, p.dim_v - c), offset = c * p.height * p.width;
        pack_strip(p, p.v + offset, channels, whole, w.v, w.stride);
        clear(w.sums, rounded_up(channels, kRows) * columns);
        add_rows<Left::by_row>(w.v, w.stride, w.s, channels, w.n, columns, w.sums);
        unpack_strip(p, w.sums, columns, channels, queries, p.out + offset,
                     [&](Vec<T> y, Vec<T> x, int64_t i) { return y * load(of_column + i) + x * load(of_row + i); });
      }
    }
  }
}

template <class T>
int64_t forward_bytes(const CrissCross<T>& p) {
  Arena columns(nullptr), rows(nullptr);
  ColumnScratch<T>(columns, p, false);
  RowScratch<T>(rows, p, false);
  return larger(columns.used, rows.used);
}
