// The survivors of a forward pass as a graph in CSR form, tokens in raster order.

#include "asa_rows.h"

namespace asa_ops::cuda {
namespace {

// Writes the columns of a row, ascending, from its offset on. A row a warp.
template <class T>
__global__ void __launch_bounds__(kThreads) asa_neighbors_kernel(Problem<T> p, Saved<T> saved, const int64_t* row_offsets,
                                                                 int32_t* col_indices) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  if (at.token < 0) return;
  const int lane = threadIdx.x % 32, side = p.window, width = p.grid_width;
  int64_t slot = row_offsets[row_at(at.z, p.rows.n, at.token)];
  for (int start = 0; start < p.keys.n; start += 32) {
    const int token = start + lane;
    const int j = token < p.keys.n ? p.keys.place[row_at(at.image, p.keys.n, token)] : -1;
    bool kept = j >= 0 && (p.words == nullptr ? false : bit_at(p, at.z, at.position, j));
    if (j >= 0 && !kept && side > 0) {
      const int r = token / width - at.token / width + side / 2, c = token % width - at.token % width + side / 2;
      kept = r >= 0 && r < side && c >= 0 && c < side && local_flag(p, saved.local, at.z, at.token, r * side + c);
    }
    const unsigned votes = __ballot_sync(~0u, kept);
    if (kept) col_indices[slot + __popc(votes & first_bits(lane))] = token;
    slot += __popc(votes);
  }
}

}  // namespace

template <class T>
void write_columns(const Problem<T>& problem, const Saved<T>& saved, const int64_t* row_offsets, int32_t* col_indices,
                   cudaStream_t stream) {
  launch("asa_neighbors_kernel", &asa_neighbors_kernel<T>, row_programs(problem.zs, problem.rows), kThreads, 0, stream, problem, saved,
         row_offsets, col_indices);
}
template void write_columns(const Problem<Half>&, const Saved<Half>&, const int64_t*, int32_t*, cudaStream_t);
template void write_columns(const Problem<BFloat16>&, const Saved<BFloat16>&, const int64_t*, int32_t*, cudaStream_t);
template void write_columns(const Problem<float>&, const Saved<float>&, const int64_t*, int32_t*, cudaStream_t);

}  // namespace asa_ops::cuda
