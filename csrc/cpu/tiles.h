// Products of whole rows on AMX (amx.h), of numbers that are sums of `parts` bf16 numbers: 1 for bf16, 2 for fp16, which
// they give exactly. Sums are float32. A product is one of 32 rows with 32 columns, two tiles by two, over steps of 32
// terms; what is missing of the last rows, columns and terms is 0.

#if defined(ASA_AMX) && defined(ASA_AVX512)
template <class T>
constexpr bool kHasTiles = sizeof(T) == sizeof(float);
#else
template <class T>
constexpr bool kHasTiles = false;
#endif

// Whether products of whole rows of a problem are formed on AMX.
template <class T>
ASA_INLINE bool on_tiles(const Problem<T>& p) {
  return kHasTiles<T> && p.parts > 0;
}

// How many times as fast as without AMX products of whole rows are, exponentials included; 4 products of parts are not.
template <class T>
ASA_INLINE int64_t times_faster(const Problem<T>& p) {
  return kHasTiles<T> && p.parts == 1 ? 3 : 1;
}

// Configures the tiles of a thread for as long as this lives.
template <class T>
struct TilesOf {
  const bool used;
  explicit TilesOf(const Problem<T>& p) : used(on_tiles(p)) {
    if constexpr (kHasTiles<T>)
      if (used) tiles_configure();
  }
  ~TilesOf() {
    if constexpr (kHasTiles<T>)
      if (used) tiles_release();
  }
  TilesOf(const TilesOf&) = delete;
  TilesOf& operator=(const TilesOf&) = delete;
};

#if defined(ASA_AVX512)
typedef uint16_t BFloat16s __attribute__((vector_size(2 * kLanes<float>), may_alias));
typedef uint16_t UnalignedBFloat16s __attribute__((vector_size(2 * kLanes<float>), aligned(2), may_alias));

ASA_INLINE BFloat16s bfloat16s(Vec<float> x) { return reinterpret_cast<BFloat16s>(to_bfloat16(x)); }

ASA_INLINE Vec<float> from_bfloat16(BFloat16s x) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(x, Ints<float>) << 16);
}

// The parts of numbers, one at to, the other at to + plane.
ASA_INLINE void store_parts(uint16_t* to, int64_t plane, int64_t parts, Vec<float> x) {
  const BFloat16s high = bfloat16s(x);
  *reinterpret_cast<UnalignedBFloat16s*>(to) = high;
  if (parts == 2) *reinterpret_cast<UnalignedBFloat16s*>(to + plane) = bfloat16s(x - from_bfloat16(high));
}

// The parts of two terms of a right factor, side by side as it wants them.
ASA_INLINE void store_pairs(uint16_t* to, int64_t plane, int64_t parts, Vec<float> even, Vec<float> odd) {
  for (int64_t part = 0;; to += plane) {
    const BFloat16s low = bfloat16s(even), high = bfloat16s(odd);
    const auto pairs = __builtin_convertvector(low, Ints<float>) | __builtin_convertvector(high, Ints<float>) << 16;
    *reinterpret_cast<Ints<float>*>(to) = pairs;
    if (++part == parts) return;
    even -= from_bfloat16(low), odd -= from_bfloat16(high);
  }
}
#endif

// The left factor of a product: 32 rows of bf16 numbers, the next 32 terms `step` numbers further on, second parts
// `plane`.
struct LeftRows {
  const uint16_t* numbers;
  int64_t stride, plane, step = kSquare;
};

// Writes the rows x(r) of `dim` numbers, r < rows, as a left factor, each padded to a multiple of kSquare.
template <class T, class F>
void pack_left(int64_t rows, const F& x, int64_t dim, int64_t parts, uint16_t* to) {
  const int64_t stride = rounded_up(dim, kSquare), plane = kSquare * stride;
  for (int64_t r = 0; r < kSquare; ++r)
    for (int64_t d = 0; d < stride; d += kLanes<T>)
      store_parts(to + r * stride + d, plane, parts, r < rows && d < dim ? load(x(r) + d) : Vec<T>{});
}

// Factors that are read often lie in tiles: [blocks of 32 rows of x][blocks of 32 of their numbers][parts][2]. The rows
// of x are columns of a right factor, as keys are for scores, or its terms, as values are, or terms of a left factor.

// 32 rows as columns: numbers x(r, c) of row r from c on. Tiles hold pairs of a column's terms.
template <class T, class F>
void pack_columns(const F& x, int64_t parts, uint16_t* tiles) {
  typedef uint32_t Pair __attribute__((may_alias));
  alignas(64) uint16_t rows[2][kSquare][kSquare];
  for (int64_t r = 0; r < kSquare; ++r)
    for (int64_t c = 0; c < kSquare; c += kLanes<T>) store_parts(&rows[0][r][c], kSquare * kSquare, parts, x(r, c));
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t r = 0; r < kSquare; ++r) {
      const auto* const from = reinterpret_cast<const Pair*>(rows[part][r]);
      auto* const to = reinterpret_cast<Pair*>(tiles + (2 * part + r / kTileRows) * kTileNumbers) + r % kTileRows;
      for (int64_t pair = 0; pair < kTileRows; ++pair) to[pair * kTileRows] = from[pair];
    }
}

