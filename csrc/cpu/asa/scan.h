// Scores of some rows against all keys, while they are in the cache: lse, thresholds, neighbour bits.

constexpr int64_t kScoreBytes = 1024 * 1024;  // of the scores formed at a time, but at least kFewest rows
constexpr int64_t kFewest = 32;  // rows that share one reading of the keys

// log(alpha_i / n): j is an adaptive neighbour if s_ij - lse_i exceeds it. The difference comes first: the logarithm
// would be lost if it were added to a large score.
template <class T>
T log_multiplier(const Problem<T>& p, int64_t i) {
  if (p.alpha == nullptr) return -kInfinity;
  return __builtin_log(static_cast<double>(p.alpha[i])) - p.log_n_real;
}

// s[0 .. count) to exp(s - largest), and their sum; s reaches to a multiple of kPad.
template <class T>
T exponentials(T* s, int64_t count, T& largest) {
  for (int64_t c = count; c < rounded_up(count, kPad); ++c) s[c] = -kInfinity;
  Vec<T> m = splat(T(-kInfinity));
  for (int64_t c = 0; c < count; c += kLanes<T>) m = maximum(m, load(s + c));
  largest = largest_of<T>(m);
  Vec<T> sum = {};
  for (int64_t c = 0; c < count; c += kLanes<T>) {
    const Vec<T> e = exponential(load(s + c) - splat(largest));
    store(s + c, e);
    sum += e;
  }
  return sum_of<T>(sum);
}

// The local block of row i from its scores: log-mean-exp of its window and the flags. `window` has room for its scores.
template <class T>
void scan_window(const Problem<T>& p, int64_t i, const T* s, T* window) {
  int64_t count = 0;
  for_window(p, i, [&](int64_t j, int64_t) {
    if (real(p.real_k, j)) window[count++] = s[j];
  });
  bool* flags = p.local + i * p.window * p.window;
  for (int64_t o = 0; o < p.window * p.window; ++o) flags[o] = false;
  p.log_mean[i] = -kInfinity;
  if (!real(p.real_q, i) || count == 0) return;
  T largest;
  const T sum = exponentials(window, count, largest);
  p.log_mean[i] = largest + __builtin_log(static_cast<double>(sum) / count);
  const T log_beta = __builtin_log(static_cast<double>(p.beta[i]));
  for_window(p, i, [&](int64_t j, int64_t o) { flags[o] = real(p.real_k, j) && s[j] - p.log_mean[i] > log_beta; });
}

// A sum of exp(s) that grows stretch by stretch: sum * exp(shift). The shift is the largest score of the first stretch,
// and moves only if a later one threatens to overflow, so that most scores are read once.
template <class T>
struct RunningSum {
  T shift = -kInfinity, sum = 0;

  // Adds `count` scores, a multiple of a vector's length. Scores of -inf add nothing.
  void add(const T* s, int64_t count) {
    constexpr T kMargin = 60;
    if (shift == T(-kInfinity)) shift = largest(s, count);
    if (shift == T(-kInfinity)) {
      for (int64_t j = 0; j < count; ++j)
        if (s[j] != s[j]) sum = s[j];  // the largest of NaN and -inf is -inf
      return;
    }
    T most;
    T part = exponentials(s, count, most);
    if (most > shift + kMargin) {
      sum *= exponential(splat(T(shift - most)))[0];
      shift = most;
      part = exponentials(s, count, most);
    }
    sum += part;
  }

 private:
  static T largest(const T* s, int64_t count) {
    Vec<T> most = splat(T(-kInfinity));
    for (int64_t j = 0; j < count; j += kLanes<T>) most = maximum(most, load(s + j));
    return largest_of<T>(most);
  }

  T exponentials(const T* s, int64_t count, T& most) const {
    Vec<T> sums[2] = {}, largest[2] = {splat(T(-kInfinity)), splat(T(-kInfinity))};
    const auto take = [&](int i, Vec<T> x) {
      largest[i] = maximum(largest[i], x);
      sums[i] += exponential(x - shift);
    };
    int64_t j = 0;
    for (; j + 2 * kLanes<T> <= count; j += 2 * kLanes<T>) take(0, load(s + j)), take(1, load(s + j + kLanes<T>));
    if (j < count) take(0, load(s + j));
    most = largest_of<T>(maximum(largest[0], largest[1]));
    return sum_of<T>(sums[0] + sums[1]);
  }
};

