// The thresholds of a row in base 2: key j is a neighbour of it if s2 - lse2 > cut2 and s2 >= kappa2.

#pragma once

#include "problem.h"

namespace asa_ops::cuda {

struct RowThresholds {
  float lse2, cut2, kappa2;
};

// Of a row with that log-sum-exp; nobody passes those of token -1.
template <class T>
__device__ __forceinline__ RowThresholds thresholds_of(const Problem<T>& p, const Saved<T>& saved, int z, int token,
                                                       int n_keys, float lse2) {
  // Without alpha the cut is -inf, which differences of huge scores may reach.
  RowThresholds own{p.alpha.data == nullptr ? 0 : lse2, -INFINITY, -INFINITY};
  if (token < 0) {
    own.cut2 = INFINITY;
    return own;
  }
  if (p.alpha.data != nullptr) {
    const float alpha = multiplier_at(p.alpha, z, p.heads, token);
    own.cut2 = alpha >= 0 ? log2f(alpha) - log2f(float(n_keys)) : NAN;
  }
  if (p.topk > 0) own.kappa2 = saved.kappa2.of(z)[token];
  return own;
}

// Whether a row may have a neighbour in a block of keys, or a score within band2 of its threshold, by its peak there; or,
// by its floor and without a band, whether all of them are its neighbours.
__device__ __forceinline__ bool is_reached(const RowThresholds& row, float score, float band2) {
  return score - row.lse2 > row.cut2 - band2 && score >= row.kappa2;
}

}  // namespace asa_ops::cuda
