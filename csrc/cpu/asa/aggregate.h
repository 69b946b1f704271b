// The second pass of the forward: M from bits alone, softmax over the survivors, times v.

// p.out and statistics of one row from the sum of exp(s - shift) v for some shift, where `sum` is that of exp(s - shift),
// and `lse_kept` is log(sum) + shift.
template <class T>
void finish_row(const Problem<T>& p, int64_t i, const uint64_t* m, int64_t count, T lse_kept, T sum, const T* values) {
  p.survivors[i] = static_cast<int32_t>(count);
  p.lse_kept[i] = count ? lse_kept : T(-kInfinity);
  if (!p.scanned()) p.lse[i] = p.lse_kept[i];
  if (!__builtin_isfinite(p.lse[i])) p.lse_kept[i] = p.lse[i];
  bool nan_row = false;
  if (p.not_finite != nullptr) for_bits(m, p.blocks_k, [&](int64_t j) { nan_row |= p.not_finite[j]; });
  const bool undefined = (p.n_real > 0 && !__builtin_isfinite(p.lse[i])) || (p.alpha && !(p.alpha[i] >= 0)) ||
                         (p.beta && !(p.beta[i] >= 0));
  const T factor = (undefined && real(p.real_q, i)) || nan_row ? T(__builtin_nan("")) : count ? 1 / sum : T(0);
  for (int64_t d = 0; d < p.dim_v; ++d) p.out[i * p.dim_v + d] = values[d] * factor;
}

// One stretch of a row's softmax: `weights` are exp(s - shift) of survivors, by the bits m, and 0 of others, where the
// shift is the largest score so far. Returns the factor by which earlier sums shrink.
template <class T>
T masked_exponentials(const T* s, const uint64_t* m, int64_t from, int64_t to, T& shift, T& sum, T* weights) {
  Vec<T> most = splat(T(-kInfinity));
  for (int64_t j = from; j < to; j += kLanes<T>)
    most = maximum(most, choose(lane_bits<T>(m, j), load(s + j - from), splat(T(-kInfinity))));
  const T before = shift;
  shift = largest_of<T>(maximum(splat(shift), most));
  const T finite = shift == T(-kInfinity) ? T(0) : shift;
  Vec<T> part = {};
  for (int64_t j = from; j < to; j += kLanes<T>) {
    const Vec<T> e = choose(lane_bits<T>(m, j), exponential(load(s + j - from) - finite), Vec<T>{});
    store(weights + j - from, e);
    part += e;
  }
  const T factor = shift == before ? T(1) : exponential(splat(T(before - finite)))[0];
  sum = sum * factor + sum_of<T>(part);
  return factor;
}

// A number of each of kRows rows, in the lanes of vectors that go on with the rows where those before end.
template <class T>
struct ByRow {
  static constexpr int64_t kVectors = kRows > kLanes<T> ? kRows / kLanes<T> : 1;
  static constexpr int64_t kNumbers = kVectors * kLanes<T>;
  Vec<T> part[kVectors];

  static ByRow of(const T* numbers) {
    T all[kNumbers];
    for (int64_t x = 0; x < kNumbers; ++x) all[x] = numbers[x % kRows];
    ByRow y;
    for (int64_t i = 0; i < kVectors; ++i) y.part[i] = load(all + i * kLanes<T>);
    return y;
  }

  template <class F>
  void fold(T* numbers, const F& f) const {
    T all[kNumbers];
    for (int64_t i = 0; i < kVectors; ++i) store(all + i * kLanes<T>, part[i]);
    for (int64_t x = kRows; x < kNumbers; ++x) all[x % kRows] = f(all[x % kRows], all[x]);
    for (int64_t r = 0; r < kRows; ++r) numbers[r] = all[r];
  }
};

// Room for the numbers of `count` keys that kRows rows share, read and written by whole vectors and columns.
template <class T>
int64_t shared_room(int64_t count) {
  return rounded_up((count + kColumns) * kRows, larger(kPad, ByRow<T>::kNumbers));
}

// Calls f(i, x) for the i-th vector of a ByRow and the numbers [x, x + lanes) of shared keys.
template <class T, class F>
ASA_INLINE void for_shared(int64_t count, const F& f) {
  for (int64_t x = 0; x < count * kRows; x += ByRow<T>::kNumbers)
#pragma GCC unroll 4
    for (int64_t i = 0; i < ByRow<T>::kVectors; ++i) f(i, x + i * kLanes<T>);
}

