// Adaptive sparse attention on strips of eight rows, for one instruction set (the including file's namespace ASA_ISA).
//
//   scan         scores of sixteen rows against all keys, while they are in the cache: lse, thresholds, neighbour bits
//   aggregate    M = A and A^T from bits alone; scores of the columns that survive in a strip; softmax; times v
//   backward_*   the same lists again: rows give dq, columns dk and dv, no atomics
//
// A strip visits every column that survives in any of its rows, which neighbouring rows mostly share, and masks lanes.

#include "asa.h"

namespace asa_ops::cpu::ASA_ISA {
namespace {

#include "simd.h"

#include "products.h"

constexpr int64_t kStrips = kBlockRows / kStrip;
constexpr int64_t kCacheBytes = 384 * 1024;  // of the columns in use: a share of a core's second-level cache
constexpr int64_t kStored = 4096;  // columns a strip, on average, up to which the backward stores scores between its passes

// Memory of one thread, handed out in pieces aligned to cache lines.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

template <class T>
int64_t longest(const Problem<T>& p) {
  return p.stride_q > p.stride_k ? p.stride_q : p.stride_k;
}

template <class T>
int64_t widest(const Problem<T>& p) {
  return p.dim > p.dim_v ? p.dim : p.dim_v;
}

template <class T>
int64_t panels_of(const Problem<T>& p) {
  return (p.n_k + kPanel - 1) / kPanel;
}

// How many columns of a block's lists may be stored between the passes of backward_rows().
template <class T>
int64_t stored_columns(const Problem<T>& p) {
  return kStrips * (p.stride_k < kStored ? p.stride_k : kStored);
}

template <class T>
int64_t scratch_bytes(const Problem<T>& p) {
  const int64_t size = sizeof(T), n = longest(p);
  const int64_t scan = (panels_of(p) * kPanel + p.dim + 2) * 16 * size + 2 * n * size;
  const int64_t lists = n * kStrips * (2 + 1 + static_cast<int64_t>(sizeof(int32_t)));
  const int64_t strips = 4 * kStrips * widest(p) * kStrip * size;
  const int64_t rows = (2 * stored_columns(p) + 4 * 1024) * kStrip * size;
  const int64_t thresholds = n * (3 * kStrips + 3 * kStrip * size);
  const int64_t blocks = lists + strips + (rows > thresholds ? rows : thresholds);
  return (scan > blocks ? scan : blocks) + 64 * 64;
}

template <class T>
int64_t panel_bytes(const Problem<T>& p) {
  return panels_of(p) * kPanel * p.dim * static_cast<int64_t>(sizeof(T));
}

template <class T>
void pack_panels(const Problem<T>& p, T* panels) {
  for (int64_t i = 0; i < panels_of(p); ++i) {
    const int64_t first = i * kPanel, rows = p.n_k - first < kPanel ? p.n_k - first : kPanel;
    pack(p.k + first * p.dim, rows, kPanel, p.dim, panels + first * p.dim);
  }
}

// Calls f(j, o) for every column j of the window around token i that is on the map, with its offset o.
template <class T, class F>
void for_window(const Problem<T>& p, int64_t i, const F& f) {
  const int64_t reach = p.window / 2, row = i / p.width, column = i % p.width;
  for (int64_t a = -reach; a <= reach; ++a) {
    if (row + a < 0 || row + a >= p.height) continue;
    for (int64_t b = -reach; b <= reach; ++b) {
      if (column + b < 0 || column + b >= p.width) continue;
      f((row + a) * p.width + column + b, (a + reach) * p.window + b + reach);
    }
  }
}

template <class T>
bool real(const bool* mask, int64_t i) {
  return mask == nullptr || mask[i];
}

constexpr double kInfinity = __builtin_inf();
template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(1.2e-7) : T(2.3e-16);

// ------------------------------------------------------------------------------------------------------------- scan

// The local block of row i from its scores s[j * 16]: u and the flags.
template <class T>
void scan_window(const Problem<T>& p, int64_t i, const T* s) {
  T largest = -kInfinity;
  int64_t count = 0;
  for_window(p, i, [&](int64_t j, int64_t) {
    if (!real<T>(p.real_k, j)) return;
    largest = s[j * 16] > largest ? s[j * 16] : largest;
    ++count;
  });
  bool* flags = p.local + i * p.window * p.window;
  for (int64_t o = 0; o < p.window * p.window; ++o) flags[o] = false;
  p.log_mean[i] = -kInfinity;
  if (!real<T>(p.real_q, i) || count == 0) return;
  double sum = 0;
  for_window(p, i, [&](int64_t j, int64_t) {
    if (real<T>(p.real_k, j)) sum += __builtin_exp(static_cast<double>(s[j * 16]) - largest);
  });
  p.log_mean[i] = largest + __builtin_log(sum / count);
  const T log_beta = __builtin_log(static_cast<double>(p.beta[i]));
  for_window(p, i, [&](int64_t j, int64_t o) {
    flags[o] = real<T>(p.real_k, j) && s[j * 16] - p.log_mean[i] > log_beta;
  });
}

// log(alpha_i / n): j is an adaptive neighbour if s_ij - lse_i exceeds it. In this order, for large scores would swallow it.
template <class T>
T log_multiplier(const Problem<T>& p, int64_t i) {
  if (p.alpha == nullptr) return -kInfinity;
  return __builtin_log(static_cast<double>(p.alpha[i])) - __builtin_log(static_cast<double>(p.n_real));
}

template <class T>
void scan(const Problem<T>& p, const T* panels, int64_t begin, int64_t end, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  T* const q = arena.take<T>(16 * p.dim);
  T* const s = arena.take<T>(panels_of(p) * kPanel * 16);
  T* const row = arena.take<T>(p.topk ? p.n_k : 0);
  T* const work = arena.take<T>(p.topk ? p.n_k : 0);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kScanRows, rows = p.n_q - first < 16 ? p.n_q - first : 16;
    pack(p.q + first * p.dim, rows, 16, p.dim, q);
    for (int64_t i = 0; i < panels_of(p); ++i) tile(q, panels + i * kPanel * p.dim, p.dim, s + i * kPanel * 16);
    if (p.real_k != nullptr)
      for (int64_t j = 0; j < p.n_k; ++j)
        if (!p.real_k[j]) {
          store(s + j * 16, splat(T(-kInfinity)));
          store(s + j * 16 + kStrip, splat(T(-kInfinity)));
        }

    for (int64_t half = 0; half < 16 && half < rows; half += kStrip) {
      const T* const x = s + half;
      const int64_t lanes = rows - half < kStrip ? rows - half : kStrip, i0 = first + half;
      Vec<T> largest[4] = {splat(T(-kInfinity)), splat(T(-kInfinity)), splat(T(-kInfinity)), splat(T(-kInfinity))};
      int64_t j = 0;
      for (; j + 4 <= p.n_k; j += 4)
        for (int c = 0; c < 4; ++c) largest[c] = maximum<T>(largest[c], load(x + (j + c) * 16));
      for (; j < p.n_k; ++j) largest[0] = maximum<T>(largest[0], load(x + j * 16));
      const Vec<T> m = maximum<T>(maximum<T>(largest[0], largest[1]), maximum<T>(largest[2], largest[3]));
      Vec<T> sum[4] = {};
      for (j = 0; j + 4 <= p.n_k; j += 4)
        for (int c = 0; c < 4; ++c) sum[c] += exp_nonpositive(load(x + (j + c) * 16) - m);
      for (; j < p.n_k; ++j) sum[0] += exp_nonpositive(load(x + j * 16) - m);
      const Vec<T> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);

      Vec<T> lse = {}, log_alpha = splat(T(kInfinity)), kappa = splat(T(-kInfinity));
      for (int64_t r = 0; r < lanes; ++r) {
        const int64_t i = i0 + r;
        p.lse[i] = m[r] == -kInfinity ? m[r] : T(m[r] + __builtin_log(static_cast<double>(total[r])));
        if (p.topk) {
          for (j = 0; j < p.n_k; ++j) row[j] = x[j * 16 + r];
          kappa[r] = p.kappa[i] = kth_largest(row, p.n_k, p.topk, work);
        }
        lse[r] = p.lse[i];
        if (real<T>(p.real_q, i)) log_alpha[r] = log_multiplier(p, i);
        if (p.beta != nullptr) scan_window(p, i, x + r);
      }
      if (p.thresholded) {
        uint8_t* const bits = p.bits + i0 / kStrip * p.stride_k;
        for (j = 0; j < p.n_k; ++j) {
          const Vec<T> y = load(x + j * 16);
          bits[j] = static_cast<uint8_t>(bits_of((y - lse > log_alpha) & (y >= kappa)));
        }
        for (; j < p.stride_k; ++j) bits[j] = 0;
      }
    }
    for (int64_t i = first; i < first + rows; ++i)
      if (!real<T>(p.real_q, i)) p.lse[i] = -kInfinity;
  }
}

