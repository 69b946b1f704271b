// Products with a list of rows, where few pairs survive. Rows are read where they lie; their length, the head
// dim, is padded (Kernels::pad).

template <class T>
ASA_INLINE void four_dots(const T* x, const T* rows, int64_t dim, const int32_t* list, T* s) {
  const T *const a = rows + list[0] * dim, *const b = rows + list[1] * dim;
  const T *const c = rows + list[2] * dim, *const e = rows + list[3] * dim;
  Vec<T> sum[4] = {};
  for (int64_t d = 0; d < dim; d += kLanes<T>) {
    const Vec<T> z = load(x + d);
    sum[0] += z * load(a + d);
    sum[1] += z * load(b + d);
    sum[2] += z * load(c + d);
    sum[3] += z * load(e + d);
  }
  sums_of_four(sum, s);
}

// s[c] = <x, rows[list[c]]> for c < count; writes s up to a multiple of four.
template <class T>
static void dots(const T* x, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* s) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) four_dots(x, rows, dim, list + c, s + c);
  if (c == count) return;
  int32_t padded[4];
  for (int64_t i = 0; i < 4; ++i) padded[i] = list[c + i < count ? c + i : c];
  four_dots(x, rows, dim, padded, s + c);
}

// A few sums at a time would wait for the latency of additions; then every other row goes to a second set of sums.
template <int kWide, class T>
ASA_INLINE void add_rows(const T* weights, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* sums) {
  constexpr int kSets = kWide < 8 ? 2 : 1;
  Vec<T> sum[kSets][kWide] = {};
  int64_t c = 0;
  for (; c + kSets <= count; c += kSets)
#pragma GCC unroll 2
    for (int i = 0; i < kSets; ++i) {
      const T* const y = rows + list[c + i] * dim;
#pragma GCC unroll 16
      for (int d = 0; d < kWide; ++d) sum[i][d] += weights[c + i] * load(y + d * kLanes<T>);
    }
  if (c < count)
#pragma GCC unroll 16
    for (int d = 0; d < kWide; ++d) sum[0][d] += weights[c] * load(rows + list[c] * dim + d * kLanes<T>);
#pragma GCC unroll 16
  for (int d = 0; d < kWide; ++d) {
    T* const p = sums + d * kLanes<T>;
    store(p, load(p) + (kSets == 1 ? sum[0][d] : sum[0][d] + sum[kSets - 1][d]));
  }
}

// sums[d] += sum over c < count of weights[c] * rows[list[c]][d].
template <class T>
static void accumulate(const T* weights, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* sums) {
  constexpr int64_t kPartial = 256;
  for (int64_t first = 0; first < count; first += kPartial) {
    const int64_t size = count - first < kPartial ? count - first : kPartial;
    const T* const w = weights + first;
    const int32_t* const part = list + first;
    int64_t d = 0;
    const auto fits = [&](int64_t vectors) { return d + vectors * kLanes<T> <= dim; };
    if constexpr (kRegisters == 32)
      for (; fits(16); d += 16 * kLanes<T>) add_rows<16>(w, rows + d, dim, part, size, sums + d);
    for (; fits(8); d += 8 * kLanes<T>) add_rows<8>(w, rows + d, dim, part, size, sums + d);
    for (; fits(4); d += 4 * kLanes<T>) add_rows<4>(w, rows + d, dim, part, size, sums + d);
    for (; fits(2); d += 2 * kLanes<T>) add_rows<2>(w, rows + d, dim, part, size, sums + d);
    for (; fits(1); d += kLanes<T>) add_rows<1>(w, rows + d, dim, part, size, sums + d);
  }
}

// The same for kRows rows that share a list; numbers of pairs lie by columns of the list, [count][kRows].

// s[c][r] = <x[r], rows[list[c]]> for c < count, x [kRows][dim]; writes s up to a multiple of kColumns.
constexpr int64_t kColumns = 3;

template <class T>
static void some_shared_dots(const T* x, const T* rows, int64_t dim, const int32_t* list, T* s) {
  const T* y[kColumns];
  for (int c = 0; c < kColumns; ++c) y[c] = rows + list[c] * dim;
  Vec<T> sum[kColumns][kRows] = {};
  for (int64_t d = 0; d < dim; d += kLanes<T>) {
    Vec<T> z[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) z[c] = load(y[c] + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r % 2 == 0) load_no_further();
      const Vec<T> u = load(x + r * dim + d);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[c][r] += u * z[c];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r += 4) sums_of_four(sum[c] + r, s + c * kRows + r);
}

template <class T>
static void shared_dots(const T* x, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* s) {
  int64_t c = 0;
  for (; c + kColumns <= count; c += kColumns) some_shared_dots(x, rows, dim, list + c, s + c * kRows);
  if (c == count) return;
  int32_t padded[kColumns];
  for (int64_t i = 0; i < kColumns; ++i) padded[i] = list[c + i < count ? c + i : c];
  some_shared_dots(x, rows, dim, padded, s + c * kRows);
}

// rows[list[c]][d] += sum over r of weights[c][r] * x[r][d], for c < count and r < kSharing, x [kSharing][dim].
template <int64_t kSharing, int kWide, class T>
ASA_INLINE void scatter_some(const T* weights, const T* x, int64_t dim, const int32_t* list, int64_t count, T* rows) {
  Vec<T> u[kSharing][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < kSharing; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i) u[r][i] = load(x + r * dim + i * kLanes<T>);
  for (int64_t c = 0; c < count; ++c) {
    T* const y = rows + list[c] * dim;
    Vec<T> sum[kWide] = {};
#pragma GCC unroll 8
    for (int r = 0; r < kSharing; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kWide; ++i) sum[i] += weights[c * kSharing + r] * u[r][i];
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i) store(y + i * kLanes<T>, load(y + i * kLanes<T>) + sum[i]);
  }
}

template <int64_t kSharing, class T>
static void scatter(const T* weights, const T* x, int64_t dim, const int32_t* list, int64_t count, T* rows) {
  constexpr int kWide = kSharing == 1 ? 8 : 2;  // as many as registers hold
  int64_t d = 0;
  for (; d + kWide * kLanes<T> <= dim; d += kWide * kLanes<T>)
    scatter_some<kSharing, kWide>(weights, x + d, dim, list, count, rows + d);
  if constexpr (kSharing == 1)
    for (; d + 4 * kLanes<T> <= dim; d += 4 * kLanes<T>) scatter_some<1, 4>(weights, x + d, dim, list, count, rows + d);
  for (; d < dim; d += kLanes<T>) scatter_some<kSharing, 1>(weights, x + d, dim, list, count, rows + d);
}

// Ascending lists of row numbers, list[i] of count[i], read side by side: all lists pass one stretch of rows, which
// stays in the cache, before the next.
template <int64_t kSize>
struct Lists {
  const int32_t* list[kSize];
  int64_t count[kSize];

  // Calls f(i, from, to) for the part of list i in each stretch of rows [begin, end).
  template <class F>
  void by_stretches(int64_t begin, int64_t end, int64_t stretch, const F& f) const {
    int64_t next[kSize] = {};
    for (int64_t bound = begin + stretch; bound < end + stretch; bound += stretch)
      for (int64_t i = 0; i < kSize; ++i) {
        const int64_t from = next[i];
        next[i] = bound >= end ? count[i] : first_at_least(list[i], from, count[i], bound);
        if (next[i] > from) f(i, from, next[i]);
      }
  }

 private:
  static int64_t first_at_least(const int32_t* list, int64_t begin, int64_t end, int64_t bound) {
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (list[middle] < bound)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
};
