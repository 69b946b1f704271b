// What the first pass sums of the output while scores are in the cache: of rows with many neighbours.

// Whether rows of a block may begin with the sum over some of their survivors. Not where values are not finite:
// aggregate() looks for those that a row keeps, and no longer knows these.
template <class T>
bool may_sum_survivors(const Problem<T>& p, int64_t block) {
  return p.begun != nullptr && p.reciprocal && !on_tiles(p) && p.not_finite == nullptr &&
         settled_blocks(block, p.blocks_q) > 0;
}

// Words of bits, of some rows for blocks of keys.
struct Words {
  const uint64_t* first;
  int64_t row_stride, block_stride;
  uint64_t operator()(int64_t row, int64_t block) const { return first[row * row_stride + block * block_stride]; }
};

// What scan() leaves of the output of some of the rows: the weights of those of the first keys whose bits are set, times
// v. Without AMX they are kRows, with it some of kSquare. Their shift and factor are there.
template <class T>
struct Beginning {
  const Scores<T>& scores;
  int64_t r;
  Words bits;  // of the rows from r on
  int64_t end;  // of the keys
  const Problem<T>& p = scores.p;
  const ScanScratch<T>& w = scores.w;
  T* const sums = w.sums + r * w.sums_stride;
  double mass[kSquare] = {}, squares[kSquare] = {};

  void form() {
    for (int64_t x = 0; x < kRows * p.dim_v; ++x) sums[x] = 0;
    for (int64_t from = 0; from < end; from += w.keys) {
      const int64_t keys = smaller(w.keys, end - from);
      for (int64_t x = 0; x < kRows; ++x) {
        T* const weights = w.weights + x * w.keys;
        form_weights(x, r + x < scores.rows, from, keys, [&](int64_t j, Vec<T> e) { store(weights + j, e); });
      }
      add_product<Left::by_row>(w.weights, w.keys, Sliced<T>{p.v_slices, p.n_k, from}, keys, p.dim_v, sums);
    }
  }

  // On AMX, for the rows x of kSquare for which begins(x) holds; the weights of others are 0.
  template <class F>
  void form_on_tiles(const F& begins) {
    for (int64_t from = 0; from < end; from += w.keys) {
      const int64_t keys = rounded_up(smaller(w.keys, end - from), kSquare), stride = w.keys + kSquare,
                    plane = kSquare * stride;
      for (int64_t x = 0; x < kSquare; ++x) {
        uint16_t* const weights = w.weights_left + x * stride;
        form_weights(x, begins(x), from, keys,
                     [&](int64_t j, Vec<T> e) { store_parts(weights + j, plane, p.parts, e); });
      }
      for (int64_t d = 0; d < p.dim_v; d += kSquare)
        multiply({w.weights_left, stride, plane}, tiles_of_terms(p.v_tiles, p.dim_v, p.parts, from / kSquare, d),
                 keys / kSquare, p.parts, sums + d, w.sums_stride, from > 0);
    }
  }

  void finish(int64_t x, Begun begun) const {
    const int64_t i = scores.first + r + x;
    p.begun[i] = begun;
    p.mass[i] = mass[x], p.squares[i] = squares[x];
    for (int64_t d = 0; d < p.dim_v; ++d) p.out[i * p.dim_v + d] = sums[x * w.sums_stride + d];
  }

