// The three products that everything is made of. A strip is eight consecutive rows, packed [D][8].
//
//   tile         all columns against sixteen rows: scores of pass 1
//   dots         a list of columns against a strip: scores of those that survive
//   accumulate   a list of columns, weighted per row of a strip, summed
//
// The last two read the columns where they lie, [N][D], one broadcast each; nothing is gathered.

constexpr int kStrip = 8;
constexpr int kPanel = 24;  // columns packed together for tile()

#if defined(__AVX512F__)
constexpr int kTileBytes = 64;
constexpr int kTileRegisters = 24;  // accumulators
constexpr int kChunk = 16;
#elif defined(__AVX2__)
constexpr int kTileBytes = 32;
constexpr int kTileRegisters = 12;
constexpr int kChunk = 8;
#else
constexpr int kTileBytes = 32;
constexpr int kTileRegisters = 6;
constexpr int kChunk = 4;
#endif

// Pack rows x[row][d], row < rows, into packed[d][row] of `width` rows, the missing ones 0.
template <class T>
static void pack(const T* x, int64_t rows, int64_t width, int64_t dim, T* packed) {
  for (int64_t r = 0; r < width; ++r)
    for (int64_t d = 0; d < dim; ++d) packed[d * width + r] = r < rows ? x[r * dim + d] : T(0);
}

// s[column][16] = <q[.][16], panel[.][column]> for the kPanel columns of a panel.
template <class T>
static void tile(const T* q, const T* panel, int64_t dim, T* s) {
  typedef T W __attribute__((vector_size(kTileBytes), may_alias));
  constexpr int kVectors = 16 * sizeof(T) / kTileBytes;
  constexpr int kColumns = kTileRegisters >= kVectors ? kTileRegisters / kVectors : 1;
  static_assert(kPanel % kColumns == 0);
  for (int first = 0; first < kPanel; first += kColumns) {
    W sum[kColumns][kVectors] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const W* x = reinterpret_cast<const W*>(q + d * 16);
      const T* y = panel + d * kPanel + first;
#pragma GCC unroll 24
      for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[c][v] += x[v] * y[c];
    }
#pragma GCC unroll 24
    for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) reinterpret_cast<W*>(s + (first + c) * 16)[v] = sum[c][v];
  }
}

template <int kCount, class T>
ASA_INLINE void dots_of(const T* strip, const T* rows, int64_t dim, const int32_t* list, T* s) {
  const T* y[kCount];
  for (int c = 0; c < kCount; ++c) y[c] = rows + list[c] * dim;
  Vec<T> sum[kCount] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const Vec<T> x = load(strip + d * kStrip);
#pragma GCC unroll 16
    for (int c = 0; c < kCount; ++c) sum[c] += x * y[c][d];
  }
#pragma GCC unroll 16
  for (int c = 0; c < kCount; ++c) store(s + c * kStrip, sum[c]);
}

// s[c][8] = <strip[.][8], rows[list[c]]> for c < count.
template <class T>
static void dots(const T* strip, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* s) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) dots_of<8>(strip, rows, dim, list + c, s + c * kStrip);
  for (; c < count; ++c) dots_of<1>(strip, rows, dim, list + c, s + c * kStrip);
}

template <int kCount, class T>
ASA_INLINE void add_chunk(const T* weights, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* sums) {
  Vec<T> sum[kCount] = {};
  for (int64_t c = 0; c < count; ++c) {
    const Vec<T> w = load(weights + c * kStrip);
    const T* y = rows + list[c] * dim;
#pragma GCC unroll 16
    for (int d = 0; d < kCount; ++d) sum[d] += w * y[d];
  }
#pragma GCC unroll 16
  for (int d = 0; d < kCount; ++d) store(sums + d * kStrip, load(sums + d * kStrip) + sum[d]);
}

// sums[d][8] = sum over c < count of weights[c][8] * rows[list[c]][d]. In groups of columns: they stay in the cache from
// one chunk of d to the next, and partial sums round less.
template <class T>
static void accumulate(const T* weights, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* sums) {
  for (int64_t d = 0; d < dim; ++d) store(sums + d * kStrip, Vec<T>{});
  for (int64_t first = 0; first < count; first += 256) {
    const int64_t size = count - first < 256 ? count - first : 256;
    const T* w = weights + first * kStrip;
    int64_t d = 0;
    for (; d + kChunk <= dim; d += kChunk) add_chunk<kChunk>(w, rows + d, dim, list + first, size, sums + d * kStrip);
    for (; d + 4 <= dim; d += 4) add_chunk<4>(w, rows + d, dim, list + first, size, sums + d * kStrip);
    for (; d < dim; ++d) add_chunk<1>(w, rows + d, dim, list + first, size, sums + d * kStrip);
  }
}
