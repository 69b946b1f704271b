// Survivors as bits, 64 pairs a word: bit c of m[r][J] says whether query r of a block keeps key 64 J + c.

// n bits set, from the lowest on: at least none, at most all.
ASA_INLINE uint64_t lowest_bits(int64_t n) { return n <= 0 ? 0 : ~uint64_t{0} >> (n < kBlock ? kBlock - n : 0); }

ASA_INLINE bool real(const bool* mask, int64_t i) { return mask == nullptr || mask[i]; }

// The part of a window's side that lies on the grid: offsets [first, last] from a place along that side.
struct Extent {
  int64_t reach, first, last;
  Extent(int64_t window, int64_t place, int64_t side)
      : reach(window / 2), first(larger(-reach, -place)), last(smaller(reach, side - 1 - place)) {}
};

// The real ones of a block of keys.
template <class T>
ASA_INLINE uint64_t real_keys(const Problem<T>& p, int64_t block) {
  const int64_t first = block * kBlock, count = smaller(kBlock, p.n_k - first);
  if (p.real_k == nullptr) return lowest_bits(count);
  uint64_t keys = 0;
  for (int64_t c = 0; c < count; ++c) keys |= static_cast<uint64_t>(p.real_k[first + c]) << c;
  return keys;
}

// Calls f(j, columns, o) for every row of the window around token i: tokens [j, j + columns) of the grid, from offset o on.
// Extra tokens have none.
template <class T, class F>
ASA_INLINE void for_window_rows(const Problem<T>& p, int64_t i, const F& f) {
  const int64_t place = i - p.extra;
  if (place < 0) return;
  const int64_t line = place / p.width, column = place % p.width, slice = p.depth == 1 ? 0 : line / p.height;
  const Extent slices(p.window[0], slice, p.depth), rows(p.window[1], line - slice * p.height, p.height),
      columns(p.window[2], column, p.width);
  for (int64_t a = slices.first; a <= slices.last; ++a)
    for (int64_t b = rows.first; b <= rows.last; ++b) {
      const int64_t row = (a + slices.reach) * p.window[1] + b + rows.reach;
      f(p.extra + (line + a * p.height + b) * p.width + column + columns.first, columns.last - columns.first + 1,
        row * p.window[2] + columns.first + columns.reach);
    }
}

// Calls f(j, o) for every token j on the grid in the window around token i, o being its offset there.
template <class T, class F>
void for_window(const Problem<T>& p, int64_t i, const F& f) {
  for_window_rows(p, i, [&](int64_t j, int64_t columns, int64_t o) {
    for (int64_t b = 0; b < columns; ++b) f(j + b, o + b);
  });
}

// Transpose a 64 x 64 bit matrix: bit c of word r to bit r of word c. Squares of 32 bits are exchanged, then of 16, ...:
// of two rows as far apart as a square is large, the high halves of the squares in the first, by the mask `low`, with the
// low halves of those in the second.
#if defined(ASA_AVX512)
template <int kHalf>
ASA_INLINE void exchange(__m512i* x, uint64_t low) {  // rows of different vectors
  const __m512i mask = _mm512_set1_epi64(static_cast<int64_t>(low));
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    constexpr int kApart = kHalf / 8;
    if (i & kApart) continue;
    const __m512i y = _mm512_and_si512(_mm512_xor_si512(_mm512_srli_epi64(x[i], kHalf), x[i + kApart]), mask);
    x[i] = _mm512_xor_si512(x[i], _mm512_slli_epi64(y, kHalf));
    x[i + kApart] = _mm512_xor_si512(x[i + kApart], y);
  }
}