// ------------------------------------------------------------------------------------------------------------ masks

// Transpose an 8 x 8 bit matrix: bit r of byte c to bit c of byte r.
ASA_INLINE uint64_t transpose8(uint64_t x) {
  uint64_t y = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
  x ^= y ^ (y << 7);
  y = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
  x ^= y ^ (y << 14);
  y = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
  return x ^ y ^ (y << 28);
}

// A^T of a block: m[strip][i] says for the eight keys of a strip of the block which of them query i has as a neighbour.
template <class T>
void transposed_bits(const Problem<T>& p, int64_t block, uint8_t* m, int64_t stride) {
  for (int64_t i = 0; i < p.stride_q; i += kStrip) {
    uint64_t word[kStrips] = {};
    if (i < p.n_q) __builtin_memcpy(word, p.bits + i / kStrip * p.stride_k + block * kBlockRows, sizeof(word));
    for (int64_t strip = 0; strip < kStrips; ++strip) word[strip] = transpose8(word[strip]);
    for (int64_t strip = 0; strip < kStrips; ++strip) __builtin_memcpy(m + strip * stride + i, word + strip, kStrip);
  }
}

// The adaptive neighbours of a block of queries as they were stored.
template <class T>
void stored_bits(const Problem<T>& p, int64_t block, uint8_t* m, int64_t stride) {
  for (int64_t strip = 0; strip < kStrips; ++strip) {
    const int64_t row = block * kStrips + strip;
    if (p.stride_k == 0) continue;
    if (row * kStrip < p.n_q)
      __builtin_memcpy(m + strip * stride, p.bits + row * p.stride_k, p.stride_k);
    else
      __builtin_memset(m + strip * stride, 0, p.stride_k);
  }
}

