// The straight-through gradient of the adaptive threshold, over pairs outside the window.
//
// -dl/dt_i = sum_j d(s_ij - t_i) [s_ij >= kappa_i] A_ji [(1 - L_ij) G_ij + (1 - L_ji) G_ji], G = c (<do, v> - delta): both
// directions of a pair are laid out [i, j], four products a tile, two if neighbours need not be mutual. Pairs in the
// window, the only ones with L, are added where rows are finished.

#include "asa_tiles.h"

namespace asa_ops::cuda {
namespace {

constexpr int kStages = 3;

// Every gridDim.y-th listed block of a block of rows.
template <class T>
__global__ void __launch_bounds__(kThreads) asa_dt_kernel(Problem<T> p, Thresholds thresholds, Lists lists, RowGradients row, float band,
                                                          float* sums) {
  const int blocks = p.rows.blocks();
  const int z = blockIdx.x / blocks, block = blockIdx.x % blocks, image = image_of(z, p.heads, p.per_image);
  const int* const list = lists.lists + int64_t(blockIdx.x) * lists.others;
  const int length = lists.lengths[blockIdx.x], n_keys = p.keys.counts[image];
  const int64_t own = row_at(z, p.rows.padded, block * kBlock), keys = row_at(z, p.keys.padded, 0);
  const int32_t* const row_tokens = p.rows.order + row_at(image, p.rows.padded, block * kBlock);
  const int32_t* const key_tokens = p.keys.order + row_at(image, p.keys.padded, 0);
  const int chunks = chunks_of<T>(p.width), chunks_v = chunks_of<T>(p.width_v);
  const int one_way = chunks + chunks_v, steps = p.mutual ? 2 * one_way : one_way;  // of a tile
  const auto load = [&](int step, char* chunk) {
    const int turn = int(blockIdx.y) + step / steps * int(gridDim.y);
    if (turn >= length) return;
    const int64_t other = keys + int64_t(list[turn]) * kBlock;
    const bool back = step % steps >= one_way;
    const int index = step % one_way;
    if (index < chunks) {
      copy_chunk(chunk, (back ? p.k : p.q) + own * p.width, p.width, index);
      copy_chunk(chunk + kChunkBytes, (back ? p.q : p.k) + other * p.width, p.width, index);
    } else {
      copy_chunk(chunk, (back ? p.v : p.d_out) + own * p.width_v, p.width_v, index - chunks);
      copy_chunk(chunk + kChunkBytes, (back ? p.d_out : p.v) + other * p.width_v, p.width_v, index - chunks);
    }
  };
  Ring<kStages, 2 * kChunkBytes, decltype(load)> ring(shared_memory(), load);
  const Fragment at;
  const uint32_t* const words = p.words + z * p.words_stride;
  float sum[2] = {0, 0};

  for (int turn = blockIdx.y; turn < length; turn += gridDim.y) {
    const int j = list[turn];
    const int64_t other = keys + int64_t(j) * kBlock;
    uint32_t neighbours = neighbours_of_tile(words, p.rows.padded, block, j, {true, false}, at), counting = ~0u;
    if (p.mutual) {
      counting = neighbours_of_tile(words, p.rows.padded, block, j, {false, true}, at);
      neighbours &= counting;
    }
    Tile s, product;
    multiply_chunks<T>(s, ring, chunks);
    multiply_chunks<T>(product, ring, chunks_v);
    // s becomes the derivative of the step, 0 for pairs that do not count; product what they offer.
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int64_t i_row = own + at.row + 8 * high;
      const float lse2 = thresholds.lse2[i_row], cut2 = thresholds.cut2[i_row];
      const float kappa2 = thresholds.kappa2 != nullptr ? thresholds.kappa2[i_row] : -INFINITY;
      const float kept2 = row.kept2[i_row], delta = row.delta[i_row];
      const int token = row_tokens[at.row + 8 * high];
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * high; i < 2 * high + 2; ++i) {
          const int column = j * kBlock + at.column_of(n, i);
          bool counts = bit_of(counting, n, i) && column < n_keys;
          if (counts && p.window > 0) {
            const int key = key_tokens[column], reach = p.window / 2;
            counts = abs(token / p.grid_width - key / p.grid_width) > reach || abs(token % p.grid_width - key % p.grid_width) > reach;
          }
          const float s2 = s[n][i] * p.scale2;
          counts = counts && s2 >= kappa2;
          product[n][i] = admission_weight(s2 - kept2, bit_of(neighbours, n, i), kept2 == -INFINITY) * (product[n][i] - delta);
          s[n][i] = counts ? step_derivative((s2 - lse2 - cut2) * kLn2, band) : 0;
          if (!p.mutual) sum[high] += s[n][i] > 0 ? s[n][i] * product[n][i] : 0;
        }
    }
    if (p.mutual) {
      Tile back, back_v;
      multiply_chunks<T>(back, ring, chunks);
      multiply_chunks<T>(back_v, ring, chunks_v);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t column = other + at.column_of(n, i);
          const float kept2 = row.kept2[column];
          const float weight = admission_weight(back[n][i] * p.scale2 - kept2, bit_of(neighbours, n, i), kept2 == -INFINITY);
          const float offer = product[n][i] + weight * (back_v[n][i] - row.delta[column]);
          sum[i / 2] += s[n][i] > 0 ? s[n][i] * offer : 0;
        }
    }
  }
  ring.finish();
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const float all = sum_over_quad(sum[high]);
    if (threadIdx.x % 4 == 0) sums[int64_t(blockIdx.y) * p.zs * p.rows.padded + own + at.row + 8 * high] = all;
  }
}

}  // namespace

template <class T>
void sum_thresholds(const Problem<T>& problem, const Thresholds& thresholds, const Lists& lists, const RowGradients& row,
                    float band, const Parts& parts, cudaStream_t stream) {
  launch("asa_dt_kernel", &asa_dt_kernel<T>, dim3(problem.zs * problem.rows.blocks(), parts.splits), kThreads,
         kStages * 2 * kChunkBytes, stream, problem, thresholds, lists, row, band, parts.sums);
}

#define INSTANTIATE(T)                                                                                                          \
  template void sum_thresholds(const Problem<T>&, const Thresholds&, const Lists&, const RowGradients&, float, const Parts&, \
                               cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
