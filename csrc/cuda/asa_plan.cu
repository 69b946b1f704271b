// From block maxima of the scores to the tiles worth visiting: on the device, with fixed capacity, without a host sync.
//
// peaks[J, i] is at least the largest score that query i gives to the 64 keys of block J. A tile is active if some row's
// peak exceeds that row's threshold; if neighbours must be mutual, in both directions. What is left out holds no
// neighbour; what is visited in vain costs time only.

#include "asa_tiles.h"

namespace asa_ops::cuda {
namespace {

// Thresholds of a block of rows, and which blocks of keys they reach within band2.
template <class T>
__global__ void __launch_bounds__(kThreads, kPrograms) asa_thresholds_kernel(Problem<T> p, int splits, const float* largest, const float* total,
                                                                  Saved<T> saved, float band2, Thresholds thresholds) {
  struct Row {
    float lse2, cut2, kappa2;
  };
  Row* const rows = reinterpret_cast<Row*>(shared_memory());
  const int blocks = p.rows.blocks(), key_blocks = p.keys.blocks();
  const int z = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int image = image_of(z, p.heads, p.per_image), n_keys = p.keys.counts[image];
  if (threadIdx.x < kBlock) {
    const int position = block * kBlock + int(threadIdx.x);
    const int64_t row = row_at(z, p.rows.padded, position), all = int64_t(p.zs) * p.rows.padded;
    const int token = p.rows.order[row_at(image, p.rows.padded, position)];
    const int64_t saved_row = row_at(z, p.rows.n, token);
    float lse2 = 0, base = -INFINITY;
    if (splits > 0) {
      float sum = 0;
      for (int split = 0; split < splits; ++split) base = fmaxf(base, largest[split * all + row]);
      base = base == -INFINITY ? 0 : base;
      for (int split = 0; split < splits; ++split) {
        const float part = total[split * all + row];
        sum += part == 0 ? 0 : part * exp2f(largest[split * all + row] - base);
      }
      lse2 = base + log2f(sum);
      if (token >= 0) {
        saved.lse[saved_row] = lse2 * kLn2;
        if (saved.base2 != nullptr) saved.base2[int64_t(3 * z) * p.rows.n + token] = lse2;
      }
    } else if (token >= 0) {
      lse2 = saved.base2[int64_t(3 * z) * p.rows.n + token];
    }
    // Without alpha the cut is -inf, which differences of huge scores may reach.
    Row found{p.alpha.data == nullptr ? 0 : lse2, -INFINITY, -INFINITY};
    if (token < 0) {
      found.cut2 = INFINITY;
    } else if (p.alpha.data != nullptr) {
      const float alpha = multiplier_at(p.alpha, z, p.heads, token);
      found.cut2 = alpha >= 0 ? log2f(alpha) - log2f(float(n_keys)) : NAN;
    }
    if (thresholds.kappa2 != nullptr && token >= 0) found.kappa2 = saved.kappa2[saved_row];
    if (splits > 0) {
      // Pairs are decided by scores that are formed again: the largest may not miss a threshold that it exceeds.
      const float above = base - found.lse2;
      if (above > found.cut2) found.cut2 = fminf(found.cut2, above - last_bits(base));
      found.kappa2 = fminf(found.kappa2, base - last_bits(base));
    } else {
      found.kappa2 -= 2 * last_bits(found.kappa2);  // nor may a neighbour miss it here
    }
    rows[threadIdx.x] = found;
    if (p.has_bits) {
      thresholds.lse2[row] = found.lse2;
      thresholds.cut2[row] = found.cut2;
      if (thresholds.kappa2 != nullptr) thresholds.kappa2[row] = found.kappa2;
    }
  }
  if (!p.has_bits) return;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < key_blocks; j += kWarps) {
    bool reached = false;
    if (j * kBlock < n_keys)
      for (int i = lane; i < kBlock; i += 32) {
        const float peak = to_float(p.peaks[z * p.peaks_stride + int64_t(j) * p.rows.padded + block * kBlock + i]);
        reached |= peak - rows[i].lse2 > rows[i].cut2 - band2 && peak >= rows[i].kappa2;
      }
    reached = __any_sync(~0u, reached);
    if (lane == 0) thresholds.flags[(int64_t(z) * blocks + block) * key_blocks + j] = reached;
  }
}

// A tile a warp.
__global__ void __launch_bounds__(kThreads) asa_occupied_kernel(const uint32_t* words, int64_t stride, int zs, int row_blocks,
                                                                int key_blocks, uint8_t* flags) {
  const int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int z = int(tile / (row_blocks * key_blocks)), lane = threadIdx.x % 32;
  if (z >= zs) return;
  const int i = int(tile / key_blocks % row_blocks), j = int(tile % key_blocks), padded = row_blocks * kBlock;
  const uint32_t* const left = words + z * stride + int64_t(2 * j) * padded + i * kBlock + lane;
  const bool any = __any_sync(~0u, (left[0] | left[32] | left[padded] | left[padded + 32]) != 0);
  if (lane == 0) flags[tile] = any;
}

// The list of a block a warp.
__global__ void __launch_bounds__(kThreads) asa_lists_kernel(const uint8_t* by_rows, const uint8_t* by_columns, bool upper, int zs,
                                                             int blocks, Lists lists) {
  const int index = blockIdx.x * kWarps + int(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int z = index / blocks, i = index % blocks;
  if (z >= zs) return;
  const int64_t side = int64_t(z) * blocks * lists.others;
  int length = 0;
  for (int start = 0; start < lists.others; start += 32) {
    const int j = start + lane;
    bool active = j < lists.others && (!upper || j >= i);
    if (active && by_rows != nullptr) active = by_rows[side + int64_t(i) * lists.others + j] != 0;
    if (active && by_columns != nullptr) active = by_columns[side + int64_t(j) * blocks + i] != 0;
    const unsigned votes = __ballot_sync(~0u, active);
    if (active) lists.lists[int64_t(index) * lists.others + length + __popc(votes & first_bits(lane))] = j;
    length += __popc(votes);
  }
  if (lane == 0) lists.lengths[index] = length;
}

// A word of every row a program, everybody real kept.
template <class T>
__global__ void __launch_bounds__(kThreads) asa_everybody_kernel(Problem<T> p) {
  const int groups = p.keys.padded / 32;
  const int z = blockIdx.x / groups, group = blockIdx.x % groups;
  const int image = image_of(z, p.heads, p.per_image);
  const int n_rows = p.rows.counts[image], n_keys = p.keys.counts[image];
  for (int i = threadIdx.x; i < p.rows.padded; i += kThreads)
    p.words[z * p.words_stride + int64_t(group) * p.rows.padded + i] = i < n_rows ? first_bits(n_keys - 32 * group) : 0;
}

int programs_of(int64_t warps) { return int((warps + kWarps - 1) / kWarps); }

}  // namespace

template <class T>
void find_thresholds(const Problem<T>& problem, int splits, const float* largest, const float* total, const Saved<T>& saved,
                     float band2, const Thresholds& thresholds, cudaStream_t stream) {
  launch("asa_thresholds_kernel", &asa_thresholds_kernel<T>, dim3(problem.zs * problem.rows.blocks()), kThreads,
         kBlock * 3 * sizeof(float), stream, problem, splits, largest, total, saved, band2, thresholds);
}

template <class T>
void find_occupied(const Problem<T>& problem, uint8_t* flags, cudaStream_t stream) {
  const int row_blocks = problem.rows.blocks(), key_blocks = problem.keys.blocks();
  launch("asa_occupied_kernel", &asa_occupied_kernel, dim3(programs_of(int64_t(problem.zs) * row_blocks * key_blocks)), kThreads, 0,
         stream, problem.words, problem.words_stride, problem.zs, row_blocks, key_blocks, flags);
}

void list_blocks(const uint8_t* by_rows, const uint8_t* by_columns, bool upper, int zs, int blocks, const Lists& lists,
                 cudaStream_t stream) {
  launch("asa_lists_kernel", &asa_lists_kernel, dim3(programs_of(int64_t(zs) * blocks)), kThreads, 0, stream, by_rows, by_columns,
         upper, zs, blocks, lists);
}

template <class T>
void keep_everybody(const Problem<T>& problem, cudaStream_t stream) {
  launch("asa_everybody_kernel", &asa_everybody_kernel<T>, dim3(problem.zs * (problem.keys.padded / 32)), kThreads, 0, stream, problem);
}

#define INSTANTIATE(T)                                                                                                          \
  template void find_thresholds(const Problem<T>&, int, const float*, const float*, const Saved<T>&, float, const Thresholds&, \
                                cudaStream_t);                                                                                  \
  template void find_occupied(const Problem<T>&, uint8_t*, cudaStream_t);                                                       \
  template void keep_everybody(const Problem<T>&, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
