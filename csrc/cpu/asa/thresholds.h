// The straight-through gradients of alpha and beta (asa_ops/asa/__init__.py, "Gradients").

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

// Pairs with a score in the band around a threshold, as arrays.
template <class T>
struct Pairs {
  int32_t* list;
  T *s, *dp;
  T* slope;  // derivative of the step at the threshold
  T* kept;  // 1 if the pair survives
  T *lse_kept, *delta;  // of the pair's query
  int64_t count;

  Pairs(Arena& arena, int64_t most)
      : list(arena.take<int32_t>(most)),
        s(arena.take<T>(most)),
        dp(arena.take<T>(most)),
        slope(arena.take<T>(most)),
        kept(arena.take<T>(most)),
        lse_kept(arena.take<T>(most)),
        delta(arena.take<T>(most)) {}

  T sum_of_changes() const {
    for (int64_t c = count; c < rounded_up(count, kPad); ++c)
      s[c] = dp[c] = slope[c] = kept[c] = lse_kept[c] = delta[c] = 0;
    Vec<T> sum = {};
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      const Vec<T> g = change<T>(load(s + c), load(lse_kept + c), load(kept + c) != 0, load(dp + c) - load(delta + c));
      sum += select<T>(load(slope + c) != 0, load(slope + c) * g, Vec<T>{});
    }
    return sum_of<T>(sum);
  }
};

ASA_INLINE bool bit_at(const uint64_t* words, int64_t j) { return words[j / kBlock] >> j % kBlock & 1; }

// A triangle around the threshold, of area 1.
template <class T>
ASA_INLINE T slope_at(const Problem<T>& p, T z) {
  return (1 - (z < 0 ? -z : z) / p.band) / p.band;
}

template <class T>
T squared_norm(const T* x, int64_t dim) {
  Vec<T> sum = {};
  for (int64_t d = 0; d < dim; d += kLanes<T>) sum += load(x + d) * load(x + d);
  return sum_of<T>(sum);
}

template <class T>
struct ThresholdsScratch {
  uint64_t *m, *back, *local, *local_back;
  int32_t* list;
  T *s, *slope, *scaled;
  Pairs<T> in_band;

  ThresholdsScratch(Arena& arena, const Problem<T>& p)
      : m(arena.take<uint64_t>(kBlock * p.blocks_k)),
        back(arena.take<uint64_t>(kBlock * p.blocks_k)),
        local(arena.take<uint64_t>(kBlock * p.blocks_k)),
        local_back(arena.take<uint64_t>(kBlock * p.blocks_k)),
        list(arena.take<int32_t>(most(p))),
        s(arena.take<T>(most(p))),
        slope(arena.take<T>(most(p))),
        scaled(arena.take<T>(p.dim)),
        in_band(arena, most(p)) {}

  static int64_t most(const Problem<T>& p) { return list_room(p.blocks_k * kBlock); }
};

template <class T>
int64_t backward_thresholds_bytes(const Problem<T>& p) {
  return bytes_of<ThresholdsScratch>(p);
}