// The sums over the shared keys of f(i, x), row by row.
template <class T, class F>
void sums_of_shared(int64_t count, T* sums, const F& f) {
  ByRow<T> sum = {}, part = {};
  int64_t added = 0;
  for_shared<T>(count, [&](int64_t i, int64_t x) {
    part.part[i] += f(i, x);
    if (i + 1 == ByRow<T>::kVectors && ++added % 64 == 0)  // in parts, which rounds less
      for (int64_t v = 0; v < ByRow<T>::kVectors; ++v) sum.part[v] += part.part[v], part.part[v] = Vec<T>{};
  });
  for (int64_t v = 0; v < ByRow<T>::kVectors; ++v) sum.part[v] += part.part[v];
  sum.fold(sums, [](T a, T b) { return a + b; });
}

// Scores of shared keys become exp(s - largest) where they survive, else 0.
template <class T>
void shared_exponentials(T* s, const uint64_t* members, int64_t count, T* shift, T* sum) {
  ByRow<T> most;
  for (auto& part : most.part) part = splat(T(-kInfinity));
  for_shared<T>(count, [&](int64_t i, int64_t x) {
    most.part[i] = maximum(most.part[i], choose(lane_bits<T>(members, x), load(s + x), splat(T(-kInfinity))));
  });
  most.fold(shift, [](T a, T b) { return a > b ? a : b; });
  for (int64_t r = 0; r < kRows; ++r) shift[r] = shift[r] == T(-kInfinity) ? T(0) : shift[r];
  const ByRow<T> all = ByRow<T>::of(shift);
  sums_of_shared<T>(count, sum, [&](int64_t i, int64_t x) {
    const Vec<T> e = choose(lane_bits<T>(members, x), exponential(load(s + x) - all.part[i]), Vec<T>{});
    store(s + x, e);
    return e;
  });
}

// Whole rows on AMX, kSquare at a time.
template <class T>
struct TilesScratch {
  static constexpr int64_t kKeys = 512;  // taken at a time, whose scores and weights stay in the second-level cache
  int64_t dim, dim_v, keys, stride;  // multiples of kSquare; `stride` no power of 2, from one row of keys to the next
  uint16_t *q, *weights;
  T *s, *sums;

  TilesScratch(Arena& arena, const Problem<T>& p)
      : dim(rounded_up(p.dim, kSquare)),
        dim_v(rounded_up(p.dim_v, kSquare)),
        keys(smaller(kKeys, rounded_up(p.n_k, kSquare))),
        stride(keys + kSquare) {
    const int64_t some = on_tiles(p) ? kSquare : 0, all = on_tiles(p) ? p.q_at_a_time : 0;
    q = arena.take<uint16_t>(all * dim * p.parts);
    weights = arena.take<uint16_t>(some * stride * p.parts);
    s = arena.take<T>(some * stride);
    sums = arena.take<T>(all * dim_v);
  }
};

// The sums over the survivors of some of the rows of kind `whole`, wherever they are: rows[x] for x < count, at most
// p.q_at_a_time; for each exp(s - shift) v goes to w.sums[x], and shift and the sum of exp(s - shift) to those of the row.
template <class T>
void aggregate_on_tiles(const Problem<T>& p, const Survivors<T>& survivors, const TilesScratch<T>& w,
                        const int64_t* rows, int64_t count, T* shift, T* sum) {
  const int64_t left = w.dim * p.parts;
  for (int64_t x = 0; x < count; x += kSquare)
    pack_left<T>(
        smaller(kSquare, count - x), [&](int64_t r) { return p.q + (survivors.first + rows[x + r]) * p.dim; }, p.dim,
        p.parts, w.q + x * left);
  for (int64_t x = 0; x < count; ++x) shift[rows[x]] = -kInfinity, sum[rows[x]] = 0;
  for (int64_t x = 0; x < rounded_up(count, kSquare) * w.dim_v; ++x) w.sums[x] = 0;
  for (int64_t from = 0; from < p.n_k; from += w.keys) {
    const int64_t keys = rounded_up(smaller(w.keys, p.n_k - from), kSquare), plane = kSquare * w.stride;
    for (int64_t x = 0; x < count; x += kSquare) {
      for (int64_t j = 0; j < keys; j += kSquare)
        multiply({w.q + x * left, w.dim, kSquare * w.dim},
                 tiles_of_columns(p.k_tiles, p.dim, p.parts, (from + j) / kSquare), w.dim / kSquare, p.parts, w.s + j,
                 w.stride, false);
      for (int64_t r = 0; r < kSquare; ++r) {
        T* const s = w.s + r * w.stride;
        if (x + r < count) {
          const int64_t row = rows[x + r];
          scale_row(s, keys, p.scale, s);
          const T factor = masked_exponentials(s, survivors.row(p, row), from, from + keys, shift[row], sum[row], s);
          T* const sums = w.sums + (x + r) * w.dim_v;
          if (factor != 1) scale_row(sums, w.dim_v, factor, sums);
        }
        for (int64_t j = 0; j < keys; j += kLanes<T>)
          store_parts(w.weights + r * w.stride + j, plane, p.parts, load(s + j));
      }
      for (int64_t d = 0; d < w.dim_v; d += kSquare)
        multiply({w.weights, w.stride, plane}, tiles_of_terms(p.v_tiles, p.dim_v, p.parts, from / kSquare, d),
                 keys / kSquare, p.parts, w.sums + x * w.dim_v + d, w.dim_v, true);
    }
  }
}