template <int kHalf>
ASA_INLINE void exchange_within(__m512i* x, uint64_t low) {  // rows of the same
  const __m512i mask = _mm512_set1_epi64(static_cast<int64_t>(low)), lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i partner = _mm512_xor_si512(lanes, _mm512_set1_epi64(kHalf));
  const __mmask8 firsts = kHalf == 4 ? 0x0F : kHalf == 2 ? 0x33 : 0x55;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i other = _mm512_permutexvar_epi64(partner, x[i]);
    const __m512i first = _mm512_mask_blend_epi64(firsts, other, x[i]);
    const __m512i second = _mm512_mask_blend_epi64(firsts, x[i], other);
    const __m512i y = _mm512_and_si512(_mm512_xor_si512(_mm512_srli_epi64(first, kHalf), second), mask);
    x[i] = _mm512_xor_si512(x[i], _mm512_mask_slli_epi64(y, firsts, y, kHalf));
  }
}

static void transpose64(uint64_t* words) {
  __m512i x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = _mm512_loadu_si512(words + 8 * i);
  exchange<32>(x, 0x00000000FFFFFFFFull);
  exchange<16>(x, 0x0000FFFF0000FFFFull);
  exchange<8>(x, 0x00FF00FF00FF00FFull);
  exchange_within<4>(x, 0x0F0F0F0F0F0F0F0Full);
  exchange_within<2>(x, 0x3333333333333333ull);
  exchange_within<1>(x, 0x5555555555555555ull);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm512_storeu_si512(words + 8 * i, x[i]);
}
#elif defined(ASA_AVX2)
// By columns of bytes: one instruction takes a bit of each.
static void transpose64(uint64_t* words) {
  uint32_t columns[kBlock][2];
  for (int half = 0; half < 2; ++half) {
    const auto rows = reinterpret_cast<const __m128i*>(words + half * 32);  // two each
    __m256i x[8], y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = _mm256_setr_m128i(_mm_loadu_si128(rows + i), _mm_loadu_si128(rows + 8 + i));
    // In the low halves of x, and so in the high ones, byte c of row r is number 8 r + c. Each round rotates the 7 bits of
    // its number by one; after four it is 16 c + r.
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        y[2 * i] = _mm256_unpacklo_epi8(x[i], x[i + 4]);
        y[2 * i + 1] = _mm256_unpackhi_epi8(x[i], x[i + 4]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) x[i] = y[i];
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c)
#pragma GCC unroll 8
      for (int bit = 7; bit >= 0; --bit) {
        columns[8 * c + bit][half] = static_cast<uint32_t>(_mm256_movemask_epi8(x[c]));
        x[c] = _mm256_add_epi8(x[c], x[c]);
      }
  }
  __builtin_memcpy(words, columns, sizeof(columns));
}
#else
template <int kHalf>
ASA_INLINE void exchange(uint64_t* x, uint64_t low) {
  for (int base = 0; base < 64; base += 2 * kHalf)
    for (int i = base; i < base + kHalf; ++i) {
      const uint64_t y = (x[i] >> kHalf ^ x[i + kHalf]) & low;
      x[i] ^= y << kHalf;
      x[i + kHalf] ^= y;
    }
}

static void transpose64(uint64_t* x) {
  exchange<32>(x, 0x00000000FFFFFFFFull);
  exchange<16>(x, 0x0000FFFF0000FFFFull);
  exchange<8>(x, 0x00FF00FF00FF00FFull);
  exchange<4>(x, 0x0F0F0F0F0F0F0F0Full);
  exchange<2>(x, 0x3333333333333333ull);
  exchange<1>(x, 0x5555555555555555ull);
}
#endif

