// The second pass of the forward: M from bits alone, softmax over the survivors, times v.

// p.out and statistics of one row from its unnormalised sum of values.
template <class T>
void finish_row(const Problem<T>& p, int64_t i, const uint64_t* m, int64_t count, T largest, T sum, const T* values) {
  p.survivors[i] = static_cast<int32_t>(count);
  p.lse_kept[i] = count ? T(largest + __builtin_log(static_cast<double>(sum))) : T(-kInfinity);
  if (!p.scanned()) p.lse[i] = p.lse_kept[i];
  if (!__builtin_isfinite(p.lse[i])) p.lse_kept[i] = p.lse[i];
  bool nan_row = false;
  if (p.not_finite != nullptr) for_bits(m, p.blocks_k, [&](int64_t j) { nan_row |= p.not_finite[j]; });
  const bool undefined = (p.n_real > 0 && !__builtin_isfinite(p.lse[i])) || (p.alpha && !(p.alpha[i] >= 0)) ||
                         (p.beta && !(p.beta[i] >= 0));
  const T factor = (undefined && real(p.real_q, i)) || nan_row ? T(__builtin_nan("")) : count ? 1 / sum : T(0);
  for (int64_t d = 0; d < p.dim_v; ++d) p.out[i * p.dim_v + d] = values[d] * factor;
}

template <class T>
ASA_INLINE void scale_row(const T* x, int64_t dim, T factor, T* scaled) {
  for (int64_t d = 0; d < dim; d += kLanes<T>) store(scaled + d, load(x + d) * factor);
}

// One stretch of a row's softmax: scores of survivors, by the bits m, become exp(s - largest), other scores 0. Returns
// the factor by which earlier sums shrink.
template <class T>
T masked_exponentials(T* s, const uint64_t* m, int64_t from, int64_t to, T& largest, T& sum) {
  Vec<T> most = splat(largest);
  for (int64_t j = from; j < to; j += kLanes<T>)
    most = maximum(most, choose(lane_bits<T>(m, j), load(s + j - from), splat(T(-kInfinity))));
  const T before = largest;
  largest = largest_of<T>(most);
  const Vec<T> shift = splat(largest == T(-kInfinity) ? T(0) : largest);
  Vec<T> part = {};
  for (int64_t j = from; j < to; j += kLanes<T>) {
    const Vec<T> e = choose(lane_bits<T>(m, j), exponential(load(s + j - from) - shift), Vec<T>{});
    store(s + j - from, e);
    part += e;
  }
  const T factor = largest == before ? T(1) : exponential(splat(before) - shift)[0];
  sum = sum * factor + sum_of<T>(part);
  return factor;
}

template <class T>
struct AggregateScratch {
  Survivors<T> survivors;
  int64_t stretch;  // panels
  T *sums, *s, *q, *whole;
  int32_t* columns;

  AggregateScratch(Arena& arena, const Problem<T>& p) : survivors(arena, p) {
    const int64_t listed = p.q_at_a_time * (p.n_k / 4 + 1 + 2 * kPad);  // room for the lists of rows that are not dense
    stretch = smaller(panels_of<T>(p.n_k), larger(1, cached_rows<T>(p.dim + p.dim_v) / kPanel<T>));
    sums = arena.take<T>(p.q_at_a_time * p.dim_v);
    s = arena.take<T>(listed);
    q = arena.take<T>(p.q_at_a_time * p.dim);
    whole = arena.take<T>(kRows * stretch * kPanel<T>);
    columns = arena.take<int32_t>(listed);
  }
};

template <class T>
int64_t aggregate_bytes(const Problem<T>& p) {
  return bytes_of<AggregateScratch>(p);
}

template <class T>
void aggregate(const Problem<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  AggregateScratch<T> w(arena, p);
  Survivors<T>& survivors = w.survivors;
  T *const sums = w.sums, *const s = w.s, *const q = w.q;
  const int64_t panels = panels_of<T>(p.n_k), stretch = w.stretch, stride = stretch * kPanel<T>;

  while (survivors.take(p, queue)) {
    for (int64_t x = 0; x < survivors.rows * p.dim_v; ++x) sums[x] = 0;
    T largest[kMostRows], sum[kMostRows];
    for (int64_t r = 0; r < survivors.rows; ++r) largest[r] = -kInfinity, sum[r] = 0;

    Lists<kMostRows> lists = {};
    int64_t offset[kMostRows], used = 0;
    survivors.for_listed([&](int64_t r) {
      scale_row(p.q + (survivors.first + r) * p.dim, p.dim, p.scale, q + r * p.dim);
      lists.list[r] = w.columns + used;
      lists.count[r] = survivors.count[r];
      offset[r] = used;
      list_bits(survivors.row(p, r), p.blocks_k, 0, w.columns + used);
      used += list_room(lists.count[r]);
    });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim), [&](int64_t r, int64_t from, int64_t to) {
      dots(q + r * p.dim, p.k, p.dim, lists.list[r] + from, to - from, s + offset[r] + from);
    });
    survivors.for_listed([&](int64_t r) { sum[r] = exponentials(s + offset[r], lists.count[r], largest[r]); });
    lists.by_stretches(0, p.n_k, cached_rows<T>(p.dim_v), [&](int64_t r, int64_t from, int64_t to) {
      accumulate(s + offset[r] + from, p.v, p.dim_v, lists.list[r] + from, to - from, sums + r * p.dim_v);
    });

    survivors.for_dense([&](int64_t first, int64_t rows) {
      pack(p.q + (survivors.first + first) * p.dim, rows, kRows, p.dim, q + first * p.dim, p.scale);
    });
    for (int64_t begin = 0; begin < panels; begin += stretch) {
      const int64_t end = smaller(panels, begin + stretch), from = begin * kPanel<T>,
                    to = smaller(p.n_k, end * kPanel<T>);
      survivors.for_dense([&](int64_t first, int64_t rows) {
        for (int64_t x = begin; x < end; ++x)
          scores(q + first * p.dim, p.k_panels + x * panel_size<T>(p.dim), p.n_k - x * kPanel<T>, p.dim,
                 w.whole + (x - begin) * kPanel<T>, stride);
        for (int64_t r = first; r < first + rows; ++r) {
          T* const row = w.whole + (r - first) * stride;
          const T factor = masked_exponentials(row, survivors.row(p, r), from, to, largest[r], sum[r]);
          if (factor != 1) scale_row(sums + r * p.dim_v, p.dim_v, factor, sums + r * p.dim_v);
        }
        add_product<Left::by_row>(w.whole, stride, p.v + from * p.dim_v, to - from, p.dim_v, sums + first * p.dim_v);
      });
    }

    for (int64_t r = 0; r < survivors.rows; ++r)
      finish_row(p, survivors.first + r, survivors.row(p, r), survivors.count[r], largest[r], sum[r],
                 sums + r * p.dim_v);
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
  while (survivors.take(p, queue))
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