template <class T>
struct AggregateScratch {
  Survivors<T> survivors;
  int64_t stretch;  // panels
  T *sums, *s, *q, *whole;
  TilesScratch<T> tiles;
  int32_t* columns;
  uint64_t* members;

  AggregateScratch(Arena& arena, const Problem<T>& p) : survivors(arena, p), tiles(arena, p) {
    // Lists of single rows are taken up to n_k / 4 keys on average, those of kRows rows up to most_shared().
    const int64_t listed = p.q_at_a_time * (p.n_k / 4 + 1 + 2 * kPad);
    const int64_t shared = p.q_at_a_time / kRows * shared_room<T>(most_shared(p.n_k));
    stretch = smaller(panels_of<T>(p.n_k), larger(1, cached_rows<T>(p.dim + p.dim_v) / kPanel<T>));
    sums = arena.take<T>(p.q_at_a_time * p.dim_v);
    q = arena.take<T>(p.q_at_a_time * p.dim);
    whole = arena.take<T>(on_tiles(p) ? 0 : kRows * stretch * kPanel<T>);
    members = arena.take<uint64_t>(p.q_at_a_time / kRows * Survivors<T>::members_room(most_shared(p.n_k)));
    columns = arena.take<int32_t>(larger(listed, p.q_at_a_time / kRows * list_room(p.n_k)));
    s = arena.take<T>(larger(listed, shared));
  }
};

template <class T>
int64_t aggregate_bytes(const Problem<T>& p) {
  return bytes_of<AggregateScratch>(p);
}

// What completes the outputs that scan() began: the weights of what the local block adds, and their negatives of
// what reciprocity removes.
//
// The weights that are subtracted are formed again, so they differ from those in the sum by their rounding, by relative
// errors e_j that do not depend on each other. The sum over what is left has errors e_j w_j v_j already, of a size that
// goes with the root of the sum of (w |v|)^2. Where these add up to no more for what is removed than to half of it, the
// errors grow by no more than sqrt(2); and where half of the mass is left, the rounding of sums at most doubles.
template <class T>
struct Change {
  T mass = 0;
  T removed = 0;  // the sum of these squares
  // Below the bound, squares are too small to compare: another value is much larger than all that count.
  bool is_exact(T mass_before, T squares) const {
    return 2 * -mass <= mass_before && 3 * removed <= squares && squares > T(1e-25);
  }
};

template <class T>
ASA_INLINE bool is_neighbour(const Problem<T>& p, int64_t i, int64_t j) {
  return p.words(i / kBlock, j / kBlock)[i % kBlock] >> j % kBlock & 1;
}

// Scores of row i become weights.
template <class T>
Change<T> listed_changes(const Problem<T>& p, int64_t i, const int32_t* list, int64_t count, T* s) {
  for (int64_t c = 0; c < count; c += kLanes<T>) store(s + c, exponential(load(s + c) - p.shift[i]) * p.factor[i]);
  Change<T> change;
  for (int64_t c = 0; c < count; ++c) {
    const T sized = s[c] * p.sizes[list[c]];
    if (is_neighbour(p, i, list[c])) s[c] = -s[c], change.removed += sized * sized;
    change.mass += s[c];
  }
  return change;
}