// M of a block: m[strip][other], rows of M for queries, columns of M for keys (`columns`).
template <class T>
void non_local(const Problem<T>& p, int64_t block, bool columns, uint8_t* m, uint8_t* spare, int64_t stride) {
  if (p.thresholded && p.reciprocal) {  // symmetric
    stored_bits(p, block, m, stride);
    transposed_bits(p, block, spare, stride);
    for (int64_t i = 0; i < kStrips * stride; ++i) m[i] &= spare[i];
  } else if (p.thresholded) {
    columns ? transposed_bits(p, block, m, stride) : stored_bits(p, block, m, stride);
  } else {
    const int64_t n = columns ? p.n_k : p.n_q, others = columns ? p.n_q : p.n_k;
    const bool *mine = columns ? p.real_k : p.real_q, *theirs = columns ? p.real_q : p.real_k;
    for (int64_t strip = 0; strip < kStrips; ++strip) {
      unsigned all = 0;
      for (int r = 0; r < kStrip; ++r) {
        const int64_t i = block * kBlockRows + strip * kStrip + r;
        if (p.beta == nullptr && i < n && real<T>(mine, i)) all |= 1u << r;
      }
      for (int64_t j = 0; j < stride; ++j)
        m[strip * stride + j] = static_cast<uint8_t>(j < others && real<T>(theirs, j) ? all : 0);
    }
  }
}

// Adds L of a block: l[strip][j] for its queries, or for its keys (`columns`).
template <class T>
void add_local(const Problem<T>& p, int64_t block, bool columns, uint8_t* l, int64_t stride) {
  if (p.beta == nullptr) return;
  const int64_t size = p.window * p.window;
  for (int64_t r = 0; r < kBlockRows; ++r) {
    const int64_t i = block * kBlockRows + r;
    if (i >= p.n_q) return;
    uint8_t* const strip = l + r / kStrip * stride;
    for_window(p, i, [&](int64_t j, int64_t o) {
      const bool flag = columns ? p.local[j * size + size - 1 - o] : p.local[i * size + o];
      strip[j] |= static_cast<uint8_t>(flag << r % kStrip);
    });
  }
}

// The columns with a bit set, ascending, and their bits.
int64_t list_columns(const uint8_t* m, int64_t stride, int32_t* list, uint8_t* bits) {
  int64_t count = 0;
  for (int64_t j = 0; j < stride; j += 8) {
    uint64_t word;
    __builtin_memcpy(&word, m + j, 8);
    while (word != 0) {
      const int byte = __builtin_ctzll(word) / 8;
      list[count] = static_cast<int32_t>(j + byte);
      bits[count++] = m[j + byte];
      word &= ~(0xFFull << 8 * byte);
    }
  }
  return count;
}

// The survivors of one block, as a list of columns for each of its strips, cut into chunks of columns so that the rows
// of a chunk, read by all strips one after the other, stay in the cache.
template <class T>
struct Workspace {
  Arena arena;
  int64_t others, stride;  // columns of a block of queries (keys), or of keys (`columns`: queries)
  bool columns;
  int64_t chunk;  // columns
  uint8_t *kept, *spare;
  int32_t* list[kStrips];
  uint8_t* bits[kStrips];
  int64_t count[kStrips];

