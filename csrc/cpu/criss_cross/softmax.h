// The softmax over the keys of a line and its gradient, one query a lane.

// f(0) + f(1) + ..., in parts, which rounds less.
template <class T, class F>
ASA_INLINE Vec<T> sum_over(int64_t count, const F& f) {
  constexpr int64_t kPart = 16;
  Vec<T> sum = {};
  for (int64_t begin = 0; begin < count; begin += kPart) {
    Vec<T> part = {};
    for (int64_t j = begin; j < smaller(count, begin + kPart); ++j) part += f(j);
    sum += part;
  }
  return sum;
}

// Turns s[key][query] of a line, both in whole vectors, into exp(s - largest), where largest is that of a query over
// all keys; returns their sums. If all scores of a query are -inf, `largest` is -inf and the sum is not 0.
template <class T>
ASA_INLINE Vec<T> exponentials_of(T* s, int64_t keys, int64_t stride, Vec<T>& largest) {
  largest = splat(T(-kInfinity));
  for (int64_t j = 0; j < keys; ++j) largest = maximum(largest, load(s + j * stride));
  const Vec<T> shift = select<T>(largest == splat(T(-kInfinity)), Vec<T>{}, largest);
  return sum_over<T>(keys, [&](int64_t j) {
    const Vec<T> e = exponential(load(s + j * stride) - shift);
    store(s + j * stride, e);
    return e;
  });
}

// Turns s[key][query] of a line into probabilities, given the query's largest score and its sum, over row and column.
template <class T>
ASA_INLINE void probabilities(T* s, int64_t keys, int64_t stride, Vec<T> largest, Vec<T> total) {
  for (int64_t j = 0; j < keys; ++j) store(s + j * stride, exponential(load(s + j * stride) - largest) / total);
}

// The part of a line's keys in <do, out>: the sum of p dp. Formed from out it would differ from the p of the backward
// in the last digit, and these differences would add up.
template <class T>
ASA_INLINE Vec<T> mean_product(const T* p, const T* dp, int64_t keys, int64_t stride) {
  return sum_over<T>(keys, [&](int64_t j) { return load(p + j * stride) * load(dp + j * stride); });
}

// Turns dp[key][query] of a line into ds.
template <class T>
ASA_INLINE void score_gradients_of(const T* p, T* dp, int64_t keys, int64_t stride, Vec<T> delta) {
  for (int64_t j = 0; j < keys; ++j) store(dp + j * stride, load(p + j * stride) * (load(dp + j * stride) - delta));
}