// The same for kRows rows from row i on, of which there are `rows`.
template <class T>
void shared_changes(const Problem<T>& p, int64_t i, int64_t rows, const int32_t* list, const uint64_t* members,
                    int64_t count, T* s, Change<T>* changes) {
  T numbers[kRows] = {}, factors[kRows] = {};
  for (int64_t r = 0; r < rows; ++r) numbers[r] = p.shift[i + r], factors[r] = p.factor[i + r];
  const ByRow<T> shift = ByRow<T>::of(numbers), factor = ByRow<T>::of(factors);
  for_shared<T>(count, [&](int64_t v, int64_t x) {
    const Vec<T> w = exponential(load(s + x) - shift.part[v]) * factor.part[v];
    store(s + x, choose(lane_bits<T>(members, x), -w, Vec<T>{}));
  });
  for (int64_t c = 0; p.positions > 0 && c < count; ++c)
    for (int64_t r = 0; r < rows; ++r)
      if (!is_neighbour(p, i + r, list[c])) s[c * kRows + r] = -s[c * kRows + r];
  sums_of_shared<T>(count, numbers, [&](int64_t, int64_t x) { return load(s + x); });
  for (int64_t r = 0; r < rows; ++r) changes[r].mass = numbers[r];
  for (T& x : numbers) x = 0;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t r = 0; r < kRows; ++r) {
      const T w = s[c * kRows + r], sized = w * p.sizes[list[c]];
      numbers[r] += w < 0 ? sized * sized : T(0);
    }
  for (int64_t r = 0; r < rows; ++r) changes[r].removed = numbers[r];
}

// Adds what scan() left of row i, the sum over the survivors in settled blocks, to the sums over the others. Returns the
// logarithm of the sum of exp(s - shift); `sum` and `values` are that and the sum of exp(s - shift) v, both times factor.
template <class T>
double add_begun(const Problem<T>& p, int64_t i, T& shift, T& sum, T* values) {
  if (p.mass[i] == 0) return __builtin_log(static_cast<double>(sum));  // no survivors there
  const T most = sum > 0 && shift > p.shift[i] ? shift : p.shift[i];
  const auto scale = [&](T x) { return static_cast<T>(__builtin_exp(static_cast<double>(x) - most)); };
  const T ours = scale(p.shift[i]), theirs = sum > 0 ? scale(shift) * p.factor[i] : T(0);
  for (int64_t d = 0; d < p.dim_v; ++d) values[d] = values[d] * theirs + p.out[i * p.dim_v + d] * ours;
  sum = sum * theirs + p.mass[i] * ours;
  shift = most;
  return __builtin_log(static_cast<double>(sum)) - __builtin_log(static_cast<double>(p.factor[i]));
}

// The scores of row i that scan() kept, from key `first` on.
template <class T>
const T* kept_scores(const Problem<T>& p, int64_t i, int64_t first = 0) {
  return p.scores + (i - p.begin) * score_stride(p) + first;
}

template <class T>
void pick_scores(const T* row, const int32_t* list, int64_t count, T* s, int64_t stride) {
  for (int64_t c = 0; c < count; ++c) s[c * stride] = row[list[c]];
}

