// The gradients of q, k, v: rows first, which give dq and leave p and ds of every survivor in a slab, then columns, which
// sum them to dv and dk. No two threads add to the same number.

// The same choice of dense strips as Survivors::find, from the counts that the forward left.
template <class T>
bool is_dense_strip(const Problem<T>& p, int64_t row) {
  const int64_t first = row / kRows * kRows;
  return Survivors<T>::is_dense(p, p.survivors + first, smaller(kRows, p.n_q - first));
}

template <class T>
int64_t dense_stride(const Problem<T>& p) {
  return rounded_up(panels_of<T>(p.n_k) * kPanel<T>, kPad) + kPad;  // not a multiple of a page for most n_k
}

template <class T>
bool lay_out(const Problem<T>& p, int64_t* offsets) {
  bool any = false;
  offsets[0] = 0;
  for (int64_t i = 0; i < p.n_q; ++i) {
    const bool dense = is_dense_strip(p, i);
    offsets[i + 1] = offsets[i] + (dense ? dense_stride(p) : rounded_up(p.survivors[i], kPad));
    any |= dense;
  }
  // Dense strips are written whole.
  if (p.n_q > 0 && is_dense_strip(p, p.n_q - 1)) offsets[p.n_q] += (rounded_up(p.n_q, kRows) - p.n_q) * dense_stride(p);
  return any;
}

// p and dp of a row to ds, in place; returns <p, dp>.
template <class T>
T score_gradients(const T* probability, T* dp, int64_t count) {
  Vec<T> part = {};
  for (int64_t c = 0; c < count; c += kLanes<T>) part += load(probability + c) * load(dp + c);
  const T mean = sum_of<T>(part);
  for (int64_t c = 0; c < count; c += kLanes<T>) store(dp + c, load(probability + c) * (load(dp + c) - mean));
  return mean;
}

template <class T>
struct RowsScratch {
  Survivors<T> survivors;
  T *sums, *q, *d_out;

  RowsScratch(Arena& arena, const Problem<T>& p)
      : survivors(arena, p),
        sums(arena.take<T>(kBlock * p.dim)),
        q(arena.take<T>(kBlock * p.dim)),
        d_out(arena.take<T>(kBlock * p.dim_v)) {}
};

template <class T>
int64_t backward_rows_bytes(const Problem<T>& p) {
  return bytes_of<RowsScratch>(p);
}

