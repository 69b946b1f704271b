// The straight-through gradient of alpha.
//
// Block by block of 64 x 64 pairs, so that all that is read of them stays in the cache. What admitting j to row i changes, and
// with it i to row j, is the same for the thresholds of both, so that where neighbours must be mutual a pair of blocks is
// formed once.

template <class T>
T norm(const T* x, int64_t dim) {
  Vec<T> sum = {};
  for (int64_t d = 0; d < dim; d += kLanes<T>) sum += load(x + d) * load(x + d);
  return __builtin_sqrt(sum_of<T>(sum));
}

// Tokens as right factors: of every block its columns, [blocks][dim][kBlock], 0 beyond those there are.
template <class T>
void pack_blocks(const T* x, int64_t n, int64_t dim, T* blocks, Queue& queue) {
  for (int64_t block; queue.take(block);) {
    const int64_t first = block * kBlock, rows = smaller(kBlock, n - first);
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t d = 0; d < dim; ++d)
        blocks[first * dim + d * kBlock + r] = r < rows ? x[(first + r) * dim + d] : T(0);
  }
}

template <class T>
struct AlphaScratch {
  T *q, *k, *v, *d_out;  // [kBlock][dim] of the rows, q and k scaled
  // Of pairs: s_ij, s_ji, the derivatives of the steps at the thresholds of i and of j, dp_ij, dp_ji.
  T *s, *s_back, *slope, *slope_back, *dp, *dp_back;

  AlphaScratch(Arena& arena, const Problem<T>& p)
      : q(arena.take<T>(kBlock * p.dim)),
        k(arena.take<T>(kBlock * p.dim)),
        v(arena.take<T>(kBlock * p.dim_v)),
        d_out(arena.take<T>(kBlock * p.dim_v)),
        s(of_pairs(arena)),
        s_back(of_pairs(arena)),
        slope(of_pairs(arena)),
        slope_back(of_pairs(arena)),
        dp(of_pairs(arena)),
        dp_back(of_pairs(arena)) {}

  static T* of_pairs(Arena& arena) { return arena.take<T>(kBlock * kBlock); }
};

template <class T>
int64_t backward_alpha_bytes(const Problem<T>& p) {
  return bytes_of<AlphaScratch>(p);
}

// The pairs of a block of tokens i and one of tokens j: all of them, [kBlock][kBlock], or, where few count, a list.
template <class T>
class Pairs {
 public:
  Pairs(const Problem<T>& p, const AlphaPairs<T>& pairs, const AlphaScratch<T>& w) : p_(p), pairs_(pairs), w_(w) {}

  // Adds what concerns alpha_i to ahead[i], alpha_j to behind[j]; null: it is not asked for, and the other sums are the
  // same to the last bit.
  void sum(int64_t block, int64_t other, T* ahead, T* behind) {
    if (!find(block, other)) return;
    Words wanted;
    int64_t count = 0;
    for (int64_t r = 0; r < kBlock; ++r) count += __builtin_popcountll(ahead_[r] | behind_[r]);
    if (ahead == nullptr) clear(ahead_);
    if (behind == nullptr) clear(behind_);
    for (int64_t r = 0; r < kBlock; ++r) wanted[r] = ahead_[r] | behind_[r];
    take_rows(block);
    take_columns(other, behind != nullptr);
    // Small problems are formed as scan() does, but for AMX: of a pair that is nearly all of its row s - lse is then exact.
    listed_ = count <= kMostListed && !p_.is_one_block();
    if (listed_) list(wanted);
    const int64_t keys = other * kBlock * p_.dim, values = other * kBlock * p_.dim_v;
    form(wanted, w_.q, p_.k + keys, pairs_.k + keys, p_.dim, w_.s);
    if (p_.reciprocal) form(wanted, w_.k, p_.q + keys, pairs_.q + keys, p_.dim, w_.s_back);
    find_slopes(wanted);
    form(wanted, w_.d_out, p_.v + values, pairs_.v + values, p_.dim_v, w_.dp);
    if (p_.reciprocal) form(wanted, w_.v, p_.d_out + values, pairs_.d_out + values, p_.dim_v, w_.dp_back);
    add_changes(wanted, ahead, behind);
  }

 private:
  // Where more count, products of whole rows take less time.
  static constexpr int64_t kMostListed = kBlock * kBlock / 4;
  using Words = uint64_t[kBlock];  // a bit for every pair

  static void clear(Words& words) {
    for (uint64_t& x : words) x = 0;
  }

