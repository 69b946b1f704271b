// The gradients of q, k, v: rows first, which give dq and leave p and ds of every survivor in a slab, then columns,
// which sum them to dv and dk. No two threads add to the same number.

// The same choice of dense strips as Survivors::take, from the counts that the forward left.
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
bool lay_out(const Problem<T>& p, int64_t* offsets, bool* dense) {
  bool any = false;
  offsets[0] = 0;
  for (int64_t i = 0; i < p.n_q; ++i) {
    dense[i] = is_dense_strip(p, i);
    offsets[i + 1] = offsets[i] + (dense[i] ? dense_stride(p) : list_room(p.survivors[i]));
    any |= dense[i];
  }
  // Dense strips are written whole.
  if (p.n_q > 0 && dense[p.n_q - 1]) offsets[p.n_q] += (rounded_up(p.n_q, kRows) - p.n_q) * dense_stride(p);
  return any;
}

// Turns dp of a row into ds, in place; returns <p, dp>.
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
        sums(arena.take<T>(p.q_at_a_time * p.dim)),
        q(arena.take<T>(p.q_at_a_time * p.dim)),
        d_out(arena.take<T>(p.q_at_a_time * p.dim_v)) {}
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

  while (survivors.take(p, queue)) {
    const int64_t group = survivors.first;
    Lists<kMostRows> lists = {};
    T *probability[kMostRows], *ds[kMostRows];
    bool same = true;
    for (int64_t r = 0; r < survivors.rows; ++r) {
      const int64_t offset = slab.offsets[group + r] - slab.offsets[slab.begin];
      probability[r] = slab.p + offset;
      ds[r] = slab.ds + offset;
      same &= p.survivors[group + r] == survivors.count[r];
    }
    if (!same) {
      queue.failed = true;
      continue;
    }
    for (int64_t x = 0; x < survivors.rows * p.dim; ++x) sums[x] = 0;

    survivors.for_listed([&](int64_t r) {
      scale_row(p.q + (group + r) * p.dim, p.dim, p.scale, q + r * p.dim);
      int32_t* const list = slab.columns + (slab.offsets[group + r] - slab.offsets[slab.begin]);
      int32_t *start = slab.starts + group + r - slab.begin, *end = list;
      for (int64_t j = 0; j < p.blocks_k; ++j, start += rows_of_slab) {
        *start = static_cast<int32_t>(end - list);
        end = list_bits(survivors.row(p, r) + j, 1, j * kBlock, end);
      }
      *start = static_cast<int32_t>(end - list);
      lists.list[r] = list;
      lists.count[r] = survivors.count[r];
    });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim), [&](int64_t r, int64_t from, int64_t to) {
      dots(q + r * p.dim, p.k, p.dim, lists.list[r] + from, to - from, probability[r] + from);
    });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim_v), [&](int64_t r, int64_t from, int64_t to) {
      dots(p.d_out + (group + r) * p.dim_v, p.v, p.dim_v, lists.list[r] + from, to - from, ds[r] + from);
    });
    survivors.for_listed([&](int64_t r) {
      T largest;
      const int64_t count = lists.count[r];
      const T sum = exponentials(probability[r], count, largest);
      scale_row(probability[r], count, count ? 1 / sum : T(0), probability[r]);
      for (int64_t c = count; c < rounded_up(count, kPad); ++c) probability[r][c] = ds[r][c] = 0;
      p.delta[group + r] = score_gradients(probability[r], ds[r], count);
    });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim), [&](int64_t r, int64_t from, int64_t to) {
      accumulate(ds[r] + from, p.k, p.dim, lists.list[r] + from, to - from, sums + r * p.dim);
    });

    survivors.for_dense([&](int64_t first, int64_t rows) {
      for (int64_t j = 0; j <= p.blocks_k; ++j)
        for (int64_t r = group + first; r < group + first + rows; ++r)
          slab.starts[j * rows_of_slab + r - slab.begin] = 0;
      pack(p.q + (group + first) * p.dim, rows, kRows, p.dim, q + first * p.dim, p.scale);
      pack(p.d_out + (group + first) * p.dim_v, rows, kRows, p.dim_v, d_out + first * p.dim_v);
    });
    for (int64_t begin = 0; begin < panels; begin += stretch)
      survivors.for_dense([&](int64_t first, int64_t) {
        for (int64_t x = begin; x < smaller(panels, begin + stretch); ++x) {
          const T* const keys = p.k_panels + x * panel_size<T>(p.dim);
          const T* const values = p.v_panels + x * panel_size<T>(p.dim_v);
          scores(q + first * p.dim, keys, p.n_k - x * kPanel<T>, p.dim, probability[first] + x * kPanel<T>, stride);
          scores(d_out + first * p.dim_v, values, p.n_k - x * kPanel<T>, p.dim_v, ds[first] + x * kPanel<T>, stride);
        }
      });
    survivors.for_dense([&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r) {
        T largest = -kInfinity, sum = 0;
        masked_exponentials(probability[r], survivors.row(p, r), 0, p.n_k, largest, sum);
        scale_row(probability[r], p.n_k, survivors.count[r] ? 1 / sum : T(0), probability[r]);
        p.delta[group + r] = score_gradients(probability[r], ds[r], p.n_k);
      }
    });
    const int64_t keys = cached_rows<T>(p.dim);
    for (int64_t from = 0; from < p.n_k; from += keys)
      survivors.for_dense([&](int64_t first, int64_t) {
        add_product<Left::by_row>(ds[first] + from, stride, p.k + from * p.dim, smaller(keys, p.n_k - from), p.dim,
                                  sums + first * p.dim);
      });

    scale_row(sums, survivors.rows * p.dim, p.scale, p.dq + group * p.dim);
  }
}

