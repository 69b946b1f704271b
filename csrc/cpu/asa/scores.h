// The scores of some rows, while they are in the cache, and the sums of their exponentials.

constexpr int64_t kScoreBytes = 512 * 1024;  // of the scores formed at a time, but at least kFewest rows
constexpr double kMostSum = 1e10;  // of exp(s - shift): further from their shift scores would lose digits
constexpr int64_t kStoredBytes = 2 * 1024 * 1024;  // of exponentials beside their scores: more leave the caches
constexpr int64_t kFewest = 32;  // rows that share one reading of the keys

template <class T>
T largest_score(const T* s, int64_t count) {
  Vec<T> most = splat(T(-kInfinity));
  for (int64_t c = 0; c < count; c += kLanes<T>) most = maximum(most, load(s + c));
  return largest_of<T>(most);
}

// s[0 .. count) to exp(s - largest), and their sum; s reaches to a multiple of kPad.
template <class T>
T exponentials(T* s, int64_t count, T& largest) {
  for (int64_t c = count; c < rounded_up(count, kPad); ++c) s[c] = -kInfinity;
  largest = largest_score(s, count);
  Vec<T> sum = {};
  for (int64_t c = 0; c < count; c += kLanes<T>) {
    const Vec<T> e = exponential(load(s + c) - largest);
    store(s + c, e);
    sum += e;
  }
  return sum_of<T>(sum);
}

// A number of each of some consecutive rows, at most kBlock.
template <class T>
struct Column {
  alignas(64) T numbers[kBlock];
  explicit Column(T x) {
    for (T& y : numbers) y = x;
  }
  T& operator[](int64_t r) { return numbers[r]; }
  T operator[](int64_t r) const { return numbers[r]; }
  void take_logarithms(int64_t rows) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) store(numbers + r, logarithm(load(numbers + r)));
  }
};

// How many keys make a panel.
template <class T>
int64_t panel_width(const Problem<T>& p) {
  return on_tiles(p) ? kSquare : kPanel<T>;
}

// From one row of scores to the next; rows reach to the end of a panel and of a block.
template <class T>
int64_t score_stride(const Problem<T>& p) {
  return rounded_up(rounded_up(p.n_k, panel_width(p)), kBlock) + kPad;
}

// Some rows whose scores are in the cache.
template <class T>
struct ScanScratch {
  int64_t width, panels, stride, at_a_time, keys, sums_stride;
  T *q, *s, *work, *window, *weights, *sums;
  T* e;  // exp(s - shift), as s, or null
  uint64_t* m;  // [kBlock][blocks_k]
  uint16_t *q_left, *weights_left;  // on AMX, instead of q and weights; of kSquare rows after the other

  ScanScratch(Arena& arena, const Problem<T>& p) {
    const bool tiles = on_tiles(p);
    width = panel_width(p);
    panels = (p.n_k + width - 1) / width;
    stride = score_stride(p);
    const int64_t fitting = kScoreBytes / (stride * static_cast<int64_t>(sizeof(T))) / kRows * kRows;
    at_a_time = tiles ? kBlock : smaller(kBlock, larger(kFewest, fitting));
    keys = smaller(kValues, rounded_up(p.n_k, kBlock));
    sums_stride = tiles ? rounded_up(p.dim_v, kSquare) : p.dim_v;
    q = arena.take<T>(tiles ? 0 : at_a_time * p.dim);
    q_left = arena.take<uint16_t>(tiles ? at_a_time * q_row(p) : 0);
    s = arena.take<T>(p.keeps_scores ? 0 : at_a_time * stride);
    const bool fit = at_a_time * stride * static_cast<int64_t>(sizeof(T)) <= kStoredBytes;
    const bool begins = p.thresholded && !p.keeps_scores && !tiles && !p.is_one_block();
    e = p.is_one_block() || (begins && fit) ? arena.take<T>(at_a_time * stride) : nullptr;
    work = arena.take<T>(p.topk ? p.n_k : 0);
    window = arena.take<T>(p.positions * kLanes<T>);
    weights = arena.take<T>(p.thresholded && !tiles ? kRows * keys : 0);
    weights_left = arena.take<uint16_t>(p.thresholded && tiles ? kSquare * (keys + kSquare) * p.parts : 0);
    sums = arena.take<T>(p.thresholded ? at_a_time * sums_stride : 0);
    m = arena.take<uint64_t>(begins ? kBlock * p.blocks_k : 0);
  }

  static int64_t q_row(const Problem<T>& p) { return rounded_up(p.dim, kSquare) * p.parts; }

  static constexpr int64_t kValues = 256;  // taken at a time, whose weights stay in the first-level cache
};

template <class T>
int64_t scan_bytes(const Problem<T>& p) {
  return bytes_of<ScanScratch>(p);
}

// The scores of some rows, and for each the sum of exp(s), as sum * exp(shift). The shift is the largest score of the
// first panel: so each score is read once. Rows in which it turns out to be no good, because sums overflow or there is
// no such score, are read again with the largest of all.
template <class T>
struct Scores {
  const Problem<T>& p;
  const ScanScratch<T>& w;
  int64_t first, rows;
  bool stores;  // exponentials, where there is room
  T* const s = p.keeps_scores ? p.scores + (first - p.begin) * w.stride : w.s;
  T* const e = stores ? w.e : nullptr;
  T shift[kBlock] = {};
  double sum[kBlock] = {};

  T* row(int64_t r) const { return s + r * w.stride; }
  T* exponentials_of(int64_t r) const { return e == nullptr ? nullptr : e + r * w.stride; }

