// The gradients of q, k, v: rows first, which give dq and leave p and ds of every survivor in a slab, then columns,
// which sum them to dv and dk. No two threads add to the same number.

template <class T>
int64_t whole_stride(const Problem<T>& p) {
  return rounded_up(panels_of<T>(p.n_k) * kPanel<T>, kSquare) + kPad;  // not a multiple of a page for most n_k
}

template <class T>
int64_t find_groups_bytes(const Problem<T>& p) {
  return bytes_of<Survivors>(p);
}

// How the passes will treat every kRows rows.
template <class T>
void find_groups(const Problem<T>& p, const Groups& groups, Queue& queue, void* scratch) {
  Arena arena(scratch);
  Survivors<T> survivors(arena, p);
  while (survivors.take(p, queue, false))
    for (int64_t r = 0; r < survivors.rows; ++r) {
      const int64_t i = survivors.first + r;
      if (p.kinds == nullptr && p.survivors[i] != survivors.count[r]) queue.failed = true;
      groups.kind[i] = survivors.kind[r / kRows];
      groups.keys[i] = static_cast<int32_t>(survivors.together[r / kRows]);
      groups.listed[i] = static_cast<int32_t>(survivors.count[r]);
    }
}

// Where the entries of rows lie: in numbers, and in keys.
template <class T>
void lay_out(const Problem<T>& p, const Groups& groups) {
  int64_t *const numbers = groups.numbers, *const columns = groups.columns;
  numbers[p.begin] = columns[p.begin] = 0;
  for (int64_t i = p.begin; i < p.end; ++i) {
    const bool leads = i % kRows == 0;
    const int64_t listed = list_room(groups.listed[i]), shared = groups.keys[i];
    switch (groups.kind[i]) {
      case Kind::whole: numbers[i + 1] = whole_stride(p), columns[i + 1] = 0; break;
      case Kind::listed: numbers[i + 1] = columns[i + 1] = listed; break;
      case Kind::shared:
        numbers[i + 1] = leads ? shared_room<T>(shared) : 0, columns[i + 1] = leads ? list_room(shared) : 0;
    }
    numbers[i + 1] += numbers[i], columns[i + 1] += columns[i];
  }
  // Whole rows are written kRows at a time.
  if (p.begin < p.end && groups.kind[p.end - 1] == Kind::whole)
    numbers[p.end] += (rounded_up(p.end, kRows) - p.end) * whole_stride(p);
}

// Notes the softmax of row i for those who will form its probabilities again.
template <class T>
void note_softmax(const Problem<T>& p, int64_t i, T shift, T factor) {
  if (p.shift != nullptr) p.shift[i] = shift, p.factor[i] = factor;
}

// The scores of row i, all of them of survivors, become probabilities.
template <class T>
void listed_probabilities(const Problem<T>& p, int64_t i, T* s, int64_t count) {
  if (p.kinds != nullptr) {
    for (int64_t c = 0; c < count; c += kLanes<T>) store(s + c, exponential(load(s + c) - p.shift[i]) * p.factor[i]);
    return;
  }
  T shift;
  const T sum = exponentials(s, count, shift), factor = count ? 1 / sum : T(0);
  scale_row(s, count, factor, s);
  note_softmax(p, i, shift, factor);
}

// The same where survivors are those of the bits m.
template <class T>
void masked_probabilities(const Problem<T>& p, int64_t i, const uint64_t* m, bool any, T* s) {
  if (p.kinds != nullptr) {
    const T shift = p.shift[i], factor = p.factor[i];
    for (int64_t j = 0; j < p.n_k; j += kLanes<T>)
      store(s + j, choose(lane_bits<T>(m, j), exponential(load(s + j) - shift), Vec<T>{}) * factor);
    return;
  }
  T shift = -kInfinity, sum = 0;
  masked_exponentials(s, m, 0, p.n_k, shift, sum, s);
  const T factor = any ? 1 / sum : T(0);
  scale_row(s, p.n_k, factor, s);
  note_softmax(p, i, shift == T(-kInfinity) ? T(0) : shift, factor);
}

