// Rows form dp and dv; columns form theirs and, knowing both parts of delta, dq and dk; then rows add their dq and dk.

template <class T>
int64_t products(const CrissCross<T>& p) {
  return p.height * rounded_up(p.width, kPad) * rounded_up(p.width, kPad);
}

// Calls f(queries, columns, dp) for the queries of a row, as many at a time as there is room for, with p in
// w.s[key][query] and dp as it lies between the two passes over rows.
template <class T, class F>
ASA_INLINE void for_queries(const CrissCross<T>& p, const RowScratch<T>& w, int64_t row, const F& f) {
  pack_strip(p, p.k, p.dim, {row, 0, 1, w.n}, w.k, w.stride);
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
      transpose(w.s, stride, columns, w.transposed);
      clear(dp, stride * columns);
      for (int64_t c = 0; c < p.dim_v; c += kChannels) {
        const int64_t channels = smaller(kChannels, p.dim_v - c), offset = c * p.height * p.width;
        pack_strip(p, p.v + offset, channels, whole, w.v, stride);
        pack_strip(p, p.d_out + offset, channels, queries, w.d_out, columns);
        add_rows<Left::by_term>(w.v, stride, w.d_out, n, channels, columns, dp);
        clear(w.sums, rounded_up(channels, kRows) * stride);
        add_rows<Left::by_row>(w.d_out, columns, w.transposed, channels, queries.count, stride, w.sums);
        write_strip(p, w.sums, stride, channels, whole, p.dv + offset, queries.first == 0);
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
    pack_strip(p, p.k, p.dim, whole, w.k, n * L);
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
        pack_strip(p, p.v + offset, channels, whole, w.v, n * L);
        pack_strip(p, p.d_out + offset, channels, queries, w.d_out, stride);
        add_lanes<T>({w.v, L, n * L}, {w.d_out, L, stride}, n, rows, channels, w.ds, stride, L);
        clear(w.sums, channels * n * L);
        add_lanes<T>({w.d_out, stride, L}, {w.s, stride, L}, channels, n, rows, w.sums, n * L, L);
        write_strip(p, w.sums, n * L, channels, whole, p.dv + offset, false);
      }
      for (int64_t r = 0; r < rows; ++r) {
        T *const s = w.s + r * L, *const ds = w.ds + r * L, *const at = p.delta + (begin + r) * p.width + first;
        const Vec<T> delta = load_some(at, count) + mean_product(s, ds, n, stride);
        store_some(at, count, delta);
        score_gradients_of(s, ds, n, stride, delta);
      }
      clear(w.sums, p.dim * stride);
      add_lanes<T>({w.k, n * L, L}, {w.ds, L, stride}, p.dim, rows, n, w.sums, stride, L);
      write_strip(p, w.sums, stride, p.dim, queries, p.dq, true, p.scale);
      clear(w.sums, p.dim * n * L);
      add_lanes<T>({w.q, stride, L}, {w.ds, stride, L}, p.dim, n, rows, w.sums, n * L, L);
      write_strip(p, w.sums, n * L, p.dim, whole, p.dk, begin == 0);
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
      write_strip(p, w.sums, columns, p.dim, queries, p.dq, false, p.scale);
      transpose(ds, stride, columns, w.transposed);
      clear(w.sums, rounded_up(p.dim, kRows) * stride);
      add_rows<Left::by_row>(w.q, columns, w.transposed, p.dim, queries.count, stride, w.sums);
      write_strip(p, w.sums, stride, p.dim, {row, 0, 1, n}, p.dk, false);
    });
}

template <class T>
int64_t backward_bytes(const CrissCross<T>& p) {
  Arena columns(nullptr), rows(nullptr);
  ColumnScratch<T>(columns, p, true);
  RowScratch<T>(rows, p, true);
  return larger(columns.used, rows.used);
}