 private:
  // Calls write(j, weights) for the keys from + j, j < keys, and adds the weights up.
  template <class F>
  void form_weights(int64_t x, bool present, int64_t from, int64_t keys, const F& write) {
    const T *const s = scores.row(r + x) + from, *const sizes = p.sizes + from;
    const T* const stored = scores.e == nullptr ? nullptr : scores.exponentials_of(r + x) + from;
    const int64_t i = scores.first + r + x;
    const T shift = present ? p.shift[i] : T(0), factor = present ? p.factor[i] : T(1);
    Vec<T> sum = {}, sum_of_squares = {};
    for (int64_t block = 0; block < keys; block += kBlock) {
      const uint64_t word = present ? bits(x, (from + block) / kBlock) : 0;
      const int64_t to = smaller(keys, block + kBlock);
#pragma GCC unroll 4
      for (int64_t j = block; j < to; j += kLanes<T>) {
        const Vec<T> all = stored == nullptr ? exponential(load(s + j) - shift) : load(stored + j);
        const Vec<T> e = choose(word >> (j - block), all * factor, Vec<T>{});
        write(j, e);
        sum += e;
        const Vec<T> sized = e * load(sizes + j);
        sum_of_squares += sized * sized;
      }
    }
    mass[x] += sum_of<T>(sum);
    squares[x] += sum_of<T>(sum_of_squares);
  }
};

// Whether kRows rows with so many adaptive neighbours begin with the sum over all of these. Of the neighbours of a row
// reciprocity removes about as large a share as it has no neighbours; lists of what it removes take about four times as
// long a pair as products of whole rows. So without reciprocity an eighth of all keys pays for the one product that is
// left.
template <class T>
bool sums_neighbours(const Problem<T>& p, int64_t neighbours) {
  return p.begun != nullptr &&
         (p.reciprocal ? 16 * neighbours >= 15 * kRows * p.n_k : 8 * times_faster(p) * neighbours >= kRows * p.n_k);
}

// And whether with the sum over their survivors among n_k keys: fewer are better shared by rows. They are looked for
// where three eighths of all keys are neighbours.
constexpr bool sums_survivors(int64_t survivors, int64_t n_k) { return 4 * survivors >= kRows * n_k; }

// Finds the survivors of rows that were put off among the keys of settled blocks: m [kBlock][blocks_k] of their block.
// Where they are few, nothing is put off any more; returns whether some is.
template <class T>
bool find_settled(const Problem<T>& p, int64_t first, int64_t rows, uint64_t* m) {
  const int64_t block = first / kBlock, settled = settled_blocks(block, p.blocks_q);
  bool formed = false, any = false;
  for (int64_t r = 0; r < rows; r += kRows) {
    Begun* const begun = p.begun + first + r;
    if (*begun != Begun::put_off) continue;
    if (!formed) non_local(p, block, settled, m);  // of rows whose scores are to come it is nothing that is read
    formed = true;
    const int64_t some = smaller(kRows, rows - r);
    int64_t count = 0;
    for (int64_t x = 0; x < some; ++x) {
      const int64_t i = first + r + x;
      uint64_t* const words = m + i % kBlock * p.blocks_k;
      if (p.positions > 0) add_local_of_row(p, i, false, words);
      count += count_bits(words, settled);
    }
    const bool many = sums_survivors(count, settled * kBlock);
    for (int64_t x = 0; !many && x < some; ++x) begun[x] = Begun::nothing;
    any |= many;
  }
  return any;
}

// Begins with the sums over these survivors. Where they have less than 2^-10 of the weight of some row, or NaN, the rows
// are left: so far below the shift, weights lose digits.
template <class T>
void sum_settled(const Scores<T>& scores) {
  const Problem<T>& p = scores.p;
  const int64_t settled = settled_blocks(scores.first / kBlock, p.blocks_q);
  for (int64_t r = 0; r < scores.rows; r += kRows) {
    Begun* const begun = p.begun + scores.first + r;
    if (*begun != Begun::put_off) continue;
    const uint64_t* const m = scores.w.m + (scores.first + r) % kBlock * p.blocks_k;
    Beginning<T> beginning{scores, r, {m, p.blocks_k, 1}, settled * kBlock};
    beginning.form();
    const int64_t rows = smaller(kRows, scores.rows - r);
    bool near = true;
    for (int64_t x = 0; x < rows; ++x)
      near &= beginning.mass[x] >= 0x1p-10 || count_bits(m + x * p.blocks_k, settled) == 0;
    for (int64_t x = 0; x < rows; ++x)
      if (near)
        beginning.finish(x, Begun::survivors);
      else
        begun[x] = Begun::nothing;
  }
}