constexpr int64_t kTerms = 256;  // dense rows that are summed by column at a time

template <class T>
struct ColumnsScratch {
  char* entries;  // survivors of some columns, sorted by column
  T *dense_p, *dense_ds;  // of some dense rows and a block of columns
  T* sums;

  ColumnsScratch(Arena& arena, const Problem<T>& problem, int64_t rows_of_slab, int64_t entries_of_slab) {
    Arena count(nullptr);
    Sorted(count, smaller(kMostRows * rows_of_slab, entries_of_slab));
    entries = arena.take<char>(count.used);
    dense_p = arena.take<T>(kTerms * kBlock);
    dense_ds = arena.take<T>(kTerms * kBlock);
    sums = arena.take<T>(kRows * larger(problem.dim, problem.dim_v));
  }

  // Entries lie side by side: memory beyond their number is not touched.
  struct Sorted {
    int32_t* rows;
    T *p, *ds;
    Sorted(Arena& arena, int64_t count)
        : rows(arena.take<int32_t>(count)), p(arena.take<T>(count)), ds(arena.take<T>(count)) {}
  };
};

template <class T>
int64_t backward_columns_bytes(const Problem<T>& p, int64_t rows, int64_t entries) {
  return bytes_of<ColumnsScratch>(p, rows, entries);
}