  Workspace(const Problem<T>& p, bool columns, void* scratch)
      : arena{static_cast<char*>(scratch)},
        others(columns ? p.n_q : p.n_k),
        stride(columns ? p.stride_q : p.stride_k),
        columns(columns) {
    chunk = kCacheBytes / ((p.dim + p.dim_v + 1) * static_cast<int64_t>(sizeof(T)));
    chunk = chunk < 64 ? 64 : chunk > 1024 ? 1024 : chunk;
    kept = arena.take<uint8_t>(kStrips * stride);
    spare = arena.take<uint8_t>(kStrips * stride);
    for (int64_t i = 0; i < kStrips; ++i) list[i] = arena.take<int32_t>(stride), bits[i] = arena.take<uint8_t>(stride);
  }

  void find(const Problem<T>& p, int64_t block) {
    non_local(p, block, columns, kept, spare, stride);
    add_local(p, block, columns, kept, stride);
    for (int64_t i = 0; i < kStrips; ++i) count[i] = list_columns(kept + i * stride, stride, list[i], bits[i]);
  }

  // Calls f(strip, begin, end) for the part of every list within a chunk, chunk by chunk.
  template <class F>
  void for_chunks(const F& f) const {
    int64_t next[kStrips] = {};
    for (int64_t last = chunk; last < others + chunk; last += chunk)
      for (int64_t i = 0; i < kStrips; ++i) {
        const int64_t begin = next[i];
        while (next[i] < count[i] && list[i][next[i]] < last) ++next[i];
        if (next[i] > begin) f(i, begin, next[i]);
      }
  }
};

// Calls f(strip, first, lanes) for the strips of a block of `n` rows.
template <class F>
void for_strips(int64_t block, int64_t n, const F& f) {
  for (int64_t strip = 0; strip < kStrips; ++strip) {
    const int64_t first = block * kBlockRows + strip * kStrip;
    if (first < n) f(strip, first, n - first < kStrip ? n - first : int64_t{kStrip});
  }
}

// Writes sums[d][8], times a factor per lane, to rows [first, first + lanes) of x [n][dim].
template <class T>
void unpack(const T* sums, Vec<T> factor, int64_t first, int64_t lanes, int64_t dim, T* x) {
  for (int64_t r = 0; r < lanes; ++r)
    for (int64_t d = 0; d < dim; ++d) x[(first + r) * dim + d] = sums[d * kStrip + r] * factor[r];
}

// -------------------------------------------------------------------------------------------------------- aggregate

// The softmax of a strip while its scores come chunk by chunk.
template <class T>
struct Softmax {
  Vec<T> largest, sum;

  Softmax() : largest(splat(T(-kInfinity))), sum{} {}  // spelt out: an implicit one is not compiled for this target

  // Turns scores s[c][8] into exp(s - shift) where the bits say so, 0 elsewhere; the shift is at least their maximum.
  // Returns the factor by which sums made so far shrink, and whether it is 1 everywhere.
  Vec<T> add(T* s, const uint8_t* bits, int64_t count, bool& same) {
    Vec<T> m = largest;
    for (int64_t c = 0; c < count; ++c)
      m = maximum<T>(m, select<T>(lanes_of<T>(bits[c]), load(s + c * kStrip), splat(T(-kInfinity))));
    const Vec<T> shift = select<T>(m == splat(T(-kInfinity)), Vec<T>{}, m);  // a lane without survivors so far
    same = bits_of(m > largest) == 0;
    const Vec<T> factor = same ? splat(T(1)) : exp_nonpositive(largest - shift);
    Vec<T> part[4] = {};
    for (int64_t c = 0; c < count; ++c) {
      const Vec<T> p = select<T>(lanes_of<T>(bits[c]), exp_nonpositive(load(s + c * kStrip) - shift), Vec<T>{});
      part[c % 4] += p;
      store(s + c * kStrip, p);
    }
    sum = sum * factor + ((part[0] + part[1]) + (part[2] + part[3]));
    largest = m;
    return factor;
  }
};