  // A of a block of queries and a block of keys, one of which is of the rows of the problem.
  void neighbours(int64_t queries, int64_t keys, uint64_t* words) const {
    const uint64_t* const from = p_.has_block(queries) ? p_.words(queries, keys) : p_.words_back(keys, queries);
    __builtin_memcpy(words, from, sizeof(Words));
  }

  // Finds the pairs that a threshold decides, of tokens that are not extra; whether there are any.
  bool find(int64_t block, int64_t other) {
    const uint64_t columns = ~lowest_bits(p_.extra - other * kBlock), rows = ~lowest_bits(p_.extra - block * kBlock);
    const uint64_t learning = pairs_.learns[block], others_learning = p_.reciprocal ? pairs_.learns[other] : 0;
    uint64_t any = 0;
    if (p_.reciprocal) {
      neighbours(other, block, ahead_), transpose64(ahead_);
      neighbours(block, other, behind_);
    } else {
      neighbours(block, other, kept_), clear(behind_);
      const uint64_t keys = real_keys(p_, other);
      for (uint64_t& x : ahead_) x = keys;
    }
    for (int64_t r = 0; r < kBlock; ++r) {
      if (p_.reciprocal) kept_[r] = ahead_[r] & behind_[r];
      ahead_[r] &= learning >> r & 1 ? columns : 0;
      behind_[r] &= rows >> r & 1 ? others_learning : 0;
      any |= ahead_[r] | behind_[r];
    }
    if (any == 0) return false;
    // Local survivors do not depend on alpha.
    clear(local_), clear(local_back_);
    const int64_t apart = (block < other ? other - block : block - other) * kBlock - kBlock + 1;
    const int64_t reach = (p_.window[0] / 2 * p_.height + p_.window[1] / 2) * p_.width + p_.window[2] / 2;
    near_ = p_.positions > 0 && apart <= reach;
    if (!near_) return true;
    Problem<T> part = p_;
    part.first_key = other * kBlock, part.n_k = smaller(kBlock, p_.n_k - part.first_key), part.blocks_k = 1;
    add_local(part, block, false, local_);
    if (p_.reciprocal) add_local(part, block, true, local_back_);
    for (int64_t r = 0; r < kBlock; ++r) {
      const uint64_t fixed = p_.reciprocal ? local_[r] & local_back_[r] : local_[r];
      ahead_[r] &= ~fixed, behind_[r] &= ~fixed;
    }
    return true;
  }

  void take_rows(int64_t block) {
    if (block == block_) return;
    block_ = block;
    const int64_t first = block * kBlock, count = smaller(kBlock, p_.n_q - first);
    const auto take = [&](const T* x, int64_t dim, T factor, T* to) {
      scale_row(x + first * dim, count * dim, factor, to);
      for (int64_t d = count * dim; d < kBlock * dim; d += kLanes<T>) store(to + d, Vec<T>{});
    };
    take(p_.q, p_.dim, p_.scale, w_.q);
    take(p_.d_out, p_.dim_v, T(1), w_.d_out);
    if (p_.reciprocal) take(p_.k, p_.dim, p_.scale, w_.k), take(p_.v, p_.dim_v, T(1), w_.v);
    rows_.take(p_, first, count, p_.has_block(block));
  }

  void take_columns(int64_t other, bool thresholds) {
    columns_.take(p_, other * kBlock, smaller(kBlock, p_.n_k - other * kBlock), thresholds);
  }

  // Of a block of tokens; of thresholds where they are asked for, the last three with top-k.
  struct Numbers {
    Column<T> log_alpha{0};
    T lse[kBlock], lse_kept[kBlock], delta[kBlock];
    T kappa[kBlock], q_norm[kBlock], k_norm[kBlock];

    void take(const Problem<T>& p, int64_t first, int64_t count, bool thresholds) {
      const bool queries = p.reciprocal || thresholds, keys = p.reciprocal || !thresholds;
      if (thresholds) log_alpha = log_multipliers(p, first, count);
      for (int64_t c = 0; c < kBlock; ++c) {
        const int64_t i = first + c;
        const bool query = queries && c < count, threshold = thresholds && c < count;
        lse_kept[c] = query ? p.lse_kept[i] : T(0);
        delta[c] = query ? p.delta[i] : T(0);
        lse[c] = threshold ? p.lse[i] : T(0);
        if (!p.topk) continue;
        kappa[c] = threshold ? p.kappa[i] : T(0);
        q_norm[c] = query ? norm(p.q + i * p.dim, p.dim) : T(0);
        k_norm[c] = keys && c < count ? norm(p.k + i * p.dim, p.dim) : T(0);
      }
    }
  };

