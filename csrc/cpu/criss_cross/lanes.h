// Products of vectors, lane by lane.

constexpr int64_t kTogether =
    64;  // terms of a sum added one after the other; more are added in parts, which round less

template <class T>
void clear(T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

// Where element (row, term) of a factor lies that consists of vectors: x + row * by_row + term * by_term.
template <class T>
struct Factor {
  const T* x;
  int64_t by_row, by_term;
};

template <int kX, int kY, class T>
static void lane_tile(Factor<T> a, Factor<T> b, int64_t terms, T* c, int64_t c_row, int64_t c_column) {
  Vec<T> sum[kX][kY] = {};
  for (int64_t t = 0; t < terms; ++t, a.x += a.by_term, b.x += b.by_term) {
    Vec<T> left[kX];
#pragma GCC unroll 8
    for (int x = 0; x < kX; ++x) left[x] = load(a.x + x * a.by_row);
#pragma GCC unroll 8
    for (int y = 0; y < kY; ++y) {
      if (y % 2 == 0) load_no_further();
      const Vec<T> right = load(b.x + y * b.by_row);
#pragma GCC unroll 8
      for (int x = 0; x < kX; ++x) sum[x][y] += left[x] * right;
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < kX; ++x)
#pragma GCC unroll 8
    for (int y = 0; y < kY; ++y) {
      T* const p = c + x * c_row + y * c_column;
      store(p, load(p) + sum[x][y]);
    }
}

constexpr int kTileX = kRegisters == 32 ? 4 : 3, kTileY = kRegisters == 32 ? 6 : 4;

// Tiles of a strip of kX rows, as wide as fits.
template <int kX, class T>
static void lane_rows(Factor<T> a, Factor<T> b, int64_t columns, int64_t terms, T* c, int64_t c_row, int64_t c_column) {
  int64_t y = 0;
  const auto tile = [&](auto width) {
    for (; columns - y >= width; y += width)
      lane_tile<kX, width>(a, {b.x + y * b.by_row, b.by_row, b.by_term}, terms, c + y * c_column, c_row, c_column);
  };
  tile(std::integral_constant<int, kTileY>());
  tile(std::integral_constant<int, 4>());
  tile(std::integral_constant<int, 2>());
  tile(std::integral_constant<int, 1>());
}

// c(x, y) += sum over terms of a(x, term) * b(y, term), lane by lane.
template <class T>
static void add_lanes(Factor<T> a, Factor<T> b, int64_t rows, int64_t columns, int64_t terms, T* c, int64_t c_row,
                      int64_t c_column) {
  for (int64_t t = 0; t < terms; t += kTogether) {
    int64_t x = 0;
    const auto strip = [&](auto height) {
      for (; rows - x >= height; x += height)
        lane_rows<height>({a.x + x * a.by_row + t * a.by_term, a.by_row, a.by_term},
                          {b.x + t * b.by_term, b.by_row, b.by_term}, columns, smaller(kTogether, terms - t),
                          c + x * c_row, c_row, c_column);
    };
    strip(std::integral_constant<int, kTileX>());
    strip(std::integral_constant<int, 1>());
  }
}