template <class T>
void aggregate(const Problem<T>& p, int64_t begin, int64_t end, void* scratch) {
  Workspace<T> w(p, false, scratch);
  T *q[kStrips], *sums[kStrips];
  for (int64_t i = 0; i < kStrips; ++i) {
    q[i] = w.arena.template take<T>(p.dim * kStrip);
    sums[i] = w.arena.template take<T>(p.dim_v * kStrip);
  }
  T* const s = w.arena.template take<T>(w.chunk * kStrip);
  for (int64_t block = begin; block < end; ++block) {
    w.find(p, block);
    for_strips(block, p.n_q, [&](int64_t i, int64_t first, int64_t lanes) {
      pack(p.q + first * p.dim, lanes, kStrip, p.dim, q[i]);
      for (int64_t d = 0; d < p.dim_v; ++d) store(sums[i] + d * kStrip, Vec<T>{});
    });
    Softmax<T> softmax[kStrips];
    w.for_chunks([&](int64_t i, int64_t from, int64_t to) {
      dots(q[i], p.k, p.dim, w.list[i] + from, to - from, s);
      bool same;
      const Vec<T> factor = softmax[i].add(s, w.bits[i] + from, to - from, same);
      if (!same)
        for (int64_t d = 0; d < p.dim_v; ++d) store(sums[i] + d * kStrip, load(sums[i] + d * kStrip) * factor);
      accumulate(s, p.v, p.dim_v, w.list[i] + from, to - from, sums[i]);
    });
    for_strips(block, p.n_q, [&](int64_t i, int64_t first, int64_t lanes) {
      Ints<T> tally = {};
      for (int64_t c = 0; c < w.count[i]; ++c) tally -= lanes_of<T>(w.bits[i][c]);
      unsigned spoilt = 0;
      if (p.broken != nullptr)
        for (int64_t c = 0; c < w.count[i]; ++c) spoilt |= p.broken[w.list[i][c]] ? w.bits[i][c] : 0;
      Vec<T> factor = {};
      for (int64_t r = 0; r < lanes; ++r) {
        const int64_t row = first + r;
        const T sum = softmax[i].sum[r];
        p.survivors[row] = static_cast<int32_t>(tally[r]);
        p.lse_kept[row] = tally[r] ? T(softmax[i].largest[r] + __builtin_log(static_cast<double>(sum))) : T(-kInfinity);
        factor[r] = tally[r] ? 1 / sum : 0;
        const bool bad = (p.n_real > 0 && !__builtin_isfinite(p.lse[row])) || (p.alpha && !(p.alpha[row] >= 0)) ||
                         (p.beta && !(p.beta[row] >= 0));
        if ((bad && real<T>(p.real_q, row)) || (spoilt >> r & 1)) factor[r] = __builtin_nan("");
      }
      unpack(sums[i], factor, first, lanes, p.dim_v, p.out);
    });
  }
}

template <class T>
void list_survivors(const Problem<T>& p, const int64_t* offsets, int32_t* columns, int64_t begin, int64_t end, void* scratch) {
  Workspace<T> w(p, false, scratch);
  for (int64_t block = begin; block < end; ++block) {
    w.find(p, block);
    for_strips(block, p.n_q, [&](int64_t i, int64_t first, int64_t lanes) {
      for (int64_t r = 0; r < lanes; ++r) {
        int32_t* next = columns + offsets[first + r];
        for (int64_t c = 0; c < w.count[i]; ++c)
          if (w.bits[i][c] >> r & 1) *next++ = w.list[i][c];
      }
    });
  }
}

// --------------------------------------------------------------------------------------------------------- backward