template <class T>
struct ScanScratch {
  int64_t panels, stride, at_a_time;
  T *q, *s, *work, *window;

  ScanScratch(Arena& arena, const Problem<T>& p)
      : panels(panels_of<T>(p.n_k)), stride(rounded_up(panels * kPanel<T>, kBlock) + kPad) {
    const int64_t fitting = kScoreBytes / (stride * static_cast<int64_t>(sizeof(T))) / kRows * kRows;
    at_a_time = smaller(kBlock, larger(kFewest, fitting));
    q = arena.take<T>(at_a_time * p.dim);
    s = arena.take<T>(at_a_time * stride);
    work = arena.take<T>(p.topk ? p.n_k : 0);
    window = arena.take<T>(rounded_up(p.window * p.window, kPad));
  }
};

template <class T>
int64_t scan_bytes(const Problem<T>& p) {
  return bytes_of<ScanScratch>(p);
}

template <class T>
void scan(const Problem<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const ScanScratch<T> w(arena, p);
  const int64_t panels = w.panels, stride = w.stride;
  T *const q = w.q, *const s = w.s;
  const int64_t stretch = larger(1, cached_rows<T>(2 * p.dim) / kPanel<T>);  // panels

  const auto some_rows = [&](int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; r += kRows)
      pack(p.q + (first + r) * p.dim, smaller(kRows, rows - r), kRows, p.dim, q + r * p.dim, p.scale);
    RunningSum<T> total[kBlock];
    for (int64_t begin = 0; begin < panels; begin += stretch) {
      const int64_t end = smaller(panels, begin + stretch), from = begin * kPanel<T>, to = end * kPanel<T>;
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < rows; r += kRows)
          scores(q + r * p.dim, p.k_panels + i * panel_size<T>(p.dim), p.n_k - i * kPanel<T>, p.dim,
                 s + r * stride + i * kPanel<T>, stride);
      for (int64_t r = 0; r < rows; ++r) {
        T* const x = s + r * stride;
        if (p.real_k != nullptr)
          for (int64_t j = from; j < smaller(to, p.n_k); ++j)
            if (!p.real_k[j]) x[j] = -kInfinity;
        for (int64_t j = larger(from, p.n_k); j < to; ++j) x[j] = -kInfinity;
        total[r].add(x + from, smaller(to, rounded_up(p.n_k, kLanes<T>)) - from);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      T* const x = s + r * stride;
      for (int64_t j = panels * kPanel<T>; j < p.blocks_k * kBlock; ++j) x[j] = -kInfinity;
      const T lse = total[r].shift + __builtin_log(static_cast<double>(total[r].sum));
      const bool is_real = real(p.real_q, i);
      p.lse[i] = is_real ? lse : T(-kInfinity);
      if (p.topk) p.kappa[i] = kth_largest(x, p.n_k, p.topk, w.work);
      if (p.beta != nullptr) scan_window(p, i, x, w.window);
      if (!p.thresholded) continue;
      const Vec<T> shift = splat(lse), log_alpha = splat(is_real ? log_multiplier(p, i) : T(kInfinity));
      const Vec<T> kappa = splat(p.topk ? p.kappa[i] : T(-kInfinity));
      uint64_t* const bits = p.bits + i / kBlock * p.blocks_k * kBlock + i % kBlock;
      for (int64_t j = 0; j < p.blocks_k; ++j) {
        uint64_t word = 0;
#pragma GCC unroll 4
        for (int64_t c = 0; c < kBlock; c += kLanes<T>) {
          const Vec<T> y = load(x + j * kBlock + c);
          word |= (greater(y - shift, log_alpha) & at_least(y, kappa)) << c;
        }
        bits[j * kBlock] = word;
      }
    }
  };

  for (int64_t block; queue.take(block);) {
    const int64_t first = block * kBlock, rows = smaller(kBlock, p.n_q - first);
    for (int64_t r = 0; r < rows; r += w.at_a_time) some_rows(first + r, smaller(w.at_a_time, rows - r));
    if (p.thresholded)
      for (int64_t j = 0; j < p.blocks_k; ++j)
        for (int64_t r = rows; r < kBlock; ++r) p.bits[(block * p.blocks_k + j) * kBlock + r] = 0;
  }
}
