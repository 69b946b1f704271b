// The straight-through gradients of thresholds (asa_ops/asa/__init__.py, "Gradients"): what alpha and beta have in common,
// and beta.

// c_ij times <do_i, v_j - out_i>: what admitting j to row i would change, to first order.
template <class T>
ASA_INLINE Vec<T> change(Vec<T> s, Vec<T> lse_kept, Ints<T> kept, Vec<T> dp) {
  const Vec<T> gap = s - lse_kept;
  // sigmoid(x) = e^-|x| / (1 + e^-|x|) for x < 0, its complement otherwise; e^x for survivors, whose gap is <= 0 but
  // for the last bits of a score that is formed again
  const Vec<T> small = exponential(select<T>(gap < 0, gap, -gap));
  const Vec<T> sigmoid = select<T>(gap < 0, small, splat(T(1))) / (1 + small);
  const Vec<T> weight = select<T>(kept, select<T>(gap < 0, small, splat(T(1))), sigmoid);
  return select<T>(lse_kept == splat(T(-kInfinity)), dp, weight * dp);
}

// The derivative of the step at a threshold: a triangle around it, of area 1, for z in the band.
template <class T>
ASA_INLINE Vec<T> slope_at(const Problem<T>& p, Vec<T> z) {
  return (1 - select<T>(z < 0, -z, z) / p.band) / p.band;
}

// s[c] = <x, rows[list[c]]>, terms added in the order of scan()'s products: but for AMX, of a pair that is nearly all of its window
// the difference to the logarithm of the mean is then exact. Writes whole vectors.
template <class T>
void dots_in_order(const T* x, const T* rows, int64_t dim, const int32_t* list, int64_t count, T* s) {
  for (int64_t c = 0; c < count; c += kLanes<T>) {
    const T* row[kLanes<T>];
    for (int64_t l = 0; l < kLanes<T>; ++l) row[l] = rows + list[smaller(c + l, count - 1)] * dim;
    Vec<T> sum = {};
    for (int64_t begin = 0; begin < dim; begin += kDepth) {
      Vec<T> part = {};
      for (int64_t d = begin; d < smaller(dim, begin + kDepth); ++d) {
        Vec<T> y;
        for (int64_t l = 0; l < kLanes<T>; ++l) y[l] = row[l][d];
        part += x[d] * y;
      }
      sum += part;
    }
    store(s + c, sum);
  }
}

template <class T>
struct BetaScratch {
  T* q;
  int32_t* list;
  T *s, *dp, *local;

  BetaScratch(Arena& arena, const Problem<T>& p)
      : q(arena.take<T>(p.dim)),
        list(arena.take<int32_t>(list_room(p.positions))),
        s(arena.take<T>(list_room(p.positions))),
        dp(arena.take<T>(list_room(p.positions))),
        local(arena.take<T>(list_room(p.positions))) {}
};

template <class T>
int64_t backward_beta_bytes(const Problem<T>& p) {
  return bytes_of<BetaScratch>(p);
}

template <class T>
void backward_beta(const Problem<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  const BetaScratch<T> w(arena, p);
  const auto bit = [](const uint64_t* words, int64_t r, int64_t c) { return words[r % kBlock] >> c % kBlock & 1; };
  const auto survives_anyway = [&](int64_t i, int64_t j) {
    const int64_t row = i / kBlock, column = j / kBlock;
    return p.thresholded && bit(p.words(row, column), i, j) && (!p.reciprocal || bit(p.words_back(row, column), j, i));
  };
  for (int64_t block; queue.take(block);)
    for (int64_t i = block * kBlock; i < smaller(p.n_q, (block + 1) * kBlock); ++i) {
      if (!real(p.real_q, i)) continue;
      p.dbeta[i] = 0;
      if (p.beta[i] < T(kLeastMultiplier)) continue;
      int64_t count = 0;
      for_window(p, i, [&](int64_t j, int64_t o) {
        if (!real(p.real_k, j) || survives_anyway(i, j)) return;
        w.local[count] = p.local[i * p.positions + o];
        w.list[count++] = static_cast<int32_t>(j);
      });
      scale_row(p.q + i * p.dim, p.dim, p.scale, w.q);
      dots_in_order(w.q, p.k, p.dim, w.list, count, w.s);
      dots(p.d_out + i * p.dim_v, p.v, p.dim_v, w.list, count, w.dp);
      for (int64_t c = count; c < rounded_up(count, kPad); ++c) w.s[c] = w.dp[c] = w.local[c] = 0;
      const T log_beta = __builtin_log(static_cast<double>(p.beta[i])), lse_kept = p.lse_kept[i], delta = p.delta[i];
      Vec<T> sum = {};
      for (int64_t c = 0; c < count; c += kLanes<T>) {
        const Vec<T> s = load(w.s + c), z = (s - p.log_mean[i]) - log_beta;
        const uint64_t inside =
            greater(splat(p.band), z) & greater(z, splat(-p.band)) & lowest_bits(smaller(kLanes<T>, count - c));
        const Vec<T> g = change<T>(s, splat(lse_kept), load(w.local + c) != 0, load(w.dp + c) - delta);
        sum += choose(inside, slope_at(p, z) * g, Vec<T>{});
      }
      p.dbeta[i] = -sum_of<T>(sum) / p.beta[i];
    }
}