// Two passes over a block's lists: the first takes the softmax and the mean of dp of every row, the second makes ds and
// dq. Scores and dp are stored between them if the lists are short, else computed again.
template <class T>
void backward_rows(const Problem<T>& p, int64_t begin, int64_t end, void* scratch) {
  Workspace<T> w(p, false, scratch);
  T *q[kStrips], *d_out[kStrips], *sums[kStrips];
  for (int64_t i = 0; i < kStrips; ++i) {
    q[i] = w.arena.template take<T>(p.dim * kStrip);
    d_out[i] = w.arena.template take<T>(p.dim_v * kStrip);
    sums[i] = w.arena.template take<T>(p.dim * kStrip);
  }
  const int64_t room = stored_columns(p) + w.chunk;
  T* const scores = w.arena.template take<T>(room * kStrip);
  T* const dps = w.arena.template take<T>(room * kStrip);
  T* const work = w.arena.template take<T>(w.chunk * kStrip);
  for (int64_t block = begin; block < end; ++block) {
    w.find(p, block);
    int64_t offset[kStrips], total = 0;
    for (int64_t i = 0; i < kStrips; ++i) offset[i] = total, total += w.count[i];
    const bool stored = total <= stored_columns(p);
    for_strips(block, p.n_q, [&](int64_t i, int64_t first, int64_t lanes) {
      pack(p.q + first * p.dim, lanes, kStrip, p.dim, q[i]);
      pack(p.d_out + first * p.dim_v, lanes, kStrip, p.dim_v, d_out[i]);
      for (int64_t d = 0; d < p.dim; ++d) store(sums[i] + d * kStrip, Vec<T>{});
    });
    const auto place = [&](int64_t i, int64_t from) { return stored ? (offset[i] + from) * kStrip : 0; };
    const auto products = [&](int64_t i, int64_t from, int64_t to) {
      dots(q[i], p.k, p.dim, w.list[i] + from, to - from, scores + place(i, from));
      dots(d_out[i], p.v, p.dim_v, w.list[i] + from, to - from, dps + place(i, from));
    };
    Softmax<T> softmax[kStrips];
    Vec<T> mean[kStrips] = {};
    w.for_chunks([&](int64_t i, int64_t from, int64_t to) {
      products(i, from, to);
      const T *s = scores + place(i, from), *dp = dps + place(i, from);
      for (int64_t c = 0; c < (to - from) * kStrip; c += kStrip) store(work + c, load(s + c));
      bool same;
      const Vec<T> shrink = softmax[i].add(work, w.bits[i] + from, to - from, same);
      Vec<T> part[4] = {};
      for (int64_t c = 0; c < to - from; ++c) part[c % 4] += load(work + c * kStrip) * load(dp + c * kStrip);
      mean[i] = mean[i] * shrink + ((part[0] + part[1]) + (part[2] + part[3]));
    });
    Vec<T> factor[kStrips];
    for (int64_t i = 0; i < kStrips; ++i) {
      factor[i] = select<T>(softmax[i].sum == Vec<T>{}, Vec<T>{}, 1 / softmax[i].sum);
      mean[i] *= factor[i];
    }
    w.for_chunks([&](int64_t i, int64_t from, int64_t to) {
      if (!stored) products(i, from, to);
      const T *s = scores + place(i, from), *dp = dps + place(i, from);
      for (int64_t c = from; c < to; ++c) {
        const int64_t x = (c - from) * kStrip;
        const Vec<T> ds = exp_nonpositive(load(s + x) - softmax[i].largest) * (load(dp + x) - mean[i]);
        store(work + x, select<T>(lanes_of<T>(w.bits[i][c]), ds, Vec<T>{}));
      }
      accumulate(work, p.k, p.dim, w.list[i] + from, to - from, sums[i]);
    });
    for_strips(block, p.n_q, [&](int64_t i, int64_t first, int64_t lanes) {
      unpack(sums[i], factor[i] * p.scale, first, lanes, p.dim, p.dq);
      for (int64_t r = 0; r < lanes; ++r) {
        p.row_max[first + r] = softmax[i].largest[r];
        p.row_factor[first + r] = factor[i][r];
        p.delta[first + r] = mean[i][r];
      }
    });
  }
}

template <class T>
void backward_columns(const Problem<T>& p, int64_t begin, int64_t end, void* scratch) {
  Workspace<T> w(p, true, scratch);
  T *k[kStrips], *v[kStrips], *dk[kStrips], *dv[kStrips];
  for (int64_t i = 0; i < kStrips; ++i) {
    k[i] = w.arena.template take<T>(p.dim * kStrip);
    v[i] = w.arena.template take<T>(p.dim_v * kStrip);
    dk[i] = w.arena.template take<T>(p.dim * kStrip);
    dv[i] = w.arena.template take<T>(p.dim_v * kStrip);
  }
  T* const a = w.arena.template take<T>(w.chunk * kStrip);
  T* const b = w.arena.template take<T>(w.chunk * kStrip);
  for (int64_t block = begin; block < end; ++block) {
    w.find(p, block);
    for_strips(block, p.n_k, [&](int64_t i, int64_t first, int64_t lanes) {
      pack(p.k + first * p.dim, lanes, kStrip, p.dim, k[i]);
      pack(p.v + first * p.dim_v, lanes, kStrip, p.dim_v, v[i]);
      for (int64_t d = 0; d < p.dim; ++d) store(dk[i] + d * kStrip, Vec<T>{});
      for (int64_t d = 0; d < p.dim_v; ++d) store(dv[i] + d * kStrip, Vec<T>{});
    });
    w.for_chunks([&](int64_t i, int64_t from, int64_t to) {
      const int32_t* const list = w.list[i] + from;
      dots(k[i], p.q, p.dim, list, to - from, a);
      dots(v[i], p.d_out, p.dim_v, list, to - from, b);
      for (int64_t c = 0; c < to - from; ++c) {
        const int64_t row = list[c];
        const Ints<T> kept = lanes_of<T>(w.bits[i][from + c]);
        const Vec<T> e = exp_nonpositive(load(a + c * kStrip) - p.row_max[row]) * p.row_factor[row];
        const Vec<T> ds = e * (load(b + c * kStrip) - p.delta[row]);
        store(a + c * kStrip, select<T>(kept, e, Vec<T>{}));
        store(b + c * kStrip, select<T>(kept, ds, Vec<T>{}));
      }
      accumulate(a, p.d_out, p.dim_v, list, to - from, dv[i]);
      accumulate(b, p.q, p.dim, list, to - from, dk[i]);
    });
    for_strips(block, p.n_k, [&](int64_t i, int64_t first, int64_t lanes) {
      unpack(dk[i], splat(T(1)), first, lanes, p.dim, p.dk);
      unpack(dv[i], splat(T(1)), first, lanes, p.dim_v, p.dv);
    });
  }
}

