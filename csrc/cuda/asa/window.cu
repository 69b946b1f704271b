// The columns of all survivors, row by row.

#include "rows.h"

namespace asa_ops::cuda {
namespace {

// Writes the columns of a row, ascending, from its offset on, and none of the next row or beyond all `columns`. A row a
// warp.
template <class T>
__global__ void __launch_bounds__(kThreads)
    asa_neighbors_kernel(Problem<T> p, Saved<T> saved, const int64_t* row_offsets, int32_t* col_indices,
                         int64_t columns) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  if (at.token < 0) return;
  const int lane = threadIdx.x % 32;
  const int64_t* const offset = row_offsets + row_at(at.z, p.rows.n, at.token);
  const int64_t end = offset[1] < columns ? offset[1] : columns;
  int64_t slot = offset[0] >= 0 ? offset[0] : end;
  for (int start = 0; start < p.keys.n; start += 32) {
    const int token = start + lane;
    const int j = token < p.keys.n ? p.keys.place[row_at(at.image, p.keys.n, token)] : -1;
    bool kept = j >= 0 && (p.has_bits ? survives(p, at.z, at.position, j) : p.window == 0);
    if (j >= 0 && !p.has_bits && p.window > 0) {
      const int offset = window_offset(p, at.token, token);
      kept = offset >= 0 && local_flag(p, saved.local, at.z, at.token, offset);
    }
    const unsigned votes = __ballot_sync(~0u, kept);
    const int64_t mine = slot + __popc(votes & first_bits(lane));
    if (kept && mine < end) col_indices[mine] = token;
    slot += __popc(votes);
  }
}

}  // namespace

template <class T>
void write_columns(const Problem<T>& problem, const Saved<T>& saved, const int64_t* row_offsets, int32_t* col_indices,
                   int64_t columns, cudaStream_t stream) {
  launch("asa_neighbors_kernel", &asa_neighbors_kernel<T>, row_programs(problem.n_heads, problem.rows), kThreads, 0,
         stream, problem, saved, row_offsets, col_indices, columns);
}

#define INSTANTIATE(T) \
  template void write_columns(const Problem<T>&, const Saved<T>&, const int64_t*, int32_t*, int64_t, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
