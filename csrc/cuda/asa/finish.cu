// Rows and columns ended, a warp each, in raster order: from the parts that tiles summed, or over survivors one by one.
//
// One by one, in plain float32 products, are taken those of a window without adaptive neighbours, and those of rows that
// keep few neighbours (rows.h): they are scattered.

#include "rows.h"

namespace asa_ops::cuda {
namespace {

// Output and statistics. Rows that are padding are not touched.
template <class T>
__global__ void __launch_bounds__(kThreads, kPrograms)
    asa_finish_out_kernel(Problem<T> p, Parts values, Totals totals, Saved<T> saved) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  if (at.token < 0) return;
  const int64_t rows = int64_t(p.n_heads) * p.rows.computed();
  Vector sum{};
  float largest = -INFINITY, total = 0;
  int count = 0;
  bool nan_row = false;
  for (int part = 0; part < values.splits; ++part) largest = fmaxf(largest, totals.largest[part * rows + at.computed]);
  for (int part = 0; part < values.splits; ++part) {
    const int64_t row = part * rows + at.computed;
    const float weight = exp2f(totals.largest[row] - (largest == -INFINITY ? 0 : largest));
    total += totals.total[row] * weight;
    count += totals.count[row];
    each_number(p.width_v, [&](int r, int d) { sum.x[r] = fmaf(weight, values.sums[row * p.width_v + d], sum.x[r]); });
  }
  const Vector q = vector_at(p.q, at.index, p.width);
  visit_keys(p, at, saved.local, [&](int j) {
    const int64_t key = row_at(at.z, p.keys.padded, j);
    const float s = dot(q, vector_at(p.k, key, p.width)) * p.scale2;
    const float base = fmaxf(largest, s), finite = base == -INFINITY ? 0 : base;
    const float shrink = exp2f(largest - finite), weight = exp2f(s - finite);
    scale(sum, shrink);
    add(sum, weight, vector_at(p.v, key, p.width_v));
    total = total * shrink + weight;
    largest = base;
    ++count;
    nan_row = nan_row || (p.not_finite[key / 32] >> key % 32 & 1);
  });

  const int64_t row = row_at(at.z, p.rows.n, at.token);
  // A row of scores with NaN or +inf has no softmax, a multiplier that is NaN or negative no threshold.
  const bool finite = fabsf(saved.lse[row]) < INFINITY;
  nan_row = nan_row || (p.keys.counts[at.image] > 0 && !finite);
  if (p.alpha.data != nullptr) nan_row = nan_row || !(multiplier_at(p.alpha, at.z, p.heads, at.token) >= 0);
  if (p.beta.data != nullptr) nan_row = nan_row || !(multiplier_at(p.beta, at.z, p.heads, at.token) >= 0);
  const bool empty = count == 0;
  if (empty) total = 1;
  each_number(p.dim_v, [&](int r, int d) {
    const float exact = nan_row ? NAN : empty ? 0 : sum.x[r] / total;
    const T rounded = from_float<T>(exact);
    saved.out[row * p.dim_v + d] = rounded;
    if (saved.residual.data != nullptr)
      saved.residual.of(at.z)[int64_t(at.token) * p.dim_v + d] = from_float<T>(exact - to_float(rounded));
  });
  if (threadIdx.x % 32 != 0) return;
  saved.lse_kept[row] = finite ? (largest + log2f(total)) * kLn2 : saved.lse[row];
  saved.survivors[row] = count;
  if (saved.base2.data != nullptr) {
    float* const base2 = saved.base2.of(at.z) + at.token;
    base2[p.rows.n] = largest;
    base2[2 * int64_t(p.rows.n)] = total;
  }
}

// delta is formed from the output, whose rounding reaches every pair of a row with the same sign. In float32 that is
// the largest error of the gradients where many survive; in half precisions it is below the rounding of the weights.
__global__ void __launch_bounds__(kThreads)
    asa_correct_delta_kernel(Problem<float> p, Saved<float> saved, RowGradients row, Parts errors) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  if (at.token < 0) return;
  const float delta = row.delta[at.index], top = row.grad_top[at.index], share = row.share[at.index];
  float error = number_of(errors, at.computed, int64_t(p.n_heads) * p.rows.computed());
  const Vector q = vector_at(p.q, at.index, p.width), d_out = vector_at(p.d_out, at.index, p.width_v);
  visit_keys(p, at, saved.local, [&](int j) {
    const int64_t key = row_at(at.z, p.keys.padded, j);
    const float weight = softmax_weight(dot(q, vector_at(p.k, key, p.width)) * p.scale2 - top, share);
    error += weight * (dot(d_out, vector_at(p.v, key, p.width_v)) - delta);
  });
  if (threadIdx.x % 32 == 0) row.delta[at.index] = delta + error;
}