template <class T>
void backward_thresholds(const Problem<T>& p, Queue& queue, void* scratch) {
  Arena arena(scratch);
  ThresholdsScratch<T> w(arena, p);
  uint64_t *const m = w.m, *const back = w.back, *const local = w.local, *const local_back = w.local_back;
  int32_t* const list = w.list;
  T *const s = w.s, *const slope = w.slope;
  Pairs<T>& in_band = w.in_band;
  const auto scaled = [&](const T* x) {
    scale_row(x, p.dim, p.scale, w.scaled);
    return w.scaled;
  };

  const auto alpha_gradient = [&](int64_t i, int64_t r, T log_alpha) {
    const int64_t row = r * p.blocks_k;
    int64_t count = 0;
    if (p.reciprocal) {
      count = list_bits(back + row, p.blocks_k, 0, list) - list;
    } else {
      for (int64_t j = p.extra; j < p.n_k; ++j)
        if (real(p.real_k, j)) list[count++] = static_cast<int32_t>(j);
    }
    dots(scaled(p.q + i * p.dim), p.k, p.dim, list, count, s);
    for (int64_t c = count; c < rounded_up(count, kPad); ++c) s[c] = -kInfinity;
    // These scores may differ from those of scan() in the last digits: the k-th largest itself must not fall below
    // kappa.
    const auto among_the_largest = [&](T score, int64_t j) {
      if (!p.topk || score >= p.kappa[i]) return true;
      const T *const q = p.q + i * p.dim, *const k = p.k + j * p.dim;
      const T rounding = 16 * kEpsilon<T> * p.scale * __builtin_sqrt(squared_norm(q, p.dim) * squared_norm(k, p.dim));
      return score >= p.kappa[i] - __builtin_fabs(rounding);
    };
    in_band.count = 0;
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      const Vec<T> z = (load(s + c) - splat(p.lse[i])) - splat(log_alpha);
      const uint64_t inside = greater(splat(p.band), z) & greater(z, splat(-p.band));
      for_bits(&inside, 1, [&](int64_t lane) {
        const int64_t x = c + lane, j = list[x];
        if (!among_the_largest(s[x], j)) return;
        in_band.list[in_band.count] = static_cast<int32_t>(j);
        in_band.s[in_band.count] = s[x];
        slope[in_band.count++] = slope_at(p, T((s[x] - p.lse[i]) - log_alpha));
      });
    }
    dots(p.d_out + i * p.dim_v, p.v, p.dim_v, in_band.list, in_band.count, in_band.dp);
    for (int64_t c = 0; c < in_band.count; ++c) {
      const int64_t j = in_band.list[c];
      in_band.slope[c] = bit_at(local + row, j) ? T(0) : slope[c];  // local survivors do not depend on alpha
      in_band.kept[c] = bit_at(m + row, j);
      in_band.lse_kept[c] = p.lse_kept[i];
      in_band.delta[c] = p.delta[i];
    }
    T sum = in_band.sum_of_changes();
    if (p.reciprocal) {  // admitting j to row i may admit i to row j
      dots(scaled(p.k + i * p.dim), p.q, p.dim, in_band.list, in_band.count, in_band.s);
      dots(p.v + i * p.dim_v, p.d_out, p.dim_v, in_band.list, in_band.count, in_band.dp);
      for (int64_t c = 0; c < in_band.count; ++c) {
        const int64_t j = in_band.list[c];
        in_band.slope[c] = bit_at(local_back + row, j) ? T(0) : slope[c];
        in_band.kept[c] = bit_at(m + row, j);
        in_band.lse_kept[c] = p.lse_kept[j];
        in_band.delta[c] = p.delta[j];
      }
      sum += in_band.sum_of_changes();
    }
    p.dalpha[i] = p.alpha[i] < T(kLeastMultiplier) ? 0 : -sum / p.alpha[i];
  };

  const auto beta_gradient = [&](int64_t i, int64_t r) {
    const int64_t row = r * p.blocks_k;
    in_band.count = 0;
    for_window(p, i, [&](int64_t j, int64_t) {
      if (real(p.real_k, j) && !bit_at(m + row, j)) in_band.list[in_band.count++] = static_cast<int32_t>(j);
    });
    dots(scaled(p.q + i * p.dim), p.k, p.dim, in_band.list, in_band.count, in_band.s);
    dots(p.d_out + i * p.dim_v, p.v, p.dim_v, in_band.list, in_band.count, in_band.dp);
    const T log_beta = __builtin_log(static_cast<double>(p.beta[i]));
    for (int64_t c = 0; c < in_band.count; ++c) {
      const T slope = slope_at(p, T((in_band.s[c] - p.log_mean[i]) - log_beta));
      in_band.slope[c] = slope > 0 ? slope : T(0);
      in_band.kept[c] = bit_at(local + row, in_band.list[c]);
      in_band.lse_kept[c] = p.lse_kept[i];
      in_band.delta[c] = p.delta[i];
    }
    p.dbeta[i] = p.beta[i] < T(kLeastMultiplier) ? 0 : -in_band.sum_of_changes() / p.beta[i];
  };

  for (int64_t block; queue.take(block);) {
    for (int64_t x = 0; x < kBlock * p.blocks_k; ++x) local[x] = local_back[x] = 0;
    non_local(p, block, m);
    add_local(p, block, false, local);
    add_local(p, block, true, local_back);
    if (p.dalpha != nullptr && p.reciprocal) neighbors_back(p, block, back);
    for (int64_t r = 0; r < kBlock; ++r)  // whoever keeps extra tokens, thresholds are not why
      for (int64_t j = 0; j * kBlock < p.extra; ++j) back[r * p.blocks_k + j] &= ~lowest_bits(p.extra - j * kBlock);
    const int64_t rows = smaller(kBlock, p.n_q - block * kBlock);
    const Column<T> log_alphas = log_multipliers(p, block * kBlock, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = block * kBlock + r;
      if (!real(p.real_q, i)) continue;
      if (p.dalpha != nullptr) alpha_gradient(i, r, log_alphas[r]);
      if (p.dbeta != nullptr) beta_gradient(i, r);
    }
  }
}