  // The wanted pairs become a list, in their order.
  void list(Words& wanted) {
    count_ = 0;
    for (int64_t r = 0; r < kBlock; ++r) {
      const int64_t end = list_bits(wanted + r, 1, 0, column_ + count_) - column_;
      for (; count_ < end; ++count_) row_[count_] = static_cast<int32_t>(r);
    }
    for (int64_t x = count_; x < rounded_up(count_, kPad); ++x) row_[x] = column_[x] = 0;
    const auto compress = [&](Words& words) {
      Words listed = {};
      for (int64_t x = 0; x < count_; ++x) listed[x / kBlock] |= (words[row_[x]] >> column_[x] & 1) << x % kBlock;
      __builtin_memcpy(words, listed, sizeof(Words));
    };
    compress(ahead_), compress(behind_), compress(kept_);
    if (near_) compress(local_), compress(local_back_);
    for (int64_t x = 0; x < kBlock; ++x) wanted[x] = lowest_bits(count_ - x * kBlock);
  }

  // x = the products of rows with tokens of the other block, of the wanted pairs at least.
  void form(const Words& wanted, const T* rows, const T* tokens, const T* by_columns, int64_t dim, T* x) const {
    if (listed_) {
      for (int64_t from = 0, to; from < count_; from = to) {
        bool any = false;
        for (to = from; to < count_ && row_[to] == row_[from]; ++to) any |= wanted[to / kBlock] >> to % kBlock & 1;
        if (!any) continue;
        dots(rows + row_[from] * dim, tokens, dim, column_ + from, to - from, x + from);
      }
      return;
    }
    for (int64_t r = 0; r < kBlock; r += kRows) {
      uint64_t any = 0;
      for (int64_t y = r; y < r + kRows; ++y) any |= wanted[y];
      if (any == 0) continue;
      for (int64_t c = 0; c < kRows * kBlock; c += kLanes<T>) store(x + r * kBlock + c, Vec<T>{});
      add_product<Left::by_row>(rows + r * dim, dim, Consecutive<T>{by_columns, kBlock}, dim, kBlock, x + r * kBlock);
    }
  }