// c_ij times <do_i, v_j - out_i>: what admitting j to row i would change, to first order.
template <class T>
ASA_INLINE Vec<T> change(Vec<T> s, Vec<T> lse_kept, Ints<T> kept, Vec<T> dp) {
  const Vec<T> gap = s - lse_kept;
  // sigmoid(x) = e^-|x| / (1 + e^-|x|) for x < 0, its complement otherwise; e^x for survivors, whose gap is <= 0
  const Vec<T> small = exp_nonpositive(select<T>(gap < 0, gap, -gap));
  const Vec<T> sigmoid = select<T>(gap < 0, small, splat(T(1))) / (1 + small);
  const Vec<T> weight = select<T>(kept, select<T>(gap < 0, small, 1 / small), sigmoid);
  return select<T>(lse_kept == splat(T(-kInfinity)), dp, weight * dp);
}

// The straight-through gradients of alpha and beta (asa_ops/asa/__init__.py, "Gradients").
template <class T>
void backward_thresholds(const Problem<T>& p, int64_t begin, int64_t end, void* scratch) {
  Workspace<T> w(p, false, scratch);
  uint8_t* const local = w.arena.template take<uint8_t>(kStrips * w.stride);
  uint8_t* const local_back = w.arena.template take<uint8_t>(kStrips * w.stride);
  uint8_t* const back = w.arena.template take<uint8_t>(kStrips * w.stride);
  T* const strips[4] = {w.arena.template take<T>(p.dim * kStrip), w.arena.template take<T>(p.dim_v * kStrip),
                        w.arena.template take<T>(p.dim * kStrip), w.arena.template take<T>(p.dim_v * kStrip)};
  T* const a = w.arena.template take<T>(w.stride * kStrip);
  T* const b = w.arena.template take<T>(w.stride * kStrip);
  T* const c = w.arena.template take<T>(w.stride * kStrip);
  int32_t* const list = w.list[0];
  uint8_t* const bits = w.bits[0];
  for (int64_t block = begin; block < end; ++block) {
    non_local(p, block, false, w.kept, w.spare, w.stride);
    __builtin_memset(local, 0, kStrips * w.stride);
    __builtin_memset(local_back, 0, kStrips * w.stride);
    add_local(p, block, false, local, w.stride);
    add_local(p, block, true, local_back, w.stride);
    if (p.dalpha != nullptr && p.reciprocal) transposed_bits(p, block, back, w.stride);
    for_strips(block, p.n_q, [&](int64_t strip, int64_t first, int64_t lanes) {
      const uint8_t* const m = w.kept + strip * w.stride;
      const uint8_t* const adaptive = p.bits + first / kStrip * p.stride_k;
      const uint8_t* const l = local + strip * w.stride;
      const uint8_t* const l_back = local_back + strip * w.stride;
      Vec<T> lse = {}, log_alpha = splat(T(kInfinity)), kappa = splat(T(-kInfinity)), lse_kept = {}, delta = {};
      for (int64_t r = 0; r < lanes; ++r) {
        const int64_t i = first + r;
        lse[r] = p.lse[i];
        if (p.dalpha != nullptr && real<T>(p.real_q, i)) log_alpha[r] = log_multiplier(p, i);
        // These scores may differ from those of scan() in the last digits; what it kept stays kept (`adaptive` below).
        if (p.topk) kappa[r] = p.kappa[i] - 64 * kEpsilon<T> * __builtin_fabs(p.kappa[i]);
        lse_kept[r] = p.lse_kept[i];
        delta[r] = p.delta[i];
      }
      pack(p.q + first * p.dim, lanes, kStrip, p.dim, strips[0]);
      pack(p.d_out + first * p.dim_v, lanes, kStrip, p.dim_v, strips[1]);

      if (p.dalpha != nullptr) {
        int64_t count = 0;
        if (p.reciprocal) {
          count = list_columns(back + strip * w.stride, w.stride, list, bits);
        } else {
          for (int64_t j = 0; j < p.n_k; ++j)
            if (real<T>(p.real_k, j)) list[count] = static_cast<int32_t>(j), bits[count++] = 0xFF;
        }
        dots(strips[0], p.k, p.dim, list, count, a);
        int64_t near = 0;  // columns within the band of a threshold
        for (int64_t x = 0; x < count; ++x) {
          const Vec<T> s = load(a + x * kStrip), z = (s - lse) - log_alpha;
          const Vec<T> slope = (1 - select<T>(z < 0, -z, z) / p.band) / p.band;
          const Ints<T> reached = (s >= kappa) | lanes_of<T>(adaptive[list[x]]);
          const Ints<T> inside = (slope > 0) & reached & lanes_of<T>(bits[x]);
          if (bits_of(inside) == 0) continue;
          store(c + near * kStrip, select<T>(inside, slope, Vec<T>{}));
          store(a + near * kStrip, s);
          list[near++] = list[x];
        }
        dots(strips[1], p.v, p.dim_v, list, near, b);
        Vec<T> sum = {};
        for (int64_t x = 0; x < near; ++x) {
          const int32_t j = list[x];
          const Vec<T> g = change<T>(load(a + x * kStrip), lse_kept, lanes_of<T>(m[j] | l[j]), load(b + x * kStrip) - delta);
          const Ints<T> counts = ~lanes_of<T>(l[j]) & (load(c + x * kStrip) != 0);
          sum += select<T>(counts, load(c + x * kStrip) * g, Vec<T>{});
        }
        if (p.reciprocal) {
          pack(p.k + first * p.dim, lanes, kStrip, p.dim, strips[2]);
          pack(p.v + first * p.dim_v, lanes, kStrip, p.dim_v, strips[3]);
          dots(strips[2], p.q, p.dim, list, near, a);
          dots(strips[3], p.d_out, p.dim_v, list, near, b);
          for (int64_t x = 0; x < near; ++x) {
            const int32_t j = list[x];
            const Vec<T> g = change<T>(load(a + x * kStrip), splat(p.lse_kept[j]), lanes_of<T>(m[j] | l_back[j]),
                                       load(b + x * kStrip) - p.delta[j]);
            const Ints<T> counts = ~lanes_of<T>(l_back[j]) & (load(c + x * kStrip) != 0);
            sum += select<T>(counts, load(c + x * kStrip) * g, Vec<T>{});
          }
        }
        for (int64_t r = 0; r < lanes; ++r) {
          const int64_t i = first + r;
          if (real<T>(p.real_q, i)) p.dalpha[i] = p.alpha[i] == 0 ? 0 : -sum[r] / p.alpha[i];
        }
      }

      if (p.dbeta != nullptr) {
        Vec<T> sum = {};
        for (int64_t r = 0; r < lanes; ++r) {  // a window a row: its columns alone
          const int64_t i = first + r;
          if (!real<T>(p.real_q, i)) continue;
          int64_t count = 0;
          for_window(p, i, [&](int64_t j, int64_t) {
            if (real<T>(p.real_k, j) && !(m[j] >> r & 1)) list[count++] = static_cast<int32_t>(j);
          });
          dots(strips[0], p.k, p.dim, list, count, a);
          dots(strips[1], p.v, p.dim_v, list, count, b);
          const T log_beta = __builtin_log(static_cast<double>(p.beta[i]));
          for (int64_t x = 0; x < count; ++x) {
            const Vec<T> s = load(a + x * kStrip), z = (s - p.log_mean[i]) - log_beta;
            const Vec<T> slope = (1 - select<T>(z < 0, -z, z) / p.band) / p.band;
            const Vec<T> g = change<T>(s, lse_kept, lanes_of<T>(l[list[x]]), load(b + x * kStrip) - delta);
            sum += select<T>((slope > 0) & lanes_of<T>(1u << r), slope * g, Vec<T>{});
          }
          p.dbeta[i] = p.beta[i] == 0 ? 0 : -sum[r] / p.beta[i];
        }
      }
    });
  }
}

template <class T>
constexpr Kernels<T> kernels() {
  return {scratch_bytes<T>,  panel_bytes<T>,   pack_panels<T>,      scan<T>,               aggregate<T>,
          list_survivors<T>, backward_rows<T>, backward_columns<T>, backward_thresholds<T>};
}

}  // namespace

const Kernels<float> kFloat = kernels<float>();
const Kernels<double> kDouble = kernels<double>();

}  // namespace asa_ops::cpu::ASA_ISA