// Turns dp of row i into ds, in place, where its pairs survive, by the bits m.
template <class T>
void score_gradients(const Problem<T>& p, int64_t i, const T* probability, T* dp, int64_t count, const uint64_t* m) {
  const auto kept = [&](int64_t c, Vec<T> x) { return m ? choose(lane_bits<T>(m, c), x, Vec<T>{}) : x; };
  if (p.kinds == nullptr) {
    Vec<T> part = {};
    for (int64_t c = 0; c < count; c += kLanes<T>) part += kept(c, load(probability + c) * load(dp + c));
    p.delta[i] = sum_of<T>(part);
  }
  const T mean = p.delta[i];
  for (int64_t c = 0; c < count; c += kLanes<T>) store(dp + c, kept(c, load(probability + c) * (load(dp + c) - mean)));
}

// Both for the shared keys of `rows` rows from row i on.
template <class T>
void shared_gradients(const Problem<T>& p, int64_t i, int64_t rows, T* s, T* dp, const uint64_t* members,
                      int64_t count) {
  T shift[kRows] = {}, factors[kRows] = {}, means[kRows] = {};
  if (p.kinds == nullptr) {
    shared_exponentials(s, members, count, shift, factors);
    for (T& x : factors) x = x > 0 ? 1 / x : T(0);
    const ByRow<T> factor = ByRow<T>::of(factors);
    sums_of_shared<T>(count, means, [&](int64_t v, int64_t x) {
      const Vec<T> probability = load(s + x) * factor.part[v];
      store(s + x, probability);
      return choose(lane_bits<T>(members, x), probability * load(dp + x), Vec<T>{});
    });
    for (int64_t r = 0; r < rows; ++r) p.delta[i + r] = means[r], note_softmax(p, i + r, shift[r], factors[r]);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      shift[r] = p.shift[i + r], factors[r] = p.factor[i + r], means[r] = p.delta[i + r];
    const ByRow<T> all = ByRow<T>::of(shift), factor = ByRow<T>::of(factors);
    for_shared<T>(count, [&](int64_t v, int64_t x) {
      const Vec<T> e = choose(lane_bits<T>(members, x), exponential(load(s + x) - all.part[v]), Vec<T>{});
      store(s + x, e * factor.part[v]);
    });
  }
  const ByRow<T> mean = ByRow<T>::of(means);
  for_shared<T>(count, [&](int64_t v, int64_t x) {
    store(dp + x, choose(lane_bits<T>(members, x), load(s + x) * (load(dp + x) - mean.part[v]), Vec<T>{}));
  });
}

// Rows [first, first + kRows) of x; those that keep nobody, or that there are not, are 0: then in `room`.
template <class T>
const T* rows_of_group(const Problem<T>& p, const T* x, int64_t dim, int64_t first, T* room) {
  bool all = first + kRows <= p.n_q;
  for (int64_t i = first; all && i < first + kRows; ++i) all = p.survivors[i] > 0;
  if (all) return x + first * dim;
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t d = 0; d < dim; ++d)
      room[r * dim + d] = first + r < p.n_q && p.survivors[first + r] > 0 ? x[(first + r) * dim + d] : T(0);
  return room;
}

// Whole rows on AMX, kSquare at a time.
template <class T>
struct RowsTilesScratch {
  static constexpr int64_t kKeys = 512;  // taken at a time, with which what is formed stays in the second-level cache
  int64_t dim, dim_v, keys, stride;  // multiples of kSquare; `stride` no power of 2, from one row of keys to the next
  uint16_t *q, *d_out, *ds;
  T *s, *sums;

