// The three products that everything is made of. A strip is eight consecutive rows, packed [D][8].
//
//   tile         all columns against sixteen rows: scores of pass 1
//   dots         a list of columns against a strip: scores of those that survive
//   accumulate   a list of columns, weighted per row of a strip, summed
//
// The last two read the columns where they lie, [N][D], one broadcast each; nothing is gathered.

constexpr int kStrip = 8;
constexpr int kPanel = 24;  // columns packed together for tile()

#if defined(ASA_AVX512)
constexpr int kTileBytes = 64;
constexpr int kTileRegisters = 24;  // accumulators
constexpr int kChunk = 16;
constexpr int kSplit = 2;
#elif defined(ASA_AVX2)
constexpr int kTileBytes = 32;
constexpr int kTileRegisters = 12;
constexpr int kChunk = 8;
constexpr int kSplit = 1;
#else
constexpr int kTileBytes = 32;
constexpr int kTileRegisters = 6;
constexpr int kChunk = 4;
constexpr int kSplit = 1;
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

// Eight columns at a time; kSplit independent sums each, to hide the latency of the additions, and partial sums over
// kPartial of d, which round less.
constexpr int64_t kPartial = 128;

template <class T>
ASA_INLINE void dots_of_eight(const T* strip, const T* rows, int64_t dim, const int32_t* list, T* s) {
  const T* y[8];
  for (int c = 0; c < 8; ++c) y[c] = rows + list[c] * dim;
  for (int64_t first = 0; first == 0 || first < dim; first += kPartial) {
    const int64_t last = first + kPartial < dim ? first + kPartial : dim;
    Vec<T> sum[kSplit][8] = {};
    int64_t d = first;
    for (; d + kSplit <= last; d += kSplit)
#pragma GCC unroll 2
      for (int i = 0; i < kSplit; ++i) {
        const Vec<T> x = load(strip + (d + i) * kStrip);
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) sum[i][c] += x * y[c][d + i];
      }
    for (; d < last; ++d)
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) sum[0][c] += load(strip + d * kStrip) * y[c][d];
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      const Vec<T> part = kSplit == 1 ? sum[0][c] : sum[0][c] + sum[kSplit - 1][c];
      store(s + c * kStrip, first == 0 ? part : load(s + c * kStrip) + part);
    }
  }
}

// s[c][8] = <strip[.][8], rows[list[c]]> for c < count.
template <class T>
static void dots(const T* strip, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* s) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) dots_of_eight(strip, rows, dim, list + c, s + c * kStrip);
  if (c == count) return;
  int32_t rest[8];
  alignas(64) T last[8 * kStrip];
  for (int i = 0; i < 8; ++i) rest[i] = list[c + i < count ? c + i : count - 1];
  dots_of_eight(strip, rows, dim, rest, last);
  for (int64_t i = 0; i < (count - c) * kStrip; ++i) s[c * kStrip + i] = last[i];
}

template <int kCount, class T>
ASA_INLINE void add_chunk(const T* weights, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* sums) {
  Vec<T> sum[kCount] = {};
  for (int64_t c = 0; c < count; ++c) {
    const Vec<T> w = load(weights + c * kStrip);
    const T* y = rows + list[c] * dim;
    asm("" : "+r"(y));  // one base register: else the compiler keeps an address for every d
    if (c + 8 < count) __builtin_prefetch(rows + list[c + 8] * dim);
#pragma GCC unroll 16
    for (int d = 0; d < kCount; ++d) sum[d] += w * y[d];
  }
#pragma GCC unroll 16
  for (int d = 0; d < kCount; ++d) store(sums + d * kStrip, load(sums + d * kStrip) + sum[d]);
}

// sums[d][8] += sum over c < count of weights[c][8] * rows[list[c]][d], in partial sums too.
template <class T>
static void accumulate(const T* weights, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* sums) {
  for (int64_t first = 0; first < count; first += kPartial) {
    const int64_t size = count - first < kPartial ? count - first : kPartial;
    const T* const w = weights + first * kStrip;
    const int32_t* const part = list + first;
    int64_t d = 0;
    for (; d + kChunk <= dim; d += kChunk) add_chunk<kChunk>(w, rows + d, dim, part, size, sums + d * kStrip);
    for (; d + 4 <= dim; d += 4) add_chunk<4>(w, rows + d, dim, part, size, sums + d * kStrip);
    for (; d < dim; ++d) add_chunk<1>(w, rows + d, dim, part, size, sums + d * kStrip);
  }
}
