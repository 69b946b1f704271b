// Local survivors: the mean of every window, who survives in it, and the graph of all survivors.
//
// Pairs of a window are few and scattered, so they are taken one at a time by a warp, in plain float32 products.

#include "rows.h"

namespace asa_ops::cuda {
namespace {

// log_mean2_i = log2 mean exp2 s2_ij over the window of i; local survivors s2_ij - log_mean2_i > log2 beta_i. A row a
// warp. Scores are formed twice, so that a window of any size needs no memory.
template <class T>
__global__ void __launch_bounds__(kThreads)
    asa_window_kernel(Problem<T> p, PerHead<float> log_mean2, PerHead<uint8_t> local) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  if (at.token < 0) return;
  const Vector q = vector_at(p.q, at.index, p.width);
  // Calls use(offset, whether a token is there, score) for every offset of the window.
  const auto visit = [&](auto use) {
    visit_window(p, at, [&](int offset, int j) {
      use(offset, j >= 0,
          j < 0 ? -INFINITY : dot(q, vector_at(p.k, row_at(at.z, p.keys.padded, j), p.width)) * p.scale2);
    });
  };
  float largest = -INFINITY, total = 0;
  int members = 0, first = 0;  // offset of the largest
  visit([&](int offset, bool in_window, float s) {
    if (s > largest) first = offset;
    const float base = fmaxf(largest, s), finite = base == -INFINITY ? 0 : base;
    total = total * exp2f(largest - finite) + exp2f(s - finite);
    members += in_window;
    largest = base;
  });
  const float mean2 = largest + log2f(total) - log2f(float(members));
  const float beta = multiplier_at(p.beta, at.z, p.heads, at.token);
  const float cut = beta >= 0 ? log2f(beta) : NAN;
  const int lane = threadIdx.x % 32;
  if (lane == 0) log_mean2.of(at.z)[at.token] = mean2;
  uint8_t* const flags = local.of(at.z) + int64_t(at.token) * (p.window * p.window);
  visit([&](int offset, bool in_window, float s) {
    const float seen = offset == first ? largest : s;  // formed again, the largest might miss a cut that it exceeds
    if (lane == 0) flags[offset] = in_window && seen - mean2 > cut;
  });
}

// Writes the columns of a row, ascending, from its offset on, and none of the next row or beyond all `columns`. A row a
// warp.
template <class T>
__global__ void __launch_bounds__(kThreads)
    asa_neighbors_kernel(Problem<T> p, Saved<T> saved, const int64_t* row_offsets, int32_t* col_indices,
                         int64_t columns) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  if (at.token < 0) return;
  const int lane = threadIdx.x % 32, side = p.window, width = p.grid_width;
  const int64_t* const offset = row_offsets + row_at(at.z, p.rows.n, at.token);
  const int64_t end = offset[1] < columns ? offset[1] : columns;
  int64_t slot = offset[0] >= 0 ? offset[0] : end;
  for (int start = 0; start < p.keys.n; start += 32) {
    const int token = start + lane;
    const int j = token < p.keys.n ? p.keys.place[row_at(at.image, p.keys.n, token)] : -1;
    bool kept = j >= 0 && (p.words == nullptr ? false : bit_at(p, at.z, at.position, j));
    if (j >= 0 && !kept && side > 0) {
      const int r = token / width - at.token / width + side / 2, c = token % width - at.token % width + side / 2;
      kept = r >= 0 && r < side && c >= 0 && c < side && local_flag(p, saved.local, at.z, at.token, r * side + c);
    }
    const unsigned votes = __ballot_sync(~0u, kept);
    const int64_t mine = slot + __popc(votes & first_bits(lane));
    if (kept && mine < end) col_indices[mine] = token;
    slot += __popc(votes);
  }
}

}  // namespace

template <class T>
void find_local_survivors(const Problem<T>& problem, const Saved<T>& saved, cudaStream_t stream) {
  launch("asa_window_kernel", &asa_window_kernel<T>, row_programs(problem.n_heads, problem.rows), kThreads, 0, stream,
         problem, saved.log_mean2, saved.local);
}

template <class T>
void write_columns(const Problem<T>& problem, const Saved<T>& saved, const int64_t* row_offsets, int32_t* col_indices,
                   int64_t columns, cudaStream_t stream) {
  launch("asa_neighbors_kernel", &asa_neighbors_kernel<T>, row_programs(problem.n_heads, problem.rows), kThreads, 0,
         stream, problem, saved, row_offsets, col_indices, columns);
}

#define INSTANTIATE(T)                                                                  \
  template void find_local_survivors(const Problem<T>&, const Saved<T>&, cudaStream_t); \
  template void write_columns(const Problem<T>&, const Saved<T>&, const int64_t*, int32_t*, int64_t, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