template <class T>
void backward_rows(const Problem<T>& p, const Slab<T>& slab, Queue& queue, void* scratch) {
  Arena arena(scratch);
  RowsScratch<T> w(arena, p);
  Survivors<T>& survivors = w.survivors;
  T *const sums = w.sums, *const q = w.q, *const d_out = w.d_out;
  const int64_t rows_of_slab = slab.end - slab.begin, panels = panels_of<T>(p.n_k), stride = dense_stride(p);
  const int64_t stretch = larger(1, cached_rows<T>(p.dim + p.dim_v) / kPanel<T>);  // panels

  for (int64_t taken; queue.take(taken);) {
    const int64_t block = slab.begin / kBlock + taken, base = slab.offsets[slab.begin];
    survivors.find(p, block);
    bool same = true;
    for (int64_t r = 0; r < smaller(kBlock, p.n_q - block * kBlock); ++r)
      same &= p.survivors[block * kBlock + r] == survivors.count[r];
    if (!same) {
      queue.failed = true;
      continue;
    }
    for (int64_t x = 0; x < kBlock * p.dim; ++x) sums[x] = 0;

    Lists lists = {};
    T *probability[kBlock], *ds[kBlock];
    for (int64_t r = 0; r < smaller(kBlock, p.n_q - block * kBlock); ++r) {
      const int64_t offset = slab.offsets[block * kBlock + r] - base;
      probability[r] = slab.p + offset;
      ds[r] = slab.ds + offset;
    }
    survivors.for_listed(p, block, [&](int64_t r) {
      scale_row(p.q + (block * kBlock + r) * p.dim, p.dim, p.scale, q + r * p.dim);
      int32_t* const list = slab.columns + (slab.offsets[block * kBlock + r] - base);
      int32_t *start = slab.starts + block * kBlock + r - slab.begin, *end = list;
      for (int64_t j = 0; j < p.blocks_k; ++j, start += rows_of_slab) {
        *start = static_cast<int32_t>(end - list);
        end = list_bits(survivors.row(p, r) + j, 1, j * kBlock, end);
      }
      *start = static_cast<int32_t>(end - list);
      lists.list[r] = list;
      lists.count[r] = survivors.count[r];
    });
    lists.by_stretches(p.n_k, cached_rows<T>(p.dim), [&](int64_t r, int64_t from, int64_t to) {
      dots(q + r * p.dim, p.k, p.dim, lists.list[r] + from, to - from, probability[r] + from);
    });
    lists.by_stretches(p.n_k, cached_rows<T>(p.dim_v), [&](int64_t r, int64_t from, int64_t to) {
      dots(p.d_out + (block * kBlock + r) * p.dim_v, p.v, p.dim_v, lists.list[r] + from, to - from, ds[r] + from);
    });
    survivors.for_listed(p, block, [&](int64_t r) {
      T largest;
      const int64_t count = lists.count[r];
      const T sum = exponentials(probability[r], count, largest);
      scale_row(probability[r], count, count ? 1 / sum : T(0), probability[r]);
      for (int64_t c = count; c < rounded_up(count, kPad); ++c) probability[r][c] = ds[r][c] = 0;
      p.delta[block * kBlock + r] = score_gradients(probability[r], ds[r], count);
    });
    lists.by_stretches(p.n_k, cached_rows<T>(p.dim), [&](int64_t r, int64_t from, int64_t to) {
      accumulate(ds[r] + from, p.k, p.dim, lists.list[r] + from, to - from, sums + r * p.dim);
    });

    survivors.for_dense(p, block, [&](int64_t i, int64_t first, int64_t rows) {
      pack(p.q + first * p.dim, rows, kRows, p.dim, q + i * kRows * p.dim, p.scale);
      pack(p.d_out + first * p.dim_v, rows, kRows, p.dim_v, d_out + i * kRows * p.dim_v);
    });
    for (int64_t begin = 0; begin < panels; begin += stretch)
      survivors.for_dense(p, block, [&](int64_t i, int64_t, int64_t) {
        for (int64_t x = begin; x < smaller(panels, begin + stretch); ++x) {
          const T* const keys = p.k_panels + x * panel_size<T>(p.dim);
          const T* const values = p.v_panels + x * panel_size<T>(p.dim_v);
          scores(q + i * kRows * p.dim, keys, p.dim, probability[i * kRows] + x * kPanel<T>, stride);
          scores(d_out + i * kRows * p.dim_v, values, p.dim_v, ds[i * kRows] + x * kPanel<T>, stride);
        }
      });
    survivors.for_dense(p, block, [&](int64_t i, int64_t, int64_t rows) {
      for (int64_t r = i * kRows; r < i * kRows + rows; ++r) {
        T largest = -kInfinity, sum = 0;
        masked_exponentials(probability[r], survivors.row(p, r), 0, p.n_k, largest, sum);
        scale_row(probability[r], p.n_k, survivors.count[r] ? 1 / sum : T(0), probability[r]);
        p.delta[block * kBlock + r] = score_gradients(probability[r], ds[r], p.n_k);
      }
    });
    const int64_t keys = cached_rows<T>(p.dim);
    for (int64_t from = 0; from < p.n_k; from += keys)
      survivors.for_dense(p, block, [&](int64_t i, int64_t, int64_t) {
        add_product<Left::by_row>(ds[i * kRows] + from, stride, p.k + from * p.dim, smaller(keys, p.n_k - from), p.dim,
                                  sums + i * kRows * p.dim);
      });

    for (int64_t r = 0; r < smaller(kBlock, p.n_q - block * kBlock); ++r)
      for (int64_t d = 0; d < p.dim; ++d) p.dq[(block * kBlock + r) * p.dim + d] = sums[r * p.dim + d] * p.scale;
  }
}

constexpr int64_t kTerms = 256;  // dense rows that are summed by column at a time

template <class T>
struct ColumnsScratch {
  T *dk, *dv, *dense_p, *dense_ds, *p, *ds;
  int32_t* rows;

  ColumnsScratch(Arena& arena, const Problem<T>& problem, int64_t rows_of_slab, int64_t entries_of_slab) {
    const int64_t entries = smaller(kBlock * rows_of_slab, entries_of_slab);  // of a block of columns
    dk = arena.take<T>(kBlock * problem.dim);
    dv = arena.take<T>(kBlock * problem.dim_v);
    dense_p = arena.take<T>(kTerms * kBlock);
    dense_ds = arena.take<T>(kTerms * kBlock);
    p = arena.take<T>(entries);
    ds = arena.take<T>(entries);
    rows = arena.take<int32_t>(entries);
  }
};

