// A row: its scratch, products and scores.

// Memory of a thread for a row.
template <class T>
struct RowScratch {
  int64_t n, stride, at_a_time;  // stride: pixels of a row, padded
  T *q, *k, *s, *transposed, *v, *d_out, *sums, *statistics;

  RowScratch(Arena& arena, const CrissCross<T>& p, bool backward) : n(p.width), stride(rounded_up(n, kPad)) {
    at_a_time = queries_at_a_time<T>(n, backward ? 2 : 1, kPad);
    q = arena.take<T>(p.dim * stride);
    k = arena.take<T>(rounded_up(p.dim, kRows) * stride);
    s = arena.take<T>(stride * at_a_time);
    transposed = arena.take<T>(backward ? stride * at_a_time : 0);
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
      add_product<kLeft>(kLeft == Left::by_row ? a + r * a_stride + t : a + r + t * a_stride, a_stride,
                         Consecutive<T>{b + t * columns, columns}, smaller(kTogether, terms - t), columns,
                         c + r * columns);
}

// s[key][query] of some queries of a row; w.k holds the keys.
template <class T>
void score_row(const CrissCross<T>& p, const RowScratch<T>& w, const Strip<T>& queries, int64_t columns) {
  pack_strip(p, p.q, p.dim, queries, w.q, columns, p.scale);
  clear(w.s, w.stride * columns);
  add_rows<Left::by_term>(w.k, w.stride, w.q, w.n, p.dim, columns, w.s);
}

// transposed[query][key] = x[key][query].
template <class T>
void transpose(const T* x, int64_t keys, int64_t queries, T* transposed) {
  for (int64_t i = 0; i < queries; i += kLanes<T>)
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t r = 0; r < kLanes<T>; ++r) transposed[(i + r) * keys + j] = x[j * queries + i + r];
}