// M of a block of queries, and of blocks [0, columns) of keys.
template <class T>
void non_local(const Problem<T>& p, int64_t block, int64_t columns, uint64_t* m) {
  alignas(64) uint64_t tile[64];
  const bool reads_back = p.thresholded && (p.reciprocal || p.bits == nullptr);
  for (int64_t j = 0; j < columns; ++j) {
    // The words of the next block lie a page or more further, where processors do not look ahead.
    for (int64_t r = 0; reads_back && j + 1 < columns && r < kBlock; r += 8)
      __builtin_prefetch(p.words_back(block, j + 1) + r);
    if (p.thresholded && p.bits == nullptr) {  // M of the columns as queries; it is symmetric
      __builtin_memcpy(tile, p.words_back(block, j), sizeof(tile));
      transpose64(tile);
    } else if (p.thresholded) {
      const uint64_t* const own = p.words(block, j);
      uint64_t any = 0;
      for (int64_t r = 0; r < kBlock; ++r) any |= own[r];
      if (any != 0 && p.reciprocal) {
        __builtin_memcpy(tile, p.words_back(block, j), sizeof(tile));
        transpose64(tile);
        for (int64_t r = 0; r < kBlock; ++r) tile[r] &= own[r];
      } else {
        __builtin_memcpy(tile, own, sizeof(tile));
      }
    } else {
      const uint64_t keys = real_keys(p, j);
      for (int64_t r = 0; r < kBlock; ++r) {
        const int64_t i = block * kBlock + r;
        tile[r] = p.positions == 0 && i < p.n_q && real(p.real_q, i) ? keys : 0;
      }
    }
    for (int64_t r = 0; r < kBlock; ++r) m[r * p.blocks_k + j] = tile[r];
  }
}

// Bits of the rows become M in the columns of blocks_q blocks from first_key on, by those of the columns, `back`.
template <class T>
void keep_mutual(const Problem<T>& p, Queue& queue) {
  alignas(64) uint64_t tile[64];
  for (int64_t block; queue.take(block);)
    for (int64_t j = 0; j < p.blocks_q; ++j) {
      uint64_t* const own = p.words(block, p.first_key / kBlock + j);
      __builtin_memcpy(tile, p.words_back(block, j), sizeof(tile));
      transpose64(tile);
      for (int64_t r = 0; r < kBlock; ++r) own[r] &= tile[r];
    }
}

// Adds L of query i to its words l, or L^T.
template <class T>
void add_local_of_row(const Problem<T>& p, int64_t i, bool transposed, uint64_t* l) {
  const int64_t size = p.positions;
  for_window_rows(p, i, [&](int64_t token, int64_t columns, int64_t o) {
    const int64_t end = smaller(token + columns, p.first_key + p.n_k), skipped = larger(0, p.first_key - token);
    for (token += skipped, o += skipped; token < end; ++token, ++o) {
      const int64_t j = token - p.first_key;
      const bool flag = transposed ? p.local[token * size + size - 1 - o] : p.local[i * size + o];
      l[j / kBlock] |= static_cast<uint64_t>(flag) << j % kBlock;
    }
  });
}

// The same for a block of queries.
template <class T>
void add_local(const Problem<T>& p, int64_t block, bool transposed, uint64_t* l) {
  for (int64_t r = 0; p.positions > 0 && r < smaller(kBlock, p.n_q - block * kBlock); ++r)
    add_local_of_row(p, block * kBlock + r, transposed, l + r * p.blocks_k);
}

inline int64_t count_bits(const uint64_t* words, int64_t size) {
  int64_t count = 0;
  for (int64_t j = 0; j < size; ++j) count += __builtin_popcountll(words[j]);
  return count;
}

// Calls f(j) for the bits set, ascending.
template <class F>
ASA_INLINE void for_bits(const uint64_t* words, int64_t size, const F& f) {
  for (int64_t w = 0; w < size; ++w)
    for (uint64_t word = words[w]; word != 0; word &= word - 1) f(w * kBlock + __builtin_ctzll(word));
}

// Writes the bits set to a list, ascending, each plus `first`, and up to kPad numbers more; returns where the list
// ends.
ASA_INLINE int32_t* list_bits(const uint64_t* words, int64_t size, int64_t first, int32_t* list) {
#if defined(ASA_AVX512)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t w = 0; w < size; ++w) {
    if (words[w] == 0) continue;
    for (int64_t bit = 0; bit < kBlock; bit += 16) {
      const auto bits = static_cast<__mmask16>(words[w] >> bit);
      const __m512i columns =
          _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(first + w * kBlock + bit)));
      _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(bits, columns));
      list += __builtin_popcount(bits);
    }
  }
#else
  for_bits(words, size, [&](int64_t j) { *list++ = static_cast<int32_t>(first + j); });
#endif
  return list;
}

// How much room a list needs that is written and read by whole vectors: at most count + 2 kPad numbers.
ASA_INLINE int64_t list_room(int64_t count) { return rounded_up(count, kPad) + kPad; }