template <class T>
void aggregate(const Problem<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  AggregateScratch<T> w(arena, p);
  const TilesOf<T> tiles(p);
  Survivors<T>& survivors = w.survivors;
  T *const sums = w.sums, *const s = w.s, *const q = w.q;
  const int64_t panels = panels_of<T>(p.n_k), stretch = w.stretch, stride = stretch * kPanel<T>;

  while (survivors.take(p, queue)) {
    for (int64_t x = 0; x < survivors.rows * p.dim_v; ++x) sums[x] = 0;
    T shift[kMostRows], sum[kMostRows];
    Change<T> changes[kMostRows];
    Lists<kMostRows> lists = {};  // of a row, or of the first of kRows rows that share it
    int64_t offset[kMostRows], columns = 0, numbers = 0, words = 0;
    survivors.for_each(Kind::listed, [&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r) {
        scale_row(p.q + (survivors.first + r) * p.dim, p.dim, p.scale, q + r * p.dim);
        lists.list[r] = w.columns + columns;
        lists.count[r] = list_bits(survivors.row(p, r), p.blocks_k, 0, w.columns + columns) - lists.list[r];
        offset[r] = numbers;
        columns += list_room(lists.count[r]);
        numbers += list_room(lists.count[r]);
      }
    });
    uint64_t* members[kMostRows];
    survivors.for_each(Kind::shared, [&](int64_t first, int64_t rows) {
      scale_rows(p.q + (survivors.first + first) * p.dim, rows, p.dim, p.scale, q + first * p.dim);
      lists.list[first] = w.columns + columns;
      offset[first] = numbers;
      members[first] = w.members + words;
      const int64_t count = survivors.list_shared(p, first, w.columns + columns, members[first]);
      lists.count[first] = count;
      columns += list_room(count);
      numbers += shared_room<T>(count);
      words += Survivors<T>::members_room(count);
    });
    const auto is_shared = [&](int64_t r) { return survivors.kind[r / kRows] == Kind::shared; };
    const auto form_some = [&](int64_t r, int64_t from, int64_t to) {
      const int32_t* const list = lists.list[r] + from;
      if (is_shared(r))
        shared_dots(q + r * p.dim, p.k, p.dim, list, to - from, s + offset[r] + from * kRows);
      else
        dots(q + r * p.dim, p.k, p.dim, list, to - from, s + offset[r] + from);
    };
    if (!p.keeps_scores)
      lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim), form_some);
    else
      for (int64_t r = 0; r < survivors.rows; ++r) {
        const int64_t side_by_side = is_shared(r) ? kRows : 1;
        for (int64_t x = 0; lists.count[r] > 0 && x < smaller(side_by_side, survivors.rows - r); ++x)
          pick_scores(kept_scores(p, survivors.first + r + x), lists.list[r], lists.count[r], s + offset[r] + x,
                      side_by_side);
      }
    survivors.for_each(Kind::listed, [&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r)
        if (survivors.corrected[r / kRows])
          changes[r] = listed_changes(p, survivors.first + r, lists.list[r], lists.count[r], s + offset[r]);
        else
          sum[r] = exponentials(s + offset[r], lists.count[r], shift[r]);
    });
    survivors.for_each(Kind::shared, [&](int64_t r, int64_t rows) {
      if (survivors.corrected[r / kRows])
        shared_changes(p, survivors.first + r, rows, lists.list[r], members[r], lists.count[r], s + offset[r],
                       changes + r);
      else
        shared_exponentials(s + offset[r], members[r], lists.count[r], shift + r, sum + r);
    });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim_v), [&](int64_t r, int64_t from, int64_t to) {
      const int32_t* const list = lists.list[r] + from;
      if (is_shared(r))
        add_product<Left::by_term>(s + offset[r] + from * kRows, kRows, Listed<T>{p.v, p.dim_v, list}, to - from,
                                   p.dim_v, sums + r * p.dim_v);
      else
        accumulate(s + offset[r] + from, p.v, p.dim_v, list, to - from, sums + r * p.dim_v);
    });

    for (int64_t r = 0; r < survivors.rows; r += kRows) {
      if (!survivors.corrected[r / kRows]) continue;
      const int64_t first = survivors.first + r, rows = smaller(kRows, survivors.rows - r);
      bool exact = true;
      for (int64_t x = 0; x < rows; ++x) {
        const int64_t i = first + x;
        exact &= !survivors.removes(p, r + x) || changes[r + x].is_exact(p.mass[i], p.squares[i]);
        shift[r + x] = p.shift[i] - __builtin_log(static_cast<double>(p.factor[i]));
        sum[r + x] = p.mass[i] + changes[r + x].mass;
      }
      T* const values = sums + r * p.dim_v;
      for (int64_t x = 0; x < rows * p.dim_v; ++x) values[x] = exact ? values[x] + p.out[first * p.dim_v + x] : T(0);
      survivors.restore(p, r);
      if (!exact) survivors.kind[r / kRows] = Kind::whole;
    }

    if constexpr (kHasTiles<T>)
      if (on_tiles(p)) {
        int64_t whole[kMostRows], count = 0;
        survivors.for_each(Kind::whole, [&](int64_t first, int64_t rows) {
          for (int64_t r = first; r < first + rows; ++r) whole[count++] = r;
        });
        aggregate_on_tiles(p, survivors, w.tiles, whole, count, shift, sum);
        for (int64_t x = 0; x < count; ++x)
          __builtin_memcpy(sums + whole[x] * p.dim_v, w.tiles.sums + x * w.tiles.dim_v, p.dim_v * sizeof(T));
      }
    const auto for_whole = [&](const auto& f) {
      if (!on_tiles(p)) survivors.for_each(Kind::whole, f);
    };
    for_whole([&](int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + kRows; ++r) shift[r] = -kInfinity, sum[r] = 0;
      scale_rows(p.q + (survivors.first + first) * p.dim, rows, p.dim, p.scale, q + first * p.dim);
    });
    for (int64_t begin = 0; begin < panels; begin += stretch) {
      const int64_t end = smaller(panels, begin + stretch), to = smaller(p.n_k, end * kPanel<T>);
      for_whole([&](int64_t first, int64_t rows) {
        const int64_t start = larger(begin, survivors.summed[first / kRows] * kBlock / kPanel<T>);
        if (start >= end) return;
        const int64_t from = start * kPanel<T>;
        for (int64_t x = start; !p.keeps_scores && x < end; ++x)
          scores(q + first * p.dim, p.k_panels + x * panel_size<T>(p.dim), p.n_k - x * kPanel<T>, p.dim,
                 w.whole + (x - start) * kPanel<T>, stride);
        for (int64_t r = first; r < first + rows; ++r) {
          T* const row = w.whole + (r - first) * stride;
          const T* const scores_of_row = p.keeps_scores ? kept_scores(p, survivors.first + r, from) : row;
          const T factor = masked_exponentials(scores_of_row, survivors.row(p, r), from, to, shift[r], sum[r], row);
          if (factor != 1) scale_row(sums + r * p.dim_v, p.dim_v, factor, sums + r * p.dim_v);
        }
        add_product<Left::by_row>(w.whole, stride, Sliced<T>{p.v_slices, p.n_k, from}, to - from, p.dim_v,
                                  sums + first * p.dim_v);
      });
    }

    for (int64_t r = 0; r < survivors.rows; ++r) {
      const int64_t i = survivors.first + r;
      T* const values = sums + r * p.dim_v;
      const double log_sum = survivors.summed[r / kRows] > 0 ? add_begun(p, i, shift[r], sum[r], values)
                                                             : __builtin_log(static_cast<double>(sum[r]));
      finish_row(p, i, survivors.row(p, r), survivors.count[r], T(shift[r] + log_sum), sum[r], values);
    }
  }
}