template <class T>
int64_t backward_columns_bytes(const Problem<T>& p, int64_t rows, int64_t entries) {
  return bytes_of<ColumnsScratch>(p, rows, entries);
}

template <class T>
void backward_columns(const Problem<T>& p, const Slab<T>& slab, Queue& queue, void* scratch) {
  const int64_t rows_of_slab = slab.end - slab.begin, base = slab.offsets[slab.begin];
  Arena arena(scratch);
  const ColumnsScratch<T> w(arena, p, rows_of_slab, slab.offsets[slab.end] - base);
  T *const dk = w.dk, *const dv = w.dv, *const probability = w.p, *const ds = w.ds;
  int32_t* const rows = w.rows;

  for (int64_t block; queue.take(block);) {
    const int64_t first = block * kBlock, columns = smaller(kBlock, p.n_k - first);
    for (int64_t x = 0; x < kBlock * p.dim; ++x) dk[x] = 0;
    for (int64_t x = 0; x < kBlock * p.dim_v; ++x) dv[x] = 0;

    // The lists of the slab's rows, as far as they fall on these columns, sorted by column.
    const int32_t* const starts = slab.starts + block * rows_of_slab;
    const auto for_entries = [&](const auto& f) {
      for (int64_t i = slab.begin; i < slab.end; ++i) {
        if (is_dense_strip(p, i)) continue;
        const int64_t offset = slab.offsets[i] - base;
        for (int64_t e = offset + starts[i - slab.begin]; e < offset + starts[rows_of_slab + i - slab.begin]; ++e)
          f(i, slab.columns[e] - first, e);
      }
    };
    int64_t next[kBlock] = {};
    for_entries([&](int64_t, int64_t column, int64_t) { ++next[column]; });
    Lists lists;
    for (int64_t c = 0, used = 0; c < kBlock; ++c) {
      lists.list[c] = rows + used;
      lists.count[c] = next[c];
      next[c] = used;
      used += lists.count[c];
    }
    for_entries([&](int64_t i, int64_t column, int64_t entry) {
      const int64_t to = next[column]++;
      rows[to] = static_cast<int32_t>(i);
      probability[to] = slab.p[entry];
      ds[to] = slab.ds[entry];
    });
    lists.by_stretches(p.n_q, cached_rows<T>(p.dim + p.dim_v), [&](int64_t c, int64_t from, int64_t to) {
      const int64_t offset = lists.list[c] - rows + from;
      accumulate(probability + offset, p.d_out, p.dim_v, rows + offset, to - from, dv + c * p.dim_v);
      accumulate(ds + offset, p.q, p.dim, rows + offset, to - from, dk + c * p.dim);
    });

    for (int64_t i = slab.begin, end; i < slab.end; i = end) {
      end = smaller(slab.end, (i / kRows + 1) * kRows);
      if (!is_dense_strip(p, i)) continue;
      while (end < slab.end && end - i + kRows <= kTerms && is_dense_strip(p, end)) end = smaller(slab.end, end + kRows);
      for (int64_t t = i; t < end; ++t)
        for (int64_t c = 0; c < kBlock; ++c) {
          const int64_t entry = slab.offsets[t] - base + first + c;
          w.dense_p[(t - i) * kBlock + c] = c < columns ? slab.p[entry] : T(0);
          w.dense_ds[(t - i) * kBlock + c] = c < columns ? slab.ds[entry] : T(0);
        }
      for (int64_t c = 0; c < columns; c += kRows) {
        add_product<Left::by_term>(w.dense_p + c, kBlock, p.d_out + i * p.dim_v, end - i, p.dim_v, dv + c * p.dim_v);
        add_product<Left::by_term>(w.dense_ds + c, kBlock, p.q + i * p.dim, end - i, p.dim, dk + c * p.dim);
      }
    }

    for (int64_t x = 0; x < columns * p.dim; ++x) p.dk[first * p.dim + x] += dk[x] * p.scale;
    for (int64_t x = 0; x < columns * p.dim_v; ++x) p.dv[first * p.dim_v + x] += dv[x];
  }
}