// dq.
template <class T>
__global__ void __launch_bounds__(kThreads, kPrograms)
    asa_finish_dq_kernel(Problem<T> p, Saved<T> saved, RowGradients row, Parts sums, T* dq) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  if (at.token < 0) return;
  const int64_t rows = int64_t(p.n_heads) * p.rows.computed();
  Vector sum = sum_of(sums, at.computed, rows, p.width);
  scale(sum, 1 / shrink_of(p.bounds, p.n_heads, at.z));
  const Vector q = vector_at(p.q, at.index, p.width), d_out = vector_at(p.d_out, at.index, p.width_v);
  const float delta = row.delta[at.index], top = row.grad_top[at.index], share = row.share[at.index];
  visit_keys(p, at, saved.local, [&](int j) {
    const int64_t key = row_at(at.z, p.keys.padded, j);
    const Vector k = vector_at(p.k, key, p.width);
    const float weight = softmax_weight(dot(q, k) * p.scale2 - top, share);
    add(sum, weight * (dot(d_out, vector_at(p.v, key, p.width_v)) - delta), k);
  });
  const bool not_finite = row.not_finite_head[at.z] != 0;
  const int64_t saved_row = row_at(at.z, p.rows.n, at.token);
  each_number(p.dim,
              [&](int r, int d) { dq[saved_row * p.dim + d] = from_float<T>(not_finite ? NAN : sum.x[r] * p.scale); });
}

// dk and dv.
template <class T>
__global__ void __launch_bounds__(kThreads, kPrograms)
    asa_finish_dkv_kernel(Problem<T> p, Saved<T> saved, RowGradients row, Parts sums_k, Parts sums_v, T* dk, T* dv) {
  const WarpRow at(p.keys, p.heads, p.per_image);
  if (at.token < 0) return;
  const int64_t keys = int64_t(p.n_heads) * p.keys.computed();
  Vector sum_k = sum_of(sums_k, at.computed, keys, p.width), sum_v = sum_of(sums_v, at.computed, keys, p.width_v);
  scale(sum_k, 1 / shrink_of(p.bounds, p.n_heads, at.z));
  const Vector k = vector_at(p.k, at.index, p.width), v = vector_at(p.v, at.index, p.width_v);
  visit_queries(p, at, saved.local, [&](int i) {
    const int64_t query = row_at(at.z, p.rows.padded, i);
    const Vector q = vector_at(p.q, query, p.width), d_out = vector_at(p.d_out, query, p.width_v);
    const float s2 = dot(q, k) * p.scale2;
    add(sum_v, softmax_weight(s2 - row.top[query], row.share[query]), d_out);
    add(sum_k, softmax_weight(s2 - row.grad_top[query], row.share[query]) * (dot(d_out, v) - row.delta[query]), q);
  });
  const bool not_finite = row.not_finite_head[at.z] != 0;
  const int64_t saved_row = row_at(at.z, p.keys.n, at.token);
  each_number(
      p.dim, [&](int r, int d) { dk[saved_row * p.dim + d] = from_float<T>(not_finite ? NAN : sum_k.x[r] * p.scale); });
  each_number(p.dim_v,
              [&](int r, int d) { dv[saved_row * p.dim_v + d] = from_float<T>(not_finite ? NAN : sum_v.x[r]); });
}

}  // namespace

template <class T>
void finish_out(const Problem<T>& problem, const Parts& values, const Totals& totals, const Saved<T>& saved,
                cudaStream_t stream) {
  launch("asa_finish_out_kernel", &asa_finish_out_kernel<T>, row_programs(problem.n_heads, problem.rows), kThreads, 0,
         stream, problem, values, totals, saved);
}

void correct_delta(const Problem<float>& problem, const Saved<float>& saved, const RowGradients& row,
                   const Parts& errors, cudaStream_t stream) {
  launch("asa_correct_delta_kernel", &asa_correct_delta_kernel, row_programs(problem.n_heads, problem.rows), kThreads,
         0, stream, problem, saved, row, errors);
}

template <class T>
void finish_dq(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row, const Parts& sums, T* dq,
               cudaStream_t stream) {
  launch("asa_finish_dq_kernel", &asa_finish_dq_kernel<T>, row_programs(problem.n_heads, problem.rows), kThreads, 0,
         stream, problem, saved, row, sums, dq);
}

template <class T>
void finish_dkv(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row, const Parts& sums_k,
                const Parts& sums_v, T* dk, T* dv, cudaStream_t stream) {
  launch("asa_finish_dkv_kernel", &asa_finish_dkv_kernel<T>, row_programs(problem.n_heads, problem.keys), kThreads, 0,
         stream, problem, saved, row, sums_k, sums_v, dk, dv);
}

#define INSTANTIATE(T)                                                                                              \
  template void finish_out(const Problem<T>&, const Parts&, const Totals&, const Saved<T>&, cudaStream_t);          \
  template void finish_dq(const Problem<T>&, const Saved<T>&, const RowGradients&, const Parts&, T*, cudaStream_t); \
  template void finish_dkv(const Problem<T>&, const Saved<T>&, const RowGradients&, const Parts&, const Parts&, T*, \
                           T*, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