// 32 rows as terms of a right factor.
template <class T, class F>
void pack_terms(const F& x, int64_t parts, uint16_t* tiles) {
  static_assert(kLanes<T> <= kTileRows, "a vector lies in one tile");
  for (int64_t r = 0; r < kSquare; r += 2)
    for (int64_t c = 0; c < kSquare; c += kLanes<T>)
      store_pairs(tiles + c / kTileRows * kTileNumbers + r / 2 * kSquare + c % kTileRows * 2, 2 * kTileNumbers, parts,
                  x(r, c), x(r + 1, c));
}

// 32 rows as terms of a left factor.
template <class T, class F>
void pack_left_terms(const F& x, int64_t parts, uint16_t* tiles) {
  alignas(64) uint16_t rows[2][kSquare][kSquare];
  for (int64_t r = 0; r < kSquare; ++r)
    for (int64_t c = 0; c < kSquare; c += kLanes<T>) store_parts(&rows[0][r][c], kSquare * kSquare, parts, x(r, c));
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t r = 0; r < kSquare; ++r)
      for (int64_t c = 0; c < kSquare; ++c) tiles[(part * kSquare + c) * kSquare + r] = rows[part][r][c];
}

// All of x. Rows whose kind is not `whole` are taken as 0, if there are kinds.
template <class T>
void pack_tiles(const T* x, int64_t n, int64_t dim, int64_t parts, Tiled how, const Kind* kinds, uint16_t* tiles,
                Queue& queue) {
  if constexpr (kHasTiles<T>) {
    const int64_t across = rounded_up(dim, kSquare) / kSquare;
    for (int64_t i; queue.take(i);)
      for (int64_t d = 0; d < across; ++d) {
        const auto numbers = [&](int64_t r, int64_t c) {
          const int64_t row = i * kSquare + r, column = d * kSquare + c;
          const bool present = row < n && column < dim && (kinds == nullptr || kinds[row] == Kind::whole);
          return present ? load(x + row * dim + column) : Vec<T>{};
        };
        uint16_t* const to = tiles + (i * across + d) * parts * 2 * kTileNumbers;
        switch (how) {
          case Tiled::columns: pack_columns<T>(numbers, parts, to); break;
          case Tiled::terms: pack_terms<T>(numbers, parts, to); break;
          case Tiled::left_terms: pack_left_terms<T>(numbers, parts, to);
        }
      }
  }
}

// A right factor of 32 columns; `step` is the way from one step of 32 terms to the next.
struct RightTiles {
  const uint16_t* tiles;
  int64_t step;
};

// Block i of the rows of x as columns.
ASA_INLINE RightTiles tiles_of_columns(const uint16_t* tiles, int64_t dim, int64_t parts, int64_t i) {
  const int64_t step = parts * 2 * kTileNumbers;
  return {tiles + i * rounded_up(dim, kSquare) / kSquare * step, step};
}

// Of the rows of x as terms those from block i on, and 32 columns from d on.
ASA_INLINE RightTiles tiles_of_terms(const uint16_t* tiles, int64_t dim, int64_t parts, int64_t i, int64_t d) {
  const int64_t across = rounded_up(dim, kSquare) / kSquare, of_columns = parts * 2 * kTileNumbers;
  return {tiles + (i * across + d / kSquare) * of_columns, across * of_columns};
}

// The same as a left factor, whose rows are the numbers from d on.
ASA_INLINE LeftRows tiles_of_left(const uint16_t* tiles, int64_t dim, int64_t parts, int64_t i, int64_t d) {
  const RightTiles right = tiles_of_terms(tiles, dim, parts, i, d);
  return {right.tiles, kSquare, 2 * kTileNumbers, right.step};
}

// Adds the products of both tiles 4 and 5 of rows with 6 and 7 of columns to 0 .. 3.
ASA_INLINE void dot_all() {
  tile_dot<0, 4, 6>();
  tile_dot<1, 4, 7>();
  tile_dot<2, 5, 6>();
  tile_dot<3, 5, 7>();
}

template <class T>
ASA_INLINE void load_left(LeftRows a, int64_t part, int64_t step) {
  const uint16_t* const from = a.numbers + part * a.plane + step * a.step;
  tile_load<4>(from, a.stride * 2);
  tile_load<5>(from + kTileRows * a.stride, a.stride * 2);
}

template <class T>
ASA_INLINE void load_right(RightTiles b, int64_t part, int64_t step) {
  const uint16_t* const from = b.tiles + step * b.step + part * 2 * kTileNumbers;
  tile_load<6>(from, kTileBytes);
  tile_load<7>(from + kTileNumbers, kTileBytes);
}

// c[kSquare][kSquare] = a b over `steps` of 32 terms, or adds it to c. The parts of a number are multiplied with all parts
// of the other: their products are exact.
template <class T>
void multiply(LeftRows a, RightTiles b, int64_t steps, int64_t parts, T* c, int64_t c_stride, bool add) {
  T* const below = c + kTileRows * c_stride;
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(T));
  if (add) {
    tile_load<0>(c, bytes), tile_load<1>(c + kTileRows, bytes);
    tile_load<2>(below, bytes), tile_load<3>(below + kTileRows, bytes);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t i = 0; i < steps; ++i) {
    load_left<T>(a, 0, i), load_right<T>(b, 0, i), dot_all();
    if (parts == 1) continue;
    load_right<T>(b, 1, i), dot_all();
    load_left<T>(a, 1, i), dot_all();
    load_right<T>(b, 0, i), dot_all();
  }
  tile_store<0>(c, bytes), tile_store<1>(c + kTileRows, bytes);
  tile_store<2>(below, bytes), tile_store<3>(below + kTileRows, bytes);
}
