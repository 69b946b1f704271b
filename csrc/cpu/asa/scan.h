// Scores of some rows against all keys, while they are in the cache: lse, thresholds, neighbour bits.

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

// log(alpha_i / n) of some rows: j is an adaptive neighbour if s_ij - lse_i exceeds it. The difference comes first: the
// logarithm would be lost if it were added to a large score.
template <class T>
Column<T> log_multipliers(const Problem<T>& p, int64_t first, int64_t rows) {
  if (p.alpha == nullptr) return Column<T>(-kInfinity);
  Column<T> x(1);
  for (int64_t r = 0; r < rows; ++r) x[r] = p.alpha[first + r];
  x.take_logarithms(rows);
  for (int64_t r = 0; r < rows; ++r) x[r] -= static_cast<T>(p.log_n_real);
  return x;
}

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

// Whether rows of a block may begin with the sum over some of their survivors. Not where values are not finite:
// aggregate() looks for those that a row keeps, and no longer knows these.
template <class T>
bool may_sum_survivors(const Problem<T>& p, int64_t block) {
  return p.begun != nullptr && p.reciprocal && !on_tiles(p) && p.not_finite == nullptr &&
         settled_blocks(block, p.blocks_q) > 0;
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

// Words of bits, of some rows for blocks of keys.
struct Words {
  const uint64_t* first;
  int64_t row_stride, block_stride;
  uint64_t operator()(int64_t row, int64_t block) const { return first[row * row_stride + block * block_stride]; }
};

// What scan() leaves of the output of some of the rows: the weights of those of the first keys whose bits are set, times
// v. Without AMX they are kRows, with it some of kSquare. Their shift and factor are there.
template <class T>
struct Beginning {
  const Scores<T>& scores;
  int64_t r;
  Words bits;  // of the rows from r on
  int64_t end;  // of the keys
  const Problem<T>& p = scores.p;
  const ScanScratch<T>& w = scores.w;
  T* const sums = w.sums + r * w.sums_stride;
  double mass[kSquare] = {}, squares[kSquare] = {};

  void form() {
    for (int64_t x = 0; x < kRows * p.dim_v; ++x) sums[x] = 0;
    for (int64_t from = 0; from < end; from += w.keys) {
      const int64_t keys = smaller(w.keys, end - from);
      for (int64_t x = 0; x < kRows; ++x) {
        T* const weights = w.weights + x * w.keys;
        form_weights(x, r + x < scores.rows, from, keys, [&](int64_t j, Vec<T> e) { store(weights + j, e); });
      }
      add_product<Left::by_row>(w.weights, w.keys, Sliced<T>{p.v_slices, p.n_k, from}, keys, p.dim_v, sums);
    }
  }

  // On AMX, for the rows x of kSquare for which begins(x) holds; the weights of others are 0.
  template <class F>
  void form_on_tiles(const F& begins) {
    for (int64_t from = 0; from < end; from += w.keys) {
      const int64_t keys = rounded_up(smaller(w.keys, end - from), kSquare), stride = w.keys + kSquare,
                    plane = kSquare * stride;
      for (int64_t x = 0; x < kSquare; ++x) {
        uint16_t* const weights = w.weights_left + x * stride;
        form_weights(x, begins(x), from, keys,
                     [&](int64_t j, Vec<T> e) { store_parts(weights + j, plane, p.parts, e); });
      }
      for (int64_t d = 0; d < p.dim_v; d += kSquare)
        multiply({w.weights_left, stride, plane}, tiles_of_terms(p.v_tiles, p.dim_v, p.parts, from / kSquare, d),
                 keys / kSquare, p.parts, sums + d, w.sums_stride, from > 0);
    }
  }

  void finish(int64_t x, Begun begun) const {
    const int64_t i = scores.first + r + x;
    p.begun[i] = begun;
    p.mass[i] = mass[x], p.squares[i] = squares[x];
    for (int64_t d = 0; d < p.dim_v; ++d) p.out[i * p.dim_v + d] = sums[x * w.sums_stride + d];
  }

 private:
  // Calls write(j, weights) for the keys from + j, j < keys, and adds the weights up.
  template <class F>
  void form_weights(int64_t x, bool present, int64_t from, int64_t keys, const F& write) {
    const T *const s = scores.row(r + x) + from, *const sizes = p.sizes + from;
    const T* const stored = scores.e == nullptr ? nullptr : scores.exponentials_of(r + x) + from;
    const int64_t i = scores.first + r + x;
    const T shift = present ? p.shift[i] : T(0), factor = present ? p.factor[i] : T(1);
    Vec<T> sum = {}, sum_of_squares = {};
    for (int64_t block = 0; block < keys; block += kBlock) {
      const uint64_t word = present ? bits(x, (from + block) / kBlock) : 0;
      const int64_t to = smaller(keys, block + kBlock);
#pragma GCC unroll 4
      for (int64_t j = block; j < to; j += kLanes<T>) {
        const Vec<T> all = stored == nullptr ? exponential(load(s + j) - shift) : load(stored + j);
        const Vec<T> e = choose(word >> (j - block), all * factor, Vec<T>{});
        write(j, e);
        sum += e;
        const Vec<T> sized = e * load(sizes + j);
        sum_of_squares += sized * sized;
      }
    }
    mass[x] += sum_of<T>(sum);
    squares[x] += sum_of<T>(sum_of_squares);
  }
};

// Whether kRows rows with so many adaptive neighbours begin with the sum over all of these. Of the neighbours of a row
// reciprocity removes about as large a share as it has no neighbours; lists of what it removes take about four times as
// long a pair as products of whole rows. So without reciprocity an eighth of all keys pays for the one product that is
// left.
template <class T>
bool sums_neighbours(const Problem<T>& p, int64_t neighbours) {
  return p.begun != nullptr &&
         (p.reciprocal ? 16 * neighbours >= 15 * kRows * p.n_k : 8 * times_faster(p) * neighbours >= kRows * p.n_k);
}

// And whether with the sum over their survivors among n_k keys: fewer are better shared by rows. They are looked for
// where three eighths of all keys are neighbours.
constexpr bool sums_survivors(int64_t survivors, int64_t n_k) { return 4 * survivors >= kRows * n_k; }

// Finds the survivors of rows that were put off among the keys of settled blocks: m [kBlock][blocks_k] of their block.
// Where they are few, nothing is put off any more; returns whether some is.
template <class T>
bool find_settled(const Problem<T>& p, int64_t first, int64_t rows, uint64_t* m) {
  const int64_t block = first / kBlock, settled = settled_blocks(block, p.blocks_q);
  bool formed = false, any = false;
  for (int64_t r = 0; r < rows; r += kRows) {
    Begun* const begun = p.begun + first + r;
    if (*begun != Begun::put_off) continue;
    if (!formed) non_local(p, block, settled, m);  // of rows whose scores are to come it is nothing that is read
    formed = true;
    const int64_t some = smaller(kRows, rows - r);
    int64_t count = 0;
    for (int64_t x = 0; x < some; ++x) {
      const int64_t i = first + r + x;
      uint64_t* const words = m + i % kBlock * p.blocks_k;
      if (p.positions > 0) add_local_of_row(p, i, false, words);
      count += count_bits(words, settled);
    }
    const bool many = sums_survivors(count, settled * kBlock);
    for (int64_t x = 0; !many && x < some; ++x) begun[x] = Begun::nothing;
    any |= many;
  }
  return any;
}

// Begins with the sums over these survivors. Where they have less than 2^-10 of the weight of some row, or NaN, the rows
// are left: so far below the shift, weights lose digits.
template <class T>
void sum_settled(const Scores<T>& scores) {
  const Problem<T>& p = scores.p;
  const int64_t settled = settled_blocks(scores.first / kBlock, p.blocks_q);
  for (int64_t r = 0; r < scores.rows; r += kRows) {
    Begun* const begun = p.begun + scores.first + r;
    if (*begun != Begun::put_off) continue;
    const uint64_t* const m = scores.w.m + (scores.first + r) % kBlock * p.blocks_k;
    Beginning<T> beginning{scores, r, {m, p.blocks_k, 1}, settled * kBlock};
    beginning.form();
    const int64_t rows = smaller(kRows, scores.rows - r);
    bool near = true;
    for (int64_t x = 0; x < rows; ++x)
      near &= beginning.mass[x] >= 0x1p-10 || count_bits(m + x * p.blocks_k, settled) == 0;
    for (int64_t x = 0; x < rows; ++x)
      if (near)
        beginning.finish(x, Begun::survivors);
      else
        begun[x] = Begun::nothing;
  }
}

// The local block of the rows: log-mean-exp of their windows, and the flags; a row a lane.
template <class T>
void find_local(const Scores<T>& scores) {
  const Problem<T>& p = scores.p;
  constexpr int64_t kAtATime = kLanes<T>, kPart = 64;
  const int64_t positions = p.positions;
  T* const window = scores.w.window;  // [positions][rows], -inf where there is no key
  for (int64_t first = 0; first < scores.rows; first += kAtATime) {
    const int64_t rows = smaller(kAtATime, scores.rows - first), row = scores.first + first;
    Vec<T> beta = splat(T(1)), count = {};
    for (int64_t x = 0; x < positions * kAtATime; x += kLanes<T>) store(window + x, splat(T(-kInfinity)));
    for (int64_t r = 0; r < rows; ++r) {
      const T* const s = scores.row(first + r);
      T keys = 0;
      beta[r] = p.beta[row + r];
      if (!real(p.real_q, row + r)) continue;
      for_window(p, row + r, [&](int64_t j, int64_t o) {
        if (real(p.real_k, j)) window[o * kAtATime + r] = s[j], ++keys;
      });
      count[r] = keys;
    }
    Vec<T> largest = splat(T(-kInfinity)), sum = {};
    for (int64_t o = 0; o < positions; ++o) largest = maximum(largest, load(window + o * kAtATime));
    const Vec<T> shift = select<T>(largest == splat(T(-kInfinity)), Vec<T>{}, largest);
    for (int64_t begin = 0; begin < positions; begin += kPart) {
      Vec<T> part = {};
      for (int64_t o = begin; o < smaller(positions, begin + kPart); ++o) {
        const Vec<T> s = load(window + o * kAtATime);
        part += select<T>(s == splat(T(-kInfinity)), Vec<T>{}, exponential(s - shift));
      }
      sum += part;
    }
    const Vec<T> log_mean = largest + logarithm(sum / count), log_beta = logarithm(beta);
    for (int64_t r = 0; r < rows; ++r) p.log_mean[row + r] = count[r] > 0 ? log_mean[r] : T(-kInfinity);
    for (int64_t o = 0; o < positions; ++o) {
      const uint64_t kept = greater(load(window + o * kAtATime) - log_mean, log_beta);
      for (int64_t r = 0; r < rows; ++r) p.local[(row + r) * positions + o] = kept >> r & 1;
    }
  }
}

// Adds extra tokens to the neighbours of row i, or everybody, if it is one; returns how many are new.
template <class T>
int64_t add_extra(const Problem<T>& p, int64_t i, uint64_t* bits) {
  int64_t count = 0;
  for (int64_t j = 0; j < (i < p.extra ? p.blocks_k : (p.extra + kBlock - 1) / kBlock); ++j) {
    const uint64_t kept = (i < p.extra ? ~uint64_t{0} : lowest_bits(p.extra - j * kBlock)) & real_keys(p, j);
    count += __builtin_popcountll(kept & ~bits[j * kBlock]);
    bits[j * kBlock] |= kept;
  }
  return count;
}

// The statistics of the rows, and who their adaptive neighbours are; `neighbours` are how many each kRows rows have.
template <class T>
void find_neighbours(const Scores<T>& scores, int64_t* neighbours) {
  const Problem<T>& p = scores.p;
  const Column<T> lse = scores.lse(), log_alpha = log_multipliers(p, scores.first, scores.rows);
  for (int64_t r = 0; r < scores.rows; r += kRows) neighbours[r / kRows] = 0;
  for (int64_t r = 0; r < scores.rows; ++r) {
    const int64_t i = scores.first + r;
    const T* const s = scores.row(r);
    const bool present = real(p.real_q, i);
    p.lse[i] = present ? lse[r] : T(-kInfinity);
    if (p.topk) p.kappa[i] = kth_largest(s, p.n_k, p.topk, scores.w.work);
    if (!p.thresholded) continue;
    const Vec<T> shift = splat(p.lse[i]), least = splat(present ? log_alpha[r] : T(kInfinity));
    const Vec<T> kappa = splat(p.topk ? p.kappa[i] : T(-kInfinity));
    uint64_t* const bits = p.words(i / kBlock, 0) + i % kBlock;
    int64_t count = 0;
    const auto find = [&](const auto& is_neighbour) {
      for (int64_t j = 0; j < p.blocks_k; ++j) {
        uint64_t word = 0;
#pragma GCC unroll 8
        for (int64_t c = 0; c < kBlock; c += kLanes<T>) word |= is_neighbour(load(s + j * kBlock + c)) << c;
        bits[j * kBlock] = word;
        count += __builtin_popcountll(word);
      }
    };
    if (p.topk)
      find([&](Vec<T> y) { return greater(y - shift, least) & at_least(y, kappa); });
    else
      find([&](Vec<T> y) { return greater(y - shift, least); });
    if (p.extra > 0 && present) count += add_extra(p, i, bits);
    neighbours[r / kRows] += count;
  }
}

// The bits of queries that there are not.
template <class T>
void clear_bits(const Problem<T>& p, int64_t block) {
  for (int64_t j = 0; p.thresholded && j < p.blocks_k; ++j)
    for (int64_t r = smaller(kBlock, p.n_q - block * kBlock); r < kBlock; ++r) p.words(block, j)[r] = 0;
}

// Calls f(scores), yet to be formed, for some rows after the other. It says whether exponentials of the next rows are
// likely to be read again.
template <class T, class F>
void for_strips(const Problem<T>& p, Queue& queue, void* scratch, const F& f) {
  Arena arena(scratch);
  const ScanScratch<T> w(arena, p);
  const TilesOf<T> tiles(p);
  bool stores = false;
  for (int64_t block; queue.take(block);) {
    const int64_t rows = smaller(kBlock, p.n_q - block * kBlock);
    for (int64_t from = 0; from < rows; from += w.at_a_time) {
      Scores<T> scores{p, w, block * kBlock + from, smaller(w.at_a_time, rows - from), stores};
      stores = f(scores);
    }
  }
}

template <class T>
void scan_again(const Problem<T>& p, Queue& queue, void* scratch) {
  for_strips(p, queue, scratch, [&](Scores<T>& scores) {
    const int64_t settled = settled_blocks(scores.first / kBlock, p.blocks_q) * kBlock;
    if (p.keeps_scores) {
      scores.form_again(p.n_k);
    } else if (find_settled(p, scores.first, scores.rows, scores.w.m)) {
      scores.form_again(settled);
      sum_settled(scores);
    }
    return false;
  });
}

// Whether all settled blocks of a block have been scanned.
template <class T>
bool are_complete(const Problem<T>& p, int64_t block) {
  bool all = p.complete != nullptr;
  for (int64_t j = 0; all && j < settled_blocks(block, p.blocks_q); ++j)
    all = __atomic_load_n(p.complete + j, __ATOMIC_ACQUIRE);
  return all;
}

template <class T>
void scan(const Problem<T>& p, Queue& queue, void* scratch) {
  for_strips(p, queue, scratch, [&](Scores<T>& scores) {
    const int64_t block = scores.first / kBlock;
    int64_t neighbours[kBlock / kRows];
    scores.form();
    find_neighbours(scores, neighbours);
    if (p.beta != nullptr) find_local(scores);
    if (scores.first % kBlock == 0) clear_bits(p, block);
    if (p.complete != nullptr && smaller(p.n_q, (block + 1) * kBlock) == scores.first + scores.rows)
      __atomic_store_n(p.complete + block, uint8_t{1}, __ATOMIC_RELEASE);
    for (int64_t r = 0; p.begun != nullptr && r < scores.rows; ++r)
      p.shift[scores.first + r] = scores.shift[r], p.factor[scores.first + r] = scores.factor(r);
    const auto begins = [&](int64_t r) { return r < scores.rows && sums_neighbours(p, neighbours[r / kRows]); };
    const auto beginning = [&](int64_t r) {
      const int64_t i = scores.first + r;
      return Beginning<T>{scores, r, {p.words(i / kBlock, 0) + i % kBlock, 1, kBlock}, p.n_k};
    };
    if constexpr (kHasTiles<T>)
      for (int64_t r = 0; on_tiles(p) && r < scores.rows; r += kSquare) {
        bool any = false;
        for (int64_t x = r; x < r + kSquare; x += kRows) any |= begins(x);
        if (!any) continue;
        Beginning<T> b = beginning(r);
        b.form_on_tiles([&](int64_t x) { return begins(r + x); });
        for (int64_t x = 0; x < kSquare; ++x)
          if (begins(r + x)) b.finish(x, Begun::neighbours);
      }
    bool any_put_off = false, any_begun = false;
    for (int64_t r = 0; !on_tiles(p) && r < scores.rows; r += kRows) {
      const int64_t rows = smaller(kRows, scores.rows - r);
      if (begins(r)) {
        Beginning<T> b = beginning(r);
        any_begun = true;
        b.form();
        for (int64_t x = 0; x < rows; ++x) b.finish(x, Begun::neighbours);
      } else if (may_sum_survivors(p, block) && 8 * neighbours[r / kRows] >= 3 * kRows * p.n_k) {
        any_put_off = true;
        for (int64_t x = 0; x < rows; ++x) p.begun[scores.first + r + x] = Begun::put_off;
      }
    }
    if (any_put_off && are_complete(p, block) && find_settled(p, scores.first, scores.rows, scores.w.m))
      sum_settled(scores);
    return any_begun;
  });
}
