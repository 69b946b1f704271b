// Every score once: what a row must know before its neighbours can be decided.

#include "asa_tiles.h"

namespace asa_ops::cuda {
namespace {

constexpr int kStages = 3;

// Maximum and sum of exponentials of every row over each `splits`-th block of keys, axis 1 of the grid, and peaks.
template <class T>
__global__ void __launch_bounds__(kThreads) asa_statistics_kernel(Problem<T> p, int splits, float* largest, float* total) {
  const int blocks = p.rows.blocks();
  const int z = blockIdx.x / blocks, block = blockIdx.x % blocks, split = blockIdx.y;
  const int n_keys = p.keys.counts[image_of(z, p.heads, p.per_image)];
  const int chunks = chunks_of<T>(p.width);
  const T* const q = p.q + row_at(z, p.rows.padded, block * kBlock) * p.width;
  const T* const k = p.k + row_at(z, p.keys.padded, 0) * p.width;
  const auto load = [&](int step, char* chunk) {
    const int j = split + step / chunks * splits;
    if (j * kBlock >= n_keys) return;
    copy_chunk(chunk, k + int64_t(j) * kBlock * p.width, p.width, step % chunks);
  };
  copy_block(shared_memory(), q, p.width);
  copy_commit();
  Ring<kStages, kChunkBytes, decltype(load)> ring(shared_memory() + chunks * kChunkBytes, load);
  const Fragment at;
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of the thread's columns
  for (int j = split; j * kBlock < n_keys; j += splits) {
    Tile s;
    multiply_chunks<T>(s, ring, chunks, shared_memory());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float peak = -INFINITY;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = j * kBlock + at.column_of(n, i) < n_keys ? s[n][i] * p.scale2 : -INFINITY;
          peak = fmaxf(peak, s[n][i]);
        }
      const float base = fmaxf(high[half], peak), finite = base == -INFINITY ? 0 : base;
      sum[half] *= exp2f(high[half] - finite);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) sum[half] += exp2f(s[n][i] - finite);
      high[half] = base;
      if (p.has_bits) {
        peak = max_over_quad(peak);
        // A little above, so that no tile is missed however another kernel's product rounds.
        if (threadIdx.x % 4 == 0)
          p.peaks[z * p.peaks_stride + int64_t(j) * p.rows.padded + block * kBlock + at.row + 8 * half] =
              half_above(peak + fabsf(peak) * 1e-4f + 1e-6f);
      }
    }
  }
  ring.finish();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float base = max_over_quad(high[half]), finite = base == -INFINITY ? 0 : base;
    const float all = sum_over_quad(sum[half] * exp2f(high[half] - finite));
    const int64_t row = int64_t(split) * p.zs * p.rows.padded + row_at(z, p.rows.padded, block * kBlock + at.row + 8 * half);
    if (threadIdx.x % 4 == 0) largest[row] = base, total[row] = all;
  }
}

}  // namespace

template <class T>
void find_statistics(const Problem<T>& problem, int splits, float* largest, float* total, cudaStream_t stream) {
  launch("asa_statistics_kernel", &asa_statistics_kernel<T>, dim3(problem.zs * problem.rows.blocks(), splits), kThreads,
         (chunks_of<T>(problem.width) + kStages) * kChunkBytes, stream, problem, splits, largest, total);
}
template void find_statistics(const Problem<Half>&, int, float*, float*, cudaStream_t);
template void find_statistics(const Problem<BFloat16>&, int, float*, float*, cudaStream_t);
template void find_statistics(const Problem<float>&, int, float*, float*, cudaStream_t);

}  // namespace asa_ops::cuda