  // Calls f(place, bits) for every vector of pairs of which some are wanted.
  template <class F>
  static void for_vectors(const Words& wanted, const F& f) {
    constexpr uint64_t kAll = (uint64_t{1} << kLanes<T>)-1;
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t c = 0; wanted[r] != 0 && c < kBlock; c += kLanes<T>)
        if (const uint64_t bits = wanted[r] >> c & kAll) f(r * kBlock + c, bits);
  }

  // Numbers of the tokens i, or j, of the pairs of a vector.
  Vec<T> of_rows(const T* x, int64_t at) const { return listed_ ? gathered(x, row_ + at) : splat(x[at / kBlock]); }
  Vec<T> of_columns(const T* x, int64_t at) const {
    return listed_ ? gathered(x, column_ + at) : load(x + at % kBlock);
  }
  static Vec<T> gathered(const T* x, const int32_t* list) {
    Vec<T> y;
    for (int64_t l = 0; l < kLanes<T>; ++l) y[l] = x[list[l]];
    return y;
  }

  // The slopes of the thresholds at the wanted pairs; of these those in a band remain.
  void find_slopes(Words& wanted) const {
    // These scores may differ from those of scan() in the last digits: the k-th largest itself must not fall below kappa.
    const T rounding = 16 * kEpsilon<T> * (p_.scale < 0 ? -p_.scale : p_.scale);
    const auto slopes = [&](Vec<T> s, Vec<T> lse, Vec<T> log_alpha, Vec<T> least, uint64_t bits, T* slope) {
      const Vec<T> z = (s - lse) - log_alpha;
      bits &= greater(splat(p_.band), z) & greater(z, splat(-p_.band));
      if (p_.topk) bits &= at_least(s, least);
      store(slope, choose(bits, slope_at(p_, z), Vec<T>{}));
      return bits;
    };
    Words found = {};
    for_vectors(wanted, [&](int64_t at, uint64_t) {
      const Numbers &i = rows_, &j = columns_;
      Vec<T> least = {};
      if (p_.topk) least = of_rows(i.kappa, at) - rounding * of_rows(i.q_norm, at) * of_columns(j.k_norm, at);
      uint64_t bits = slopes(load(w_.s + at), of_rows(i.lse, at), of_rows(i.log_alpha.numbers, at), least,
                             lane_bits<T>(ahead_, at), w_.slope + at);
      if (p_.reciprocal) {
        if (p_.topk) least = of_columns(j.kappa, at) - rounding * of_columns(j.q_norm, at) * of_rows(i.k_norm, at);
        bits |= slopes(load(w_.s_back + at), of_columns(j.lse, at), of_columns(j.log_alpha.numbers, at), least,
                       lane_bits<T>(behind_, at), w_.slope_back + at);
      }
      found[at / kBlock] |= bits << at % kBlock;
    });
    __builtin_memcpy(wanted, found, sizeof(found));
  }

  void add_changes(const Words& wanted, T* ahead, T* behind) const {
    const Vec<T> one = splat(T(1)), zero = {};
    Vec<T> sum = {};
    int64_t row = 0;
    const auto end_row = [&](int64_t next) {
      if (ahead != nullptr) ahead[row] += sum_of<T>(sum);
      sum = zero, row = next;
    };
    for_vectors(wanted, [&](int64_t at, uint64_t bits) {
      const auto changes = [&](const T* s, Vec<T> lse_kept, const T* dp, Vec<T> delta, const Words& local) {
        const Ints<T> kept = choose(lane_bits<T>(kept_, at), one, zero) != 0;
        return choose(bits & ~lane_bits<T>(local, at), change<T>(load(s + at), lse_kept, kept, load(dp + at) - delta),
                      zero);
      };
      const Numbers &i = rows_, &j = columns_;
      Vec<T> g = changes(w_.s, of_rows(i.lse_kept, at), w_.dp, of_rows(i.delta, at), local_);
      if (p_.reciprocal)
        g += changes(w_.s_back, of_columns(j.lse_kept, at), w_.dp_back, of_columns(j.delta, at), local_back_);
      const auto times_slope = [&](const T* slope) {
        const Vec<T> y = load(slope + at);
        return select<T>(y != 0, y * g, zero);
      };
      const Vec<T> x = times_slope(w_.slope), y = behind != nullptr ? times_slope(w_.slope_back) : zero;
      if (listed_) {
        for (int64_t l = 0; l < smaller(kLanes<T>, count_ - at); ++l) {
          if (ahead != nullptr) ahead[row_[at + l]] += x[l];
          if (behind != nullptr) behind[column_[at + l]] += y[l];
        }
        return;
      }
      if (at / kBlock != row) end_row(at / kBlock);
      sum += x;
      if (behind != nullptr) store(behind + at % kBlock, load(behind + at % kBlock) + y);
    });
    if (!listed_) end_row(0);
  }

  const Problem<T>& p_;
  const AlphaPairs<T>& pairs_;
  const AlphaScratch<T>& w_;
  int64_t block_ = -1;  // whose rows are at hand
  // Whether a pair may count for alpha_i, for alpha_j, is mutual, local to i, local to j.
  alignas(64) Words ahead_, behind_, kept_, local_, local_back_;
  bool listed_ = false, near_ = false;
  int64_t count_ = 0;  // in the list, of the row and column of each
  int32_t row_[kMostListed + 2 * kPad], column_[kMostListed + 2 * kPad];
  Numbers rows_, columns_;
};

template <class T>
void backward_alpha(const Problem<T>& p, const AlphaPairs<T>& pairs, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const AlphaScratch<T> w(arena, p);
  Pairs<T> of_blocks(p, pairs, w);
  const auto sums = [&](T* x, int64_t block, int64_t distance) {
    return x + (distance - pairs.first) * rounded_up(p.end - p.begin, kBlock) + block * kBlock - p.begin;
  };
  for (int64_t block; queue.take(block);)
    for (int64_t d = pairs.first; d < pairs.last; ++d) {
      T *const ahead = sums(pairs.ahead, block, d), *const behind = sums(pairs.behind, block, d);
      if (!p.reciprocal || d == 0) {
        of_blocks.sum(block, p.reciprocal ? block : d, ahead, nullptr);
        continue;
      }
      const int64_t next = (block + d) % p.blocks_q, before = (block + p.blocks_q - d) % p.blocks_q;
      const bool opposite = 2 * d == p.blocks_q;  // then both are the same
      if (!opposite || block < next)
        of_blocks.sum(block, next, ahead, p.has_block(next) ? sums(pairs.behind, next, d) : nullptr);
      if ((!opposite || before < block) && !p.has_block(before)) of_blocks.sum(before, block, nullptr, behind);
    }
}