// The lanes of a vector at column j, a multiple of its length.
template <class T>
ASA_INLINE uint64_t lane_bits(const uint64_t* words, int64_t j) {
  return words[j / kBlock] >> j % kBlock;
}

constexpr int64_t most_shared(int64_t n_k) { return 2 * n_k / 3; }  // keys: where more are kept, whole rows are taken

// The survivors of some consecutive queries.
template <class T>
struct Survivors {
  int64_t first, rows;
  uint64_t* m;
  int64_t count[kMostRows];
  // Of kRows rows each:
  Kind kind[kMostRows / kRows];
  int64_t together[kMostRows / kRows];  // keys that any of them keeps
  // Of those of which scan() left the sum over their neighbours, unless whole rows are faster, m holds what differs from
  // these, which is what kinds and lists are of; restore() makes it the survivors again.
  bool corrected[kMostRows / kRows];
  int64_t summed[kMostRows / kRows];  // blocks of keys that are in the sum that scan() left; m has no bits there

  Survivors(Arena& arena, const Problem<T>& p)
      : m(arena.take<uint64_t>(p.q_at_a_time * p.blocks_k)),
        by_key_(arena.take<uint64_t>(p.q_at_a_time * p.blocks_k)) {}

  // Takes the next rows from a queue; `lists` says whether list_shared() will be asked for.
  bool take(const Problem<T>& p, Queue& queue, bool lists = true) {
    int64_t taken;
    if (!queue.take(taken)) return false;
    first = p.begin + taken * p.q_at_a_time;
    rows = smaller(p.q_at_a_time, p.end - first);
    for (int64_t r = 0; r < rows; r += kBlock) {
      uint64_t* const words = m + r * p.blocks_k;
      non_local(p, (first + r) / kBlock, p.blocks_k, words);
      add_local(p, (first + r) / kBlock, false, words);
    }
    for (int64_t r = 0; r < rows; ++r) count[r] = count_bits(row(p, r), p.blocks_k);
    for (int64_t r = 0; r < rows; r += kRows) {
      const Begun begun = p.begun == nullptr ? Begun::nothing : p.begun[first + r];
      summed[r / kRows] = begun == Begun::survivors ? settled_blocks((first + r) / kBlock, p.blocks_q) : 0;
      for (int64_t x = r; x < smaller(rows, r + kRows); ++x)
        for (int64_t j = 0; j < summed[r / kRows]; ++j) m[x * p.blocks_k + j] = 0;
      bool& corrects = corrected[r / kRows] = begun == Begun::neighbours;
      if (corrects) exchange_with_neighbours(p, r);
      kind[r / kRows] = kind_of(p, r);
      if (p.kinds != nullptr) kind[r / kRows] = p.kinds[first + r];
      if (corrects && kind[r / kRows] == Kind::whole) restore(p, r);
    }
    if (lists) transpose(p);
    return true;
  }

  const uint64_t* row(const Problem<T>& p, int64_t r) const { return m + r * p.blocks_k; }

  // Whether a row that is corrected loses neighbours.
  bool removes(const Problem<T>& p, int64_t r) const {
    const int64_t i = first + r;
    const uint64_t* const neighbours = p.words(i / kBlock, 0) + i % kBlock;
    uint64_t removed = 0;
    for (int64_t j = 0; j < p.blocks_k; ++j) removed |= row(p, r)[j] & neighbours[j * kBlock];
    return removed != 0;
  }

  void restore(const Problem<T>& p, int64_t r) {
    exchange_with_neighbours(p, r);
    corrected[r / kRows] = false;
  }

