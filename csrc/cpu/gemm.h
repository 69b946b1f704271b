// Products of whole rows: the scores of scan(), and all products in rows where many pairs survive.

constexpr int64_t kVectors = 3;  // registers of a tile in a row
// Rows of a tile: all of it stays in registers, and 24 sums hide the latency of an addition.
constexpr int64_t kRows = kRegisters == 32 ? 8 : 4;
constexpr int64_t kDepth = 128;  // terms of a sum added one after the other; more are added in parts: they round less,
// and what they read of the right factor stays in the first-level cache

// Keys are packed for tile() by panels [D][kPanel], so that a row of a panel is one tile wide.
template <class T>
constexpr int64_t kPanel = kVectors * kLanes<T>;

template <class T>
constexpr int64_t panels_of(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T>;
}

template <class T>
constexpr int64_t panel_size(int64_t dim) {
  return kPanel<T> * dim;
}

// panel[d][kPanel] = x[row][d] for row < rows, 0 for the missing ones; the dim is whole vectors.
template <class T>
static void pack_panel(const T* x, int64_t rows, int64_t dim, T* panel) {
#if defined(ASA_AVX512) || defined(ASA_AVX2)
  constexpr int64_t kSide = kLanes<T>;
  for (int64_t first = 0; first < kPanel<T>; first += kSide)
    for (int64_t d = 0; d < dim; d += kSide) {
      Vec<T> y[kSide];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; ++r) y[r] = first + r < rows ? load(x + (first + r) * dim + d) : Vec<T>{};
      transpose(y);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; ++r) store(panel + (d + r) * kPanel<T> + first, y[r]);
    }
#else
  for (int64_t r = 0; r < kPanel<T>; ++r)
    for (int64_t d = 0; d < dim; ++d) panel[d * kPanel<T> + r] = r < rows ? x[r * dim + d] : T(0);
#endif
}

template <class T>
void pack_panels(const T* x, int64_t n, int64_t dim, T* panels, Queue& queue) {
  for (int64_t i; queue.take(i);) {
    const int64_t first = i * kPanel<T>, rows = n - first < kPanel<T> ? n - first : kPanel<T>;
    pack_panel(x + first * dim, rows, dim, panels + first * dim);
  }
}

// How many vectors of a row tile() takes at a time, where so many are left.
constexpr int64_t wide_of(int64_t remaining) {
  return remaining == 4 || remaining == 2 ? 2 : remaining == 1 ? 1 : kVectors;
}

// Rows that are right factors are packed by slices: of all rows the columns that tile() takes at a time lie in one piece,
// so that they come in time from the second-level cache. Columns from d on start at d * n.
template <class T>
void pack_slices(const T* x, int64_t n, int64_t dim, T* slices, Queue& queue) {
  for (int64_t i; queue.take(i);)
    for (int64_t row = i * kPanel<T>; row < smaller(n, (i + 1) * kPanel<T>); ++row)
      for (int64_t d = 0; d < dim;) {
        const int64_t width = wide_of((dim - d) / kLanes<T>) * kLanes<T>;
        T* const to = slices + d * n + row * width;
        for (int64_t c = 0; c < width; c += kLanes<T>) store(to + c, load(x + row * dim + d + c));
        d += width;
      }
}

// How the left factor of a product lies: a(row, term) = a[row * stride + term], or a[term * stride + row].
enum class Left { by_row, by_term };

// The right factor of a product: rows that lie one after the other, those of a list, or rows in slices, of which there
// are n, from one on.
template <class T>
struct Consecutive {
  const T* rows;
  int64_t stride;
  const T* operator()(int64_t t) const { return rows + t * stride; }
  template <int>
  Consecutive at(int64_t t, int64_t d) const {
    return {rows + t * stride + d, stride};
  }
};

template <class T>
struct Listed {
  const T* rows;
  int64_t stride;
  const int32_t* list;
  const T* operator()(int64_t t) const { return rows + list[t] * stride; }
  template <int>
  Listed at(int64_t t, int64_t d) const {
    return {rows + d, stride, list + t};
  }
};