  RowsTilesScratch(Arena& arena, const Problem<T>& p)
      : dim(rounded_up(p.dim, kSquare)), dim_v(rounded_up(p.dim_v, kSquare)) {
    keys = smaller(kKeys, rounded_up(p.n_k, kSquare)), stride = keys + kSquare;
    const int64_t some = on_tiles(p) ? kSquare : 0, all = on_tiles(p) ? p.q_at_a_time : 0;
    q = arena.take<uint16_t>(all * dim * p.parts);
    d_out = arena.take<uint16_t>(all * dim_v * p.parts);
    ds = arena.take<uint16_t>(some * stride * p.parts);
    s = arena.take<T>(some * stride);
    sums = arena.take<T>(all * dim);
  }
};

// Some whole rows, wherever they are: rows[x] for x < count, at most p.q_at_a_time.
template <class T>
struct RowsOnTiles {
  const Problem<T>& p;
  const RowsTilesScratch<T>& w;
  int64_t first;
  const int64_t* rows;
  int64_t count;

  // Scores, scaled, and gradients of probabilities, to the rows of `s` and `dp`.
  void form(T* const* s, T* const* dp) const {
    const auto pack = [&](const T* tokens, int64_t dim, uint16_t* to) {
      for (int64_t x = 0; x < count; x += kSquare)
        pack_left<T>(
            smaller(kSquare, count - x), [&](int64_t r) { return tokens + (first + rows[x + r]) * dim; }, dim, p.parts,
            to + x * rounded_up(dim, kSquare) * p.parts);
    };
    pack(p.q, p.dim, w.q), pack(p.d_out, p.dim_v, w.d_out);
    for (int64_t from = 0; from < p.n_k; from += w.keys)
      for (int64_t x = 0; x < count; x += kSquare) {
        form_some(w.q, p.k_tiles, p.dim, from, x, p.scale, s);
        form_some(w.d_out, p.v_tiles, p.dim_v, from, x, T(1), dp);
      }
  }

  // w.sums[x] = the sum of ds k.
  void sum(T* const* ds) const {
    for (int64_t from = 0; from < p.n_k; from += w.keys) {
      const int64_t keys = rounded_up(smaller(w.keys, p.n_k - from), kSquare), plane = kSquare * w.stride;
      for (int64_t x = 0; x < count; x += kSquare) {
        for (int64_t r = 0; r < kSquare; ++r)
          for (int64_t j = 0; j < keys; j += kLanes<T>)
            store_parts(w.ds + r * w.stride + j, plane, p.parts,
                        x + r < count ? load(ds[rows[x + r]] + from + j) : Vec<T>{});
        for (int64_t d = 0; d < w.dim; d += kSquare)
          multiply({w.ds, w.stride, plane}, tiles_of_terms(p.k_terms, p.dim, p.parts, from / kSquare, d),
                   keys / kSquare, p.parts, w.sums + x * w.dim + d, w.dim, from > 0);
      }
    }
  }

 private:
  void form_some(const uint16_t* left, const uint16_t* tiles, int64_t dim, int64_t from, int64_t x, T factor,
                 T* const* to) const {
    const int64_t stride = rounded_up(dim, kSquare), keys = rounded_up(smaller(w.keys, p.n_k - from), kSquare);
    for (int64_t j = 0; j < keys; j += kSquare)
      multiply({left + x * stride * p.parts, stride, kSquare * stride},
               tiles_of_columns(tiles, dim, p.parts, (from + j) / kSquare), stride / kSquare, p.parts, w.s + j,
               w.stride, false);
    for (int64_t r = 0; r < smaller(kSquare, count - x); ++r)
      scale_row(w.s + r * w.stride, keys, factor, to[rows[x + r]] + from);
  }
};

template <class T>
struct RowsScratch {
  Survivors<T> survivors;
  T *sums, *q, *d_out;
  uint64_t* members;
  RowsTilesScratch<T> tiles;

  RowsScratch(Arena& arena, const Problem<T>& p)
      : survivors(arena, p),
        sums(arena.take<T>(p.q_at_a_time * p.dim)),
        q(arena.take<T>(p.q_at_a_time * p.dim)),
        d_out(arena.take<T>(p.q_at_a_time * p.dim_v)),
        members(arena.take<uint64_t>(p.q_at_a_time / kRows * Survivors<T>::members_room(most_listed(p)))),
        tiles(arena, p) {}