  // Writes the keys that any of kRows rows keeps, ascending, and who keeps them: bit c * kRows + r of `members` says
  // whether row r keeps the c-th. Returns how many there are; of members the rest of a vector and a word is 0.
  int64_t list_shared(const Problem<T>& p, int64_t r, int32_t* list, uint64_t* members) const {
    constexpr int64_t kInWord = kBlock / kRows;
    const uint64_t* const by_key = by_key_ + r / kBlock * kBlock * p.blocks_k;
    const int64_t shift = r % kBlock;
    int64_t count = 0;
    uint64_t word = 0;
    for (int64_t j = 0; j < p.blocks_k; ++j)
      for (uint64_t any = together_at(p, r, j); any != 0; any &= any - 1) {
        const int64_t key = j * kBlock + __builtin_ctzll(any);
        list[count] = static_cast<int32_t>(key);
        word |= (by_key[key] >> shift & kAll) << count % kInWord * kRows;
        if (++count % kInWord == 0) members[count / kInWord - 1] = word, word = 0;
      }
    members[count / kInWord] = word;
    members[count / kInWord + 1] = 0;
    return count;
  }

  // How many keys of a block the list of row r holds; of rows that share one, the first has it.
  int64_t count_listed(const Problem<T>& p, int64_t r, int64_t block) const {
    switch (kind[r / kRows]) {
      case Kind::listed: return __builtin_popcountll(row(p, r)[block]);
      case Kind::shared: return r % kRows == 0 ? __builtin_popcountll(together_at(p, r, block)) : 0;
      default: return 0;
    }
  }

  static int64_t members_room(int64_t count) { return count * kRows / kBlock + 2; }

  // Calls f(first row, rows) for every kRows rows of a kind.
  template <class F>
  void for_each(Kind wanted, const F& f) const {
    for (int64_t r = 0; r < rows; r += kRows)
      if (kind[r / kRows] == wanted) f(r, smaller(kRows, rows - r));
  }

 private:
  static constexpr uint64_t kAll = (uint64_t{1} << kRows) - 1;
  uint64_t* by_key_;  // [blocks of rows][blocks_k][64] bit r says whether row r of the block keeps the key

  // m becomes what differs between it and the adaptive neighbours, and the other way round.
  void exchange_with_neighbours(const Problem<T>& p, int64_t r) {
    for (int64_t x = r; x < smaller(rows, r + kRows); ++x) {
      const int64_t i = first + x;
      const uint64_t* const neighbours = p.words(i / kBlock, 0) + i % kBlock;
      for (int64_t j = 0; j < p.blocks_k; ++j) m[x * p.blocks_k + j] ^= neighbours[j * kBlock];
    }
  }

  Kind kind_of(const Problem<T>& p, int64_t r) {
    int64_t sum = 0, any = 0;
    for (int64_t x = r; x < smaller(rows, r + kRows); ++x) sum += count_bits(row(p, x), p.blocks_k);
    for (int64_t j = 0; j < p.blocks_k; ++j) any += __builtin_popcountll(together_at(p, r, j));
    together[r / kRows] = any;
    // Beside a pair of whole rows, one of shared keys takes half as long again, and one in a list four times as long;
    // or several times as long as that, where AMX forms whole rows.
    const int64_t whole = 2 * kRows * (p.n_k - summed[r / kRows] * kBlock), faster = times_faster(p);
    const int64_t shared = 3 * faster * kRows * any, listed = 8 * faster * sum;
    return whole < shared && whole < listed ? Kind::whole : shared < listed ? Kind::shared : Kind::listed;
  }

  uint64_t together_at(const Problem<T>& p, int64_t r, int64_t j) const {
    uint64_t any = 0;
    for (int64_t x = r; x < smaller(rows, r + kRows); ++x) any |= m[x * p.blocks_k + j];
    return any;
  }

  void transpose(const Problem<T>& p) {
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t end = smaller(rows, r + kBlock);
      bool any_shared = false;
      for (int64_t x = r; x < end; x += kRows) any_shared |= kind[x / kRows] == Kind::shared;
      for (int64_t j = 0; any_shared && j < p.blocks_k; ++j) {
        uint64_t* const tile = by_key_ + (r * p.blocks_k + j * kBlock);
        uint64_t any = 0;
        for (int64_t x = 0; x < kBlock; ++x) any |= tile[x] = r + x < end ? m[(r + x) * p.blocks_k + j] : 0;
        if (any != 0) transpose64(tile);
      }
    }
  }
};
