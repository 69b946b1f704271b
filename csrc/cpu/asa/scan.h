// Scores of some rows against all keys, while they are in the cache: lse, thresholds, neighbour bits.

constexpr int64_t kScoreBytes = 512 * 1024;  // of the scores formed at a time, but at least kFewest rows
constexpr double kMostSum = 1e10;  // of exp(s - shift): further from their shift scores would lose digits
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

// Some rows whose scores are in the cache.
template <class T>
struct ScanScratch {
  int64_t width, panels, stride, at_a_time, keys, sums_stride;
  T *q, *s, *work, *window, *weights, *sums;
  T* e;  // exp(s - shift), as s, where keys are one block; else null
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
    e = p.is_one_block() ? arena.take<T>(at_a_time * stride) : nullptr;
    work = arena.take<T>(p.topk ? p.n_k : 0);
    window = arena.take<T>(p.positions * kLanes<T>);
    weights = arena.take<T>(p.thresholded && !tiles ? kRows * keys : 0);
    weights_left = arena.take<uint16_t>(p.thresholded && tiles ? kSquare * (keys + kSquare) * p.parts : 0);
    sums = arena.take<T>(p.thresholded ? at_a_time * sums_stride : 0);
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
  T* const s = p.keeps_scores ? p.scores + (first - p.begin) * w.stride : w.s;
  T shift[kBlock] = {};
  double sum[kBlock] = {};

  T* row(int64_t r) const { return s + r * w.stride; }
  T* exponentials_of(int64_t r) const { return w.e + r * w.stride; }

  void form() {
    if (!on_tiles(p)) scale_rows(p.q + first * p.dim, rows, p.dim, p.scale, w.q);
    if constexpr (kHasTiles<T>)
      for (int64_t r = 0; on_tiles(p) && r < rows; r += kSquare)
        pack_left<T>(
            smaller(kSquare, rows - r), [&](int64_t x) { return p.q + (first + r + x) * p.dim; }, p.dim, p.parts,
            w.q_left + r * w.q_row(p));
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
    T *const s = row(r), *const exponentials = w.e == nullptr ? nullptr : exponentials_of(r);
    if (to > p.n_k || p.real_k != nullptr) hide(s, from, to);
    if (from == 0) shift[r] = largest_score(s, w.width);
    const Vec<T> largest = splat(shift[r]);
    const int64_t end = smaller(to, rounded_up(p.n_k, kLanes<T>));
    Vec<T> total = {};
#pragma GCC unroll 4
    for (int64_t j = from; j < end; j += kLanes<T>) {
      const Vec<T> e = exponential(load(s + j) - largest);
      if (exponentials != nullptr) store(exponentials + j, e);
      total += e;
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
        const Vec<T> e = none ? select<T>(y == y, Vec<T>{}, y) : exponential(y - shift[r]);
        if (w.e != nullptr) store(exponentials_of(r) + j + c, e);
        part += e;
      }
      sum[r] += sum_of<T>(part);
    }
  }
};

// The one-way output of some of the rows, with many keys as adaptive neighbours: the weights of these, times v.
// aggregate() corrects it for what reciprocity removes and the local block adds. Without AMX they are kRows, with it some
// of kSquare.
template <class T>
struct Beginning {
  const Scores<T>& scores;
  int64_t r;
  const Problem<T>& p = scores.p;
  const ScanScratch<T>& w = scores.w;
  T* const sums = w.sums + r * w.sums_stride;
  double mass[kSquare] = {}, squares[kSquare] = {};

  void form() {
    for (int64_t x = 0; x < kRows * p.dim_v; ++x) sums[x] = 0;
    for (int64_t from = 0; from < p.n_k; from += w.keys) {
      const int64_t keys = smaller(w.keys, p.n_k - from);
      for (int64_t x = 0; x < kRows; ++x) {
        T* const weights = w.weights + x * w.keys;
        form_weights(x, r + x < scores.rows, from, keys, [&](int64_t j, Vec<T> e) { store(weights + j, e); });
      }
      add_product<Left::by_row>(w.weights, w.keys, Sliced<T>{p.v_slices, p.n_k, from}, keys, p.dim_v, sums);
    }
    for (int64_t x = 0; x < smaller(kRows, scores.rows - r); ++x) finish(x);
  }