  // Of the keys that are here rows may share all, few though they are of those of the process that has the rows.
  static int64_t most_listed(const Problem<T>& p) { return p.kinds ? p.n_k : most_shared(p.n_k); }
};

template <class T>
int64_t backward_rows_bytes(const Problem<T>& p) {
  return bytes_of<RowsScratch>(p);
}

template <class T>
void backward_rows(const Problem<T>& p, const Slab<T>& slab, Queue& queue, void* scratch) {
  Arena arena(scratch);
  RowsScratch<T> w(arena, p);
  const TilesOf<T> tiles(p);
  Survivors<T>& survivors = w.survivors;
  T *const sums = w.sums, *const q = w.q, *const d_out = w.d_out;
  const int64_t rows_of_slab = slab.end - slab.begin, panels = panels_of<T>(p.n_k), stride = whole_stride(p);
  const int64_t stretch = larger(1, cached_rows<T>(p.dim + p.dim_v) / kPanel<T>);  // panels

  while (survivors.take(p, queue)) {
    const int64_t group = survivors.first;
    Lists<kMostRows> lists = {};  // of a row, or of the first of kRows rows that share it
    T *probability[kMostRows], *ds[kMostRows];
    const T* gradient[kMostRows];
    for (int64_t r = 0; r < survivors.rows; ++r) {
      const int64_t offset = slab.groups.numbers[group + r] - slab.groups.numbers[slab.begin];
      probability[r] = slab.p + offset;
      ds[r] = slab.ds + offset;
      gradient[r] = p.d_out + (group + r) * p.dim_v;
    }
    for (int64_t x = 0; x < rounded_up(survivors.rows, kRows) * p.dim; ++x) sums[x] = 0;

    const auto list_of = [&](int64_t r) {
      return slab.columns + (slab.groups.columns[group + r] - slab.groups.columns[slab.begin]);
    };
    survivors.for_each(Kind::listed, [&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r) {
        scale_row(p.q + (group + r) * p.dim, p.dim, p.scale, q + r * p.dim);
        lists.list[r] = list_of(r);
        lists.count[r] = survivors.count[r];
        list_bits(survivors.row(p, r), p.blocks_k, 0, list_of(r));
      }
    });
    uint64_t *members[kMostRows], *next = w.members;
    survivors.for_each(Kind::shared, [&](int64_t r, int64_t) {
      scale_row(rows_of_group(p, p.q, p.dim, group + r, q + r * p.dim), kRows * p.dim, p.scale, q + r * p.dim);
      gradient[r] = rows_of_group(p, p.d_out, p.dim_v, group + r, d_out + r * p.dim_v);
      lists.list[r] = list_of(r);
      lists.count[r] = survivors.list_shared(p, r, list_of(r), members[r] = next);
      next += Survivors<T>::members_room(lists.count[r]);
    });
    const auto is_shared = [&](int64_t r) { return survivors.kind[r / kRows] == Kind::shared; };
    const auto all_dots = [&](int64_t r, const T* x, const T* rows, int64_t dim, int64_t from, int64_t to, T* s) {
      const int32_t* const list = lists.list[r] + from;
      if (is_shared(r))
        shared_dots(x, rows, dim, list, to - from, s + from * kRows);
      else
        dots(x, rows, dim, list, to - from, s + from);
    };
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim), [&](int64_t r, int64_t from, int64_t to) {
      all_dots(r, q + r * p.dim, p.k, p.dim, from, to, probability[r]);
    });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim_v), [&](int64_t r, int64_t from, int64_t to) {
      all_dots(r, gradient[r], p.v, p.dim_v, from, to, ds[r]);
    });
    survivors.for_each(Kind::listed, [&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r) {
        const int64_t count = lists.count[r];
        listed_probabilities(p, group + r, probability[r], count);
        for (int64_t c = count; c < rounded_up(count, kPad); ++c) probability[r][c] = ds[r][c] = 0;
        score_gradients<T>(p, group + r, probability[r], ds[r], count, nullptr);
      }
    });
    survivors.for_each(Kind::shared, [&](int64_t r, int64_t rows) {
      shared_gradients(p, group + r, rows, probability[r], ds[r], members[r], lists.count[r]);
    });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim), [&](int64_t r, int64_t from, int64_t to) {
      if (p.dq == nullptr) return;
      const int32_t* const list = lists.list[r] + from;
      if (is_shared(r))
        add_product<Left::by_term>(ds[r] + from * kRows, kRows, Listed<T>{p.k, p.dim, list}, to - from, p.dim,
                                   sums + r * p.dim);
      else
        accumulate(ds[r] + from, p.k, p.dim, list, to - from, sums + r * p.dim);
    });
    int32_t at[kMostRows] = {};  // where the keys of a block start in a list
    for (int64_t j = 0; j <= p.blocks_k; ++j)
      for (int64_t r = 0; r < survivors.rows; ++r) {
        slab.starts[j * rows_of_slab + group + r - slab.begin] = at[r];
        if (j < p.blocks_k) at[r] += static_cast<int32_t>(survivors.count_listed(p, r, j));
      }

    int64_t whole[kMostRows], whole_rows = 0;
    survivors.for_each(Kind::whole, [&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r) whole[whole_rows++] = r;
    });
    const RowsOnTiles<T> on_amx{p, w.tiles, group, whole, whole_rows};
    if constexpr (kHasTiles<T>)
      if (on_tiles(p)) on_amx.form(probability, ds);
    const auto for_whole = [&](const auto& f) {
      if (!on_tiles(p)) survivors.for_each(Kind::whole, f);
    };
    for_whole([&](int64_t first, int64_t rows) {
      scale_rows(p.q + (group + first) * p.dim, rows, p.dim, p.scale, q + first * p.dim);
      scale_rows(p.d_out + (group + first) * p.dim_v, rows, p.dim_v, T(1), d_out + first * p.dim_v);
    });
    for (int64_t begin = 0; begin < panels; begin += stretch)
      for_whole([&](int64_t first, int64_t) {
        for (int64_t x = begin; x < smaller(panels, begin + stretch); ++x) {
          const T* const keys = p.k_panels + x * panel_size<T>(p.dim);
          const T* const values = p.v_panels + x * panel_size<T>(p.dim_v);
          scores(q + first * p.dim, keys, p.n_k - x * kPanel<T>, p.dim, probability[first] + x * kPanel<T>, stride);
          scores(d_out + first * p.dim_v, values, p.n_k - x * kPanel<T>, p.dim_v, ds[first] + x * kPanel<T>, stride);
        }
      });
    survivors.for_each(Kind::whole, [&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r) {
        const uint64_t* const m = survivors.row(p, r);
        masked_probabilities(p, group + r, m, survivors.count[r] > 0, probability[r]);
        score_gradients(p, group + r, probability[r], ds[r], p.n_k, m);
      }
    });
    if (p.dq == nullptr) continue;
    const int64_t keys = cached_rows<T>(p.dim);
    for (int64_t from = 0; from < p.n_k; from += keys)
      for_whole([&](int64_t first, int64_t) {
        add_product<Left::by_row>(ds[first] + from, stride, Sliced<T>{p.k_slices, p.n_k, from},
                                  smaller(keys, p.n_k - from), p.dim, sums + first * p.dim);
      });
    if constexpr (kHasTiles<T>)
      if (on_tiles(p)) {
        on_amx.sum(ds);
        for (int64_t x = 0; x < whole_rows; ++x)
          __builtin_memcpy(sums + whole[x] * p.dim, w.tiles.sums + x * w.tiles.dim, p.dim * sizeof(T));
      }

    scale_row(sums, survivors.rows * p.dim, p.scale, p.dq + group * p.dim);
  }
}

