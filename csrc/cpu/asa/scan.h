// The first pass of the forward: lse, thresholds, neighbour bits, and what the output begins with.

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