// Adds what the lists of the slab's rows contribute to dk and dv of columns [begin, end).
template <class T>
void add_listed(const Problem<T>& p, const Slab<T>& slab, const ColumnsScratch<T>& w, int64_t begin, int64_t end) {
  const int64_t rows_of_slab = slab.end - slab.begin, base = slab.offsets[slab.begin];
  const int32_t* const from = slab.starts + begin / kBlock * rows_of_slab;
  const int32_t* const to = slab.starts + (end + kBlock - 1) / kBlock * rows_of_slab;
  const auto for_entries = [&](const auto& f) {
    for (int64_t i = 0; i < rows_of_slab; ++i) {
      const int64_t offset = slab.offsets[slab.begin + i] - base;
      // Entries of different rows lie far apart, so they are fetched ahead.
      const int64_t ahead = smaller(i + 8, rows_of_slab - 1),
                    later = slab.offsets[slab.begin + ahead] - base + from[ahead];
      __builtin_prefetch(slab.columns + later);
      __builtin_prefetch(slab.p + later);
      __builtin_prefetch(slab.ds + later);
      for (int64_t e = offset + from[i]; e < offset + to[i]; ++e) f(slab.begin + i, slab.columns[e] - begin, e);
    }
  };
  int64_t next[kMostRows] = {}, count = 0;
  for_entries([&](int64_t, int64_t column, int64_t) { ++next[column], ++count; });
  Arena arena(w.entries);
  const typename ColumnsScratch<T>::Sorted sorted(arena, count);
  Lists<kMostRows> lists;
  for (int64_t c = 0, used = 0; c < kMostRows; ++c) {
    lists.list[c] = sorted.rows + used;
    lists.count[c] = next[c];
    next[c] = used;
    used += lists.count[c];
  }
  for_entries([&](int64_t row, int64_t column, int64_t entry) {
    const int64_t x = next[column]++;
    sorted.rows[x] = static_cast<int32_t>(row);
    sorted.p[x] = slab.p[entry];
    sorted.ds[x] = slab.ds[entry];
  });
  lists.by_stretches(
      slab.begin, slab.end, cached_rows<T>(p.dim + p.dim_v), [&](int64_t c, int64_t first, int64_t last) {
        const int64_t x = lists.list[c] - sorted.rows + first, column = begin + c;
        accumulate(sorted.p + x, p.d_out, p.dim_v, sorted.rows + x, last - first, p.dv + column * p.dim_v);
        accumulate(sorted.ds + x, p.q, p.dim, sorted.rows + x, last - first, p.dk + column * p.dim);
      });
}

// x[rows][dim] += the product of left[terms][kBlock], transposed, with right[terms][dim].
template <class T>
void add_transposed(const T* left, const T* right, int64_t terms, int64_t rows, int64_t dim, T* x, T* sums) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) add_product<Left::by_term>(left + r, kBlock, right, terms, dim, x + r * dim);
  if (r == rows) return;
  for (int64_t d = 0; d < kRows * dim; ++d) sums[d] = 0;
  add_product<Left::by_term>(left + r, kBlock, right, terms, dim, sums);
  for (int64_t d = 0; d < (rows - r) * dim; ++d) x[r * dim + d] += sums[d];
}

// Adds what the slab's dense rows contribute to dk and dv of the columns of a block.
template <class T>
void add_dense(const Problem<T>& p, const Slab<T>& slab, const ColumnsScratch<T>& w, int64_t begin) {
  const int64_t columns = smaller(kBlock, p.n_k - begin), base = slab.offsets[slab.begin];
  for (int64_t i = slab.begin, end; i < slab.end; i = end) {
    for (end = i; end < slab.end && end - i < kTerms && slab.dense[end];) ++end;
    if (end == i) {
      ++end;
      continue;
    }
    for (int64_t t = i; t < end; ++t) {
      const int64_t entry = slab.offsets[t] - base + begin, to = (t - i) * kBlock;
      for (int64_t c = 0; c < kBlock; ++c) {
        w.dense_p[to + c] = c < columns ? slab.p[entry + c] : T(0);
        w.dense_ds[to + c] = c < columns ? slab.ds[entry + c] : T(0);
      }
    }
    add_transposed(w.dense_p, p.d_out + i * p.dim_v, end - i, columns, p.dim_v, p.dv + begin * p.dim_v, w.sums);
    add_transposed(w.dense_ds, p.q + i * p.dim, end - i, columns, p.dim, p.dk + begin * p.dim, w.sums);
  }
}

template <class T>
void backward_columns(const Problem<T>& p, const Slab<T>& slab, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const int64_t base = slab.offsets[slab.begin];
  const ColumnsScratch<T> w(arena, p, slab.end - slab.begin, slab.offsets[slab.end] - base);
  for (int64_t taken; queue.take(taken);) {
    const int64_t begin = taken * p.k_at_a_time, end = smaller(p.n_k, begin + p.k_at_a_time);
    add_listed(p, slab, w, begin, end);
    for (int64_t first = begin; first < end; first += kBlock) add_dense(p, slab, w, first);
    if (slab.end == p.n_q) scale_row(p.dk + begin * p.dim, (end - begin) * p.dim, p.scale, p.dk + begin * p.dim);
  }
}