constexpr int64_t kTerms = 256;  // whole rows that are summed by column at a time

template <class T>
struct ColumnsScratch {
  T *whole_p, *whole_ds;  // of some whole rows and a block of columns
  T *sums, *q, *d_out;
  // On AMX, instead of the first: one of them, as a right factor, and its product with a left one.
  uint16_t* terms;
  T* product;  // [dim][kBlock]

  ColumnsScratch(Arena& arena, const Problem<T>& p) {
    const bool tiles = on_tiles(p);
    whole_p = arena.take<T>(tiles ? 0 : kTerms * kBlock);
    whole_ds = arena.take<T>(tiles ? 0 : kTerms * kBlock);
    terms = arena.take<uint16_t>(tiles ? tiles_size(kTerms, kBlock, p.parts) : 0);
    product = arena.take<T>(tiles ? rounded_up(larger(p.dim, p.dim_v), kSquare) * kBlock : 0);
    sums = arena.take<T>(kRows * larger(p.dim, p.dim_v));
    q = arena.take<T>(kRows * p.dim);
    d_out = arena.take<T>(kRows * p.dim_v);
  }
};

template <class T>
int64_t backward_columns_bytes(const Problem<T>& p) {
  return bytes_of<ColumnsScratch>(p);
}

// Adds what the lists of the slab's rows contribute to dk and dv of columns [begin, end).
template <class T>
void add_listed(const Problem<T>& p, const Slab<T>& slab, const ColumnsScratch<T>& w, int64_t begin, int64_t end) {
  const int64_t rows_of_slab = slab.end - slab.begin;
  const Groups& groups = slab.groups;
  const int32_t* const from = slab.starts + begin / kBlock * rows_of_slab;
  const int32_t* const to = slab.starts + (end + kBlock - 1) / kBlock * rows_of_slab;
  for (int64_t x = 0; x < rows_of_slab; ++x) {
    const int64_t i = slab.begin + x, count = to[x] - from[x];
    if (count == 0) continue;
    const int32_t* const list = slab.columns + (groups.columns[i] - groups.columns[slab.begin]) + from[x];
    const int64_t numbers = groups.numbers[i] - groups.numbers[slab.begin];
    if (groups.kind[i] == Kind::shared) {
      const int64_t at = numbers + from[x] * kRows;
      scatter<kRows>(slab.p + at, rows_of_group(p, p.d_out, p.dim_v, i, w.d_out), p.dim_v, list, count, p.dv);
      scatter<kRows>(slab.ds + at, rows_of_group(p, p.q, p.dim, i, w.q), p.dim, list, count, p.dk);
    } else {
      scatter<1>(slab.p + numbers + from[x], p.d_out + i * p.dim_v, p.dim_v, list, count, p.dv);
      scatter<1>(slab.ds + numbers + from[x], p.q + i * p.dim, p.dim, list, count, p.dk);
    }
  }
}