template <class T>
struct Sliced {
  const T* slices;
  int64_t n, first;
  template <int kWide>
  Consecutive<T> at(int64_t t, int64_t d) const {
    constexpr int64_t kWidth = kWide * kLanes<T>;
    return {slices + d * n + (first + t) * kWidth, kWidth};
  }
};

// c[kRows][kWide vectors] = sum over terms of a(row, term) * b(term)[.], or adds it to c.
template <Left kLeft, int kWide, class T, class Right>
static void tile(const T* a, int64_t a_stride, Right b, int64_t terms, T* c, int64_t c_stride, bool add) {
  constexpr int64_t kStep = kLanes<T>;
  Vec<T> sum[kRows][kWide] = {};
  const T* row[kRows];
  for (int64_t r = 0; r < kRows; ++r) row[r] = kLeft == Left::by_row ? a + r * a_stride : a + r;
  for (int64_t t = 0; t < terms; ++t) {
    const T* const from = b(t);
    Vec<T> y[kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) y[i] = load(from + i * kStep);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r % 2 == 0) load_no_further();
      const T x = kLeft == Left::by_row ? row[r][t] : a[t * a_stride + r];
#pragma GCC unroll 4
      for (int i = 0; i < kWide; ++i) sum[r][i] += x * y[i];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) {
      T* const p = c + r * c_stride + i * kStep;
      store(p, add ? load(p) + sum[r][i] : sum[r][i]);
    }
}

// c[kRows][dim] += sum over terms of a(row, term) * b(term)[dim].
template <Left kLeft, class T, class Right>
static void add_product(const T* a, int64_t a_stride, Right b, int64_t terms, int64_t dim, T* c) {
  for (int64_t t = 0; t < terms; t += kDepth) {
    const T* const x = kLeft == Left::by_row ? a + t : a + t * a_stride;
    const int64_t depth = smaller(kDepth, terms - t);
    for (int64_t d = 0; d < dim;) {
      const int64_t wide = wide_of((dim - d) / kLanes<T>);
      if (wide == 1) tile<kLeft, 1>(x, a_stride, b.template at<1>(t, d), depth, c + d, dim, true);
      if (wide == 2) tile<kLeft, 2>(x, a_stride, b.template at<2>(t, d), depth, c + d, dim, true);
      if (wide == 3) tile<kLeft, 3>(x, a_stride, b.template at<3>(t, d), depth, c + d, dim, true);
      d += wide * kLanes<T>;
    }
  }
}

// y = factor * x, and of rows, as many as make a multiple of kRows: 0 beyond those there are.
template <class T>
ASA_INLINE void scale_row(const T* x, int64_t dim, T factor, T* y) {
  for (int64_t d = 0; d < dim; d += kLanes<T>) store(y + d, load(x + d) * factor);
}

template <class T>
static void scale_rows(const T* x, int64_t rows, int64_t dim, T factor, T* y) {
  scale_row(x, rows * dim, factor, y);
  for (int64_t d = rows * dim; d < rounded_up(rows, kRows) * dim; d += kLanes<T>) store(y + d, Vec<T>{});
}

// s[kRows][kPanel] = the products of x[kRows][dim] with the keys of a panel, of which there are n from its first on;
// vectors beyond them are left alone. s has rows of `stride`. Of head dims only [begin, end) are added, to those before.
template <class T>
ASA_INLINE void add_scores(const T* x, const T* panel, int64_t n, int64_t dim, int64_t begin, int64_t end, T* s,
                           int64_t stride) {
  const Consecutive<T> keys{panel + begin * kPanel<T>, kPanel<T>};
  const int64_t terms = end - begin;
  x += begin;
  if (n <= kLanes<T>) return tile<Left::by_row, 1>(x, dim, keys, terms, s, stride, begin > 0);
  if (n <= 2 * kLanes<T>) return tile<Left::by_row, 2>(x, dim, keys, terms, s, stride, begin > 0);
  tile<Left::by_row, kVectors>(x, dim, keys, terms, s, stride, begin > 0);
}

template <class T>
void scores(const T* x, const T* panel, int64_t n, int64_t dim, T* s, int64_t stride) {
  int64_t d = 0;  // without head dims scores are 0
  do add_scores(x, panel, n, dim, d, smaller(dim, d + kDepth), s, stride);
  while ((d += kDepth) < dim);
}