  void form() {
    take_queries();
    for (int64_t r = 0; r < rows; ++r) sum[r] = 0;
    // Products and exponentials each have the registers for themselves; what goes between them stays in the cache.
    constexpr int64_t kKeys = 384;  // at a time, whole panels
    for (int64_t from = 0; from < w.panels * w.width; from += kKeys) {
      const int64_t to = smaller(w.panels * w.width, from + kKeys);
      for (int64_t i = from / w.width; i < to / w.width; ++i) form_panel(i);
      for (int64_t r = 0; r < rows; ++r) add_exponentials(r, from, to);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = w.panels * w.width; j < p.blocks_k * kBlock; ++j) row(r)[j] = -kInfinity;
      // The shift's own term is 1: less is what too large scores make of a sum.
      if (!(sum[r] >= 0.5 && sum[r] < kMostSum && shift[r] > -kInfinity)) sum_again(r);
    }
  }

  // The scores of the first keys alone, by themselves.
  void form_again(int64_t keys) {
    take_queries();
    for (int64_t i = 0; i < (keys + w.width - 1) / w.width; ++i) form_panel(i);
  }

  // A power of two, so that weights exp(s - shift) times it are at most about 1, and equal ones add up without rounding.
  // 0 for a row without keys or with a score that is NaN.
  T factor(int64_t r) const { return sum[r] > 0 ? T(__builtin_ldexp(1.0, -__builtin_ilogb(sum[r]))) : T(0); }

  Column<T> lse() const {
    Column<T> x(1);
    for (int64_t r = 0; r < rows; ++r) x[r] = static_cast<T>(sum[r]);
    x.take_logarithms(rows);
    for (int64_t r = 0; r < rows; ++r) x[r] += shift[r];
    return x;
  }

 private:
  void take_queries() {
    if (!on_tiles(p)) scale_rows(p.q + first * p.dim, rows, p.dim, p.scale, w.q);
    if constexpr (kHasTiles<T>)
      for (int64_t r = 0; on_tiles(p) && r < rows; r += kSquare)
        pack_left<T>(
            smaller(kSquare, rows - r), [&](int64_t x) { return p.q + (first + r + x) * p.dim; }, p.dim, p.parts,
            w.q_left + r * w.q_row(p));
  }

  void form_panel(int64_t i) {
    if constexpr (kHasTiles<T>)
      if (on_tiles(p)) return form_tiles(i);
    const T* const panel = p.k_panels + i * panel_size<T>(p.dim);
    const int64_t from = i * kPanel<T>, keys = smaller(kPanel<T>, p.n_k - from);
    for (int64_t d = 0; d < p.dim; d += kDepth)
      for (int64_t r = 0; r < rows; r += kRows)
        add_scores(w.q + r * p.dim, panel, keys, p.dim, d, smaller(p.dim, d + kDepth), row(r) + from, w.stride);
  }

  // The same on AMX. Scores are scaled afterwards: scaled queries would be no bf16 numbers.
  void form_tiles(int64_t i) {
    const int64_t from = i * kSquare, stride = rounded_up(p.dim, kSquare);
    for (int64_t r = 0; r < rows; r += kSquare) {
      multiply({w.q_left + r * w.q_row(p), stride, kSquare * stride}, tiles_of_columns(p.k_tiles, p.dim, p.parts, i),
               stride / kSquare, p.parts, row(r) + from, w.stride, false);
      for (int64_t x = r; x < smaller(rows, r + kSquare); ++x)
        scale_row(row(x) + from, kSquare, p.scale, row(x) + from);
    }
  }

  // Makes scores [from, to) of a row -inf where there is no key.
  void hide(T* s, int64_t from, int64_t to) {
    const int64_t end = smaller(to, p.blocks_k * kBlock);  // nobody reads further
    for (int64_t j = p.n_k / kLanes<T> * kLanes<T>; j < end; j += kLanes<T>)
      store(s + j, choose(lowest_bits(p.n_k - j), load(s + j), splat(T(-kInfinity))));
    if (p.real_k != nullptr)
      for (int64_t j = from; j < smaller(to, p.n_k); ++j)
        if (!p.real_k[j]) s[j] = -kInfinity;
  }

  void add_exponentials(int64_t r, int64_t from, int64_t to) {
    T *const s = row(r), *const exponentials = exponentials_of(r);
    if (to > p.n_k || p.real_k != nullptr) hide(s, from, to);
    if (from == 0) shift[r] = largest_score(s, w.width);
    const Vec<T> largest = splat(shift[r]);
    const int64_t end = smaller(to, rounded_up(p.n_k, kLanes<T>));
    // The same with a store or without: the last product of an exponential, by a power of 2, is exact.
    Vec<T> total = {};
#pragma GCC unroll 4
    for (int64_t j = from; j < end; j += kLanes<T>) {
      const Vec<T> x = exponential(load(s + j) - largest);
      if (exponentials != nullptr) store(exponentials + j, x);
      total += x;
    }
    sum[r] += sum_of<T>(total);
  }

  void sum_again(int64_t r) {
    const T* const s = row(r);
    const T largest = largest_score(s, p.blocks_k * kBlock);
    const bool none = largest == T(-kInfinity);  // it is the largest of NaN and -inf, too
    shift[r] = largest;
    sum[r] = 0;
    for (int64_t j = 0; j < p.blocks_k * kBlock; j += kBlock) {
      Vec<T> part = {};
      for (int64_t c = 0; c < kBlock; c += kLanes<T>) {
        const Vec<T> y = load(s + j + c);
        const Vec<T> x = none ? select<T>(y == y, Vec<T>{}, y) : exponential(y - shift[r]);
        if (e != nullptr) store(exponentials_of(r) + j + c, x);
        part += x;
      }
      sum[r] += sum_of<T>(part);
    }
  }
};