// x[rows][dim] += the product of left[terms][kBlock], transposed, with right[terms][dim].
template <class T>
void add_transposed(const T* left, Sliced<T> right, int64_t terms, int64_t rows, int64_t dim, T* x, T* sums) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) add_product<Left::by_term>(left + r, kBlock, right, terms, dim, x + r * dim);
  if (r == rows) return;
  for (int64_t d = 0; d < kRows * dim; ++d) sums[d] = 0;
  add_product<Left::by_term>(left + r, kBlock, right, terms, dim, sums);
  for (int64_t d = 0; d < (rows - r) * dim; ++d) x[r * dim + d] += sums[d];
}

// Adds what the slab's whole rows contribute to dk and dv of the columns of a block.
template <class T>
void add_whole(const Problem<T>& p, const Slab<T>& slab, const ColumnsScratch<T>& w, int64_t begin) {
  const int64_t columns = smaller(kBlock, p.n_k - begin), base = slab.groups.numbers[slab.begin];
  for (int64_t i = slab.begin, end; i < slab.end; i = end) {
    for (end = i; end < slab.end && end - i < kTerms && slab.groups.kind[end] == Kind::whole;) ++end;
    if (end == i) {
      ++end;
      continue;
    }
    for (int64_t t = i; t < end; ++t) {
      const int64_t entry = slab.groups.numbers[t] - base + begin, to = (t - i) * kBlock;
      for (int64_t c = 0; c < kBlock; ++c) {
        w.whole_p[to + c] = c < columns ? slab.p[entry + c] : T(0);
        w.whole_ds[to + c] = c < columns ? slab.ds[entry + c] : T(0);
      }
    }
    add_transposed(w.whole_p, Sliced<T>{p.d_out_slices, p.n_q, i}, end - i, columns, p.dim_v, p.dv + begin * p.dim_v,
                   w.sums);
    add_transposed(w.whole_ds, Sliced<T>{p.q_slices, p.n_q, i}, end - i, columns, p.dim, p.dk + begin * p.dim, w.sums);
  }
}