template <class T>
int64_t list_survivors_bytes(const Problem<T>& p) {
  return bytes_of<Survivors>(p);
}

template <class T>
void list_survivors(const Problem<T>& p, const int64_t* offsets, int32_t* columns, Queue& queue, void* scratch) {
  Arena arena(scratch);
  Survivors<T> survivors(arena, p);
  while (survivors.take(p, queue, false))
    for (int64_t r = 0; r < survivors.rows; ++r) {
      const int64_t i = survivors.first + r;
      if (offsets[i + 1] - offsets[i] != survivors.count[r]) {
        queue.failed = true;
        continue;
      }
      int32_t* next = columns + offsets[i];
      for_bits(survivors.row(p, r), p.blocks_k, [&](int64_t j) { *next++ = static_cast<int32_t>(j); });
    }
}

template <class T>
struct BlockScratch {
  ScanScratch<T> scan;
  uint64_t* m;
  T* sums;

  BlockScratch(Arena& arena, const Problem<T>& p)
      : scan(arena, p), m(arena.take<uint64_t>(kBlock)), sums(arena.take<T>(kRows * p.dim_v)) {}
};

template <class T>
int64_t forward_block_bytes(const Problem<T>& p) {
  return bytes_of<BlockScratch>(p);
}

// Whether sums of exp(s - shift) over some keys of a row are as good as with the largest of their scores as shift.
template <class T>
ASA_INLINE bool is_near(const Scores<T>& scores, int64_t r, T sum) {
  return sum >= T(0x1p-10) && scores.sum[r] <= kBlock;
}

