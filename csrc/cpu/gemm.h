// Products of whole rows: the scores of scan(), and all products in rows where many pairs survive.

constexpr int64_t kVectors = 3;  // registers of a tile in a row
#if defined(ASA_AVX512)
constexpr int64_t kRows =
    8;  // rows of a tile: all of it stays in registers, and 24 sums hide the latency of an addition
#else
constexpr int64_t kRows = 4;
#endif
constexpr int64_t kDepth = 256;  // terms of a sum added one after the other; more are added in parts, which round less

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

// packed[d][width] = factor * x[row][d] for row < rows, 0 for the missing ones.
template <class T>
static void pack(const T* x, int64_t rows, int64_t width, int64_t dim, T* packed, T factor = 1) {
  for (int64_t r = 0; r < width; ++r)
    for (int64_t d = 0; d < dim; ++d) packed[d * width + r] = r < rows ? factor * x[r * dim + d] : T(0);
}

template <class T>
void pack_panels(const T* x, int64_t n, int64_t dim, T* panels, Queue& queue) {
  for (int64_t i; queue.take(i);) {
    const int64_t first = i * kPanel<T>, rows = n - first < kPanel<T> ? n - first : kPanel<T>;
    pack(x + first * dim, rows, kPanel<T>, dim, panels + first * dim);
  }
}

// How the left factor of a product lies: a(row, term) = a[row * stride + term], or a[term * stride + row].
enum class Left { by_row, by_term };

// c[kRows][kWide vectors] = sum over terms of a(row, term) * b[term][.], or adds it to c.
template <Left kLeft, int kWide, class T>
static void tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t terms, T* c, int64_t c_stride,
                 bool add) {
  constexpr int64_t kStep = kLanes<T>;
  Vec<T> sum[kRows][kWide] = {};
  const T* row[kRows];
  for (int64_t r = 0; r < kRows; ++r) row[r] = kLeft == Left::by_row ? a + r * a_stride : a + r;
  for (int64_t t = 0; t < terms; ++t, b += b_stride) {
    Vec<T> y[kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) y[i] = load(b + i * kStep);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
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

// One tile-wide column of a product, or a narrower one at its end.
template <Left kLeft, int kWide, class T>
static void column(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t terms, T* c, int64_t c_stride,
                   bool add) {
  for (int64_t t = 0; t == 0 || t < terms; t += kDepth) {
    const T* const x = kLeft == Left::by_row ? a + t : a + t * a_stride;
    tile<kLeft, kWide>(x, a_stride, b + t * b_stride, b_stride, terms - t < kDepth ? terms - t : kDepth, c, c_stride,
                       add || t > 0);
  }
}

// c[kRows][dim] += sum over terms of a(row, term) * b[term][dim].
template <Left kLeft, class T>
static void add_product(const T* a, int64_t a_stride, const T* b, int64_t terms, int64_t dim, T* c) {
  for (int64_t d = 0; d < dim;) {
    const int64_t remaining = (dim - d) / kLanes<T>;
    const int64_t wide = remaining == 4 || remaining == 2 ? 2 : remaining == 1 ? 1 : kVectors;
    if (wide == 1) column<kLeft, 1>(a, a_stride, b + d, dim, terms, c + d, dim, true);
    if (wide == 2) column<kLeft, 2>(a, a_stride, b + d, dim, terms, c + d, dim, true);
    if (wide == 3) column<kLeft, 3>(a, a_stride, b + d, dim, terms, c + d, dim, true);
    d += wide * kLanes<T>;
  }
}

// s[kRows][kPanel] = the products of kRows packed rows with the keys of a panel, of which there are n from its first on;
// vectors beyond them are left alone. s has rows of `stride`.
template <class T>
ASA_INLINE void scores(const T* packed, const T* panel, int64_t n, int64_t dim, T* s, int64_t stride) {
  if (n <= kLanes<T>) return column<Left::by_term, 1>(packed, kRows, panel, kPanel<T>, dim, s, stride, false);
  if (n <= 2 * kLanes<T>) return column<Left::by_term, 2>(packed, kRows, panel, kPanel<T>, dim, s, stride, false);
  column<Left::by_term, kVectors>(packed, kRows, panel, kPanel<T>, dim, s, stride, false);
}