// The same on AMX, of p and d_out to dv or of ds and q to dk: the transposed product of `left`, tiles of [n_q][dim], with
// `right`, p or ds of the slab. Rows that are not whole are 0 on both sides.
template <class T>
void add_whole_on_tiles(const Problem<T>& p, const Slab<T>& slab, const ColumnsScratch<T>& w, int64_t begin,
                        const uint16_t* left, const T* right, int64_t dim, T* sums) {
  const int64_t columns = smaller(kBlock, p.n_k - begin), base = slab.groups.numbers[slab.begin];
  const auto whole = [&](int64_t i) { return i < slab.end && slab.groups.kind[i] == Kind::whole; };
  bool any = false;
  for (int64_t i = slab.begin; i < slab.end; i += kTerms) {
    int64_t first = i, last = smaller(slab.end, i + kTerms);
    while (first < last && !whole(first)) ++first;
    while (last > first && !whole(last - 1)) --last;
    if (first == last) continue;
    first = first / kSquare * kSquare;
    const int64_t steps = (last - first + kSquare - 1) / kSquare;
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t block = 0; block < kBlock; block += kSquare) {
        const auto numbers = [&](int64_t r, int64_t c) {
          const int64_t i = first + step * kSquare + r, some = smaller(kLanes<T>, columns - block - c);
          if (some <= 0 || !whole(i)) return Vec<T>{};
          return load_some(right + (slab.groups.numbers[i] - base + begin + block + c), some);
        };
        pack_terms<T>(numbers, p.parts, w.terms + (step * kBlock + block) * kSquare * p.parts);
      }
    for (int64_t d = 0; d < dim; d += kSquare)
      for (int64_t c = 0; c < kBlock; c += kSquare)
        multiply(tiles_of_left(left, dim, p.parts, first / kSquare, d), tiles_of_terms(w.terms, kBlock, p.parts, 0, c),
                 steps, p.parts, w.product + d * kBlock + c, kBlock, any);
    any = true;
  }
  for (int64_t c = 0; any && c < columns; ++c)
    for (int64_t d = 0; d < dim; ++d) sums[(begin + c) * dim + d] += w.product[d * kBlock + c];
}

template <class T>
void backward_columns(const Problem<T>& p, const Slab<T>& slab, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const ColumnsScratch<T> w(arena, p);
  const TilesOf<T> tiles(p);
  for (int64_t taken; queue.take(taken);) {
    const int64_t begin = taken * p.k_at_a_time, end = smaller(p.n_k, begin + p.k_at_a_time);
    add_listed(p, slab, w, begin, end);
    for (int64_t first = begin; first < end; first += kBlock) {
      if constexpr (kHasTiles<T>)
        if (on_tiles(p)) {
          add_whole_on_tiles(p, slab, w, first, p.d_out_left, slab.p, p.dim_v, p.dv);
          add_whole_on_tiles(p, slab, w, first, p.q_left, slab.ds, p.dim, p.dk);
          continue;
        }
      add_whole(p, slab, w, first);
    }
    if (slab.end == p.end) scale_row(p.dk + begin * p.dim, (end - begin) * p.dim, p.scale, p.dk + begin * p.dim);
  }
}