// Adds the local block of all rows to m, where keys are one block: what find_local() and add_local() do.
template <class T>
void find_local_of_block(const Scores<T>& scores, uint64_t* m) {
  const Problem<T>& p = scores.p;
  const uint64_t keys = real_keys(p, 0);
  uint64_t window[kBlock];
  Column<T> log_mean(1), log_beta(1), shift(-kInfinity);
  for (int64_t r = 0; r < p.n_q; ++r) {
    window[r] = 0;
    for_window_rows(p, r, [&](int64_t j, int64_t columns, int64_t) { window[r] |= lowest_bits(columns) << j; });
    window[r] = real(p.real_q, r) ? window[r] & keys : 0;
    if (window[r] == 0) continue;
    const T some = scores.row(r)[__builtin_ctzll(window[r])];
    uint64_t other = 0;
    Vec<T> part = {};
#pragma GCC unroll 4
    for (int64_t c = 0; c < kBlock; c += kLanes<T>) {
      part += choose(lane_bits<T>(window + r, c), load(scores.exponentials_of(r) + c), Vec<T>{});
      const Vec<T> s = load(scores.row(r) + c);
      other |= (greater(s, splat(some)) | greater(splat(some), s)) << c;
    }
    const T sum = sum_of<T>(part);
    if (!is_near(scores, r, sum)) {
      find_local(scores);
      return add_local(p, 0, false, m);
    }
    log_beta[r] = p.beta[r];
    // The mean of equal scores is exact: nobody exceeds it.
    const bool all_equal = (window[r] & other) == 0;
    shift[r] = all_equal ? some : scores.shift[r];
    log_mean[r] = all_equal ? T(1) : sum / __builtin_popcountll(window[r]);
  }
  log_mean.take_logarithms(p.n_q), log_beta.take_logarithms(p.n_q);
  for (int64_t r = 0; r < p.n_q; ++r) {
    p.log_mean[r] = shift[r] + log_mean[r];
    uint64_t kept = 0;
#pragma GCC unroll 4
    for (int64_t c = 0; c < kBlock; c += kLanes<T>)
      kept |= greater(load(scores.row(r) + c) - p.log_mean[r], splat(log_beta[r])) << c;
    kept &= window[r];
    m[r] |= kept;
    if (!p.keeps) continue;
    bool* const flags = p.local + r * p.positions;
    __builtin_memset(flags, 0, p.positions);
    for_window(p, r, [&](int64_t j, int64_t o) { flags[o] = kept >> j & 1; });
  }
}

// The whole forward where keys and queries are one block each, which stays in the cache.
template <class T>
void forward_block(const Problem<T>& p, void* scratch) {
  Arena arena(scratch);
  const BlockScratch<T> w(arena, p);
  const TilesOf<T> tiles(p);
  Scores<T> scores{p, w.scan, 0, p.n_q, true};
  int64_t neighbours[kBlock / kRows];
  scores.form();
  if (p.scanned()) find_neighbours(scores, neighbours);
  clear_bits(p, 0);
  non_local(p, 0, p.blocks_k, w.m);
  if (p.positions > 0) find_local_of_block(scores, w.m);
  Column<T> sum(1), shift(-kInfinity), log_sum(1);
  int64_t count[kBlock];
  for (int64_t r = 0; r < p.n_q; ++r) {
    T* const weights = scores.exponentials_of(r);
    count[r] = __builtin_popcountll(w.m[r]);
    const bool alone = count[r] == 1;  // its weight is exactly 1
    shift[r] = alone ? scores.row(r)[__builtin_ctzll(w.m[r])] : scores.shift[r];
    Vec<T> part = {};
#pragma GCC unroll 4
    for (int64_t c = 0; c < kBlock; c += kLanes<T>) {
      const Vec<T> e = choose(lane_bits<T>(w.m + r, c), alone ? splat(T(1)) : load(weights + c), Vec<T>{});
      store(weights + c, e);
      part += e;
    }
    sum[r] = sum_of<T>(part);
    if (!is_near(scores, r, sum[r])) {
      shift[r] = -kInfinity, sum[r] = 0;
      masked_exponentials(scores.row(r), w.m + r, 0, p.n_k, shift[r], sum[r], weights);
    }
    if (count[r] > 0) log_sum[r] = sum[r];
  }
  log_sum.take_logarithms(p.n_q);
  for (int64_t first = 0; first < p.n_q; first += kRows) {
    for (int64_t x = 0; x < kRows * p.dim_v; ++x) w.sums[x] = 0;
    add_product<Left::by_row>(scores.exponentials_of(first), w.scan.stride, Consecutive<T>{p.v, p.dim_v}, p.n_k,
                              p.dim_v, w.sums);
    for (int64_t r = first; r < smaller(p.n_q, first + kRows); ++r)
      finish_row(p, r, w.m + r, count[r], shift[r] + log_sum[r], sum[r], w.sums + (r - first) * p.dim_v);
  }
}