  // On AMX, for the rows x of kSquare for which begins(x) holds; the weights of others are 0.
  template <class F>
  void form_on_tiles(const F& begins) {
    for (int64_t from = 0; from < p.n_k; from += w.keys) {
      const int64_t keys = rounded_up(smaller(w.keys, p.n_k - from), kSquare), stride = w.keys + kSquare,
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
    for (int64_t x = 0; x < kSquare; ++x)
      if (begins(x)) finish(x);
  }

 private:
  // Calls write(j, weights) for the keys from + j, j < keys, and adds the weights up.
  template <class F>
  void form_weights(int64_t x, bool present, int64_t from, int64_t keys, const F& write) {
    const int64_t i = scores.first + r + x;
    const uint64_t* const bits = p.words(i / kBlock, from / kBlock) + i % kBlock;
    const T *const s = scores.row(r + x) + from, *const sizes = p.sizes + from;
    const T shift = present ? scores.shift[r + x] : T(0), factor = present ? scores.factor(r + x) : T(1);
    Vec<T> sum = {}, sum_of_squares = {};
    for (int64_t block = 0; block < keys; block += kBlock) {
      const uint64_t word = present ? bits[block] : 0;
      const int64_t end = smaller(keys, block + kBlock);
#pragma GCC unroll 4
      for (int64_t j = block; j < end; j += kLanes<T>) {
        const Vec<T> e = choose(word >> (j - block), exponential(load(s + j) - shift) * factor, Vec<T>{});
        write(j, e);
        sum += e;
        const Vec<T> sized = e * load(sizes + j);
        sum_of_squares += sized * sized;
      }
    }
    mass[x] += sum_of<T>(sum);
    squares[x] += sum_of<T>(sum_of_squares);
  }

  void finish(int64_t x) {
    const int64_t i = scores.first + r + x;
    p.begun[i] = true;
    p.shift[i] = scores.shift[r + x], p.factor[i] = scores.factor(r + x);
    p.mass[i] = mass[x], p.squares[i] = squares[x];
    for (int64_t d = 0; d < p.dim_v; ++d) p.out[i * p.dim_v + d] = sums[x * w.sums_stride + d];
  }
};

// Which share of its keys kRows rows must have as adaptive neighbours for a beginning to pay. Products with lists take
// about four times as long a pair as products of whole rows: without reciprocity, both of an eighth of all keys as long as
// one of all. Of the neighbours of a row reciprocity removes about as large a share as it has no neighbours.
template <class T>
bool begins_output(const Problem<T>& p, int64_t neighbours) {
  return p.begun != nullptr &&
         (p.reciprocal ? 10 * neighbours >= 9 * kRows * p.n_k : 8 * times_faster(p) * neighbours >= kRows * p.n_k);
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
    for (int64_t j = 0; j < p.blocks_k; ++j) {
      uint64_t word = 0;
#pragma GCC unroll 4
      for (int64_t c = 0; c < kBlock; c += kLanes<T>) {
        const Vec<T> y = load(s + j * kBlock + c);
        word |= (greater(y - shift, least) & at_least(y, kappa)) << c;
      }
      bits[j * kBlock] = word;
      count += __builtin_popcountll(word);
    }
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

// Forms the scores of some rows after the other and calls f(scores).
template <class T, class F>
void for_scores(const Problem<T>& p, Queue& queue, void* scratch, const F& f) {
  Arena arena(scratch);
  const ScanScratch<T> w(arena, p);
  const TilesOf<T> tiles(p);
  for (int64_t block; queue.take(block);) {
    const int64_t rows = smaller(kBlock, p.n_q - block * kBlock);
    for (int64_t from = 0; from < rows; from += w.at_a_time) {
      Scores<T> scores{p, w, block * kBlock + from, smaller(w.at_a_time, rows - from)};
      scores.form();
      f(scores);
    }
  }
}

template <class T>
void form_scores(const Problem<T>& p, Queue& queue, void* scratch) {
  for_scores(p, queue, scratch, [](const Scores<T>&) {});
}

template <class T>
void scan(const Problem<T>& p, Queue& queue, void* scratch) {
  for_scores(p, queue, scratch, [&](const Scores<T>& scores) {
    int64_t neighbours[kBlock / kRows];
    find_neighbours(scores, neighbours);
    if (p.beta != nullptr) find_local(scores);
    const auto begins = [&](int64_t r) { return r < scores.rows && begins_output(p, neighbours[r / kRows]); };
    if constexpr (kHasTiles<T>)
      for (int64_t r = 0; on_tiles(p) && r < scores.rows; r += kSquare) {
        bool any = false;
        for (int64_t x = r; x < r + kSquare; x += kRows) any |= begins(x);
        if (any) Beginning<T>{scores, r}.form_on_tiles([&](int64_t x) { return begins(r + x); });
      }
    for (int64_t r = 0; !on_tiles(p) && r < scores.rows; r += kRows)
      if (begins(r)) Beginning<T>{scores, r}.form();
    if (scores.first % kBlock == 0) clear_bits(p, scores.first / kBlock);
  });
}
