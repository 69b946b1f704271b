// Which tiles are visited, and which pairs are neighbours: on the device, with fixed capacity, without a host sync.
//
// peaks[J, i] is at least the largest score that query i gives to the 64 keys of block J. A tile is active if some
// row's peak exceeds that row's threshold; if neighbours must be mutual, in both directions. Tiles that are left out
// hold no neighbour; tiles that are visited in vain cost time only.
//
// asa_mask_kernel alone decides pairs: A_ij = [s2_ij - lse2_i > cut2_i] and [s2_ij >= kappa2_i]. If neighbours must be
// mutual, a second product laid out [i, j] gives s_ji for a tile (I, J) too (none if query is key), so that M = A_ij
// and A_ji; its bits are stored for the rows i and, transposed in shared memory, for the rows j. On the diagonal A_ji
// is the transpose of A_ij, so M is always symmetric.

#include "tiles.h"

namespace asa_ops::cuda {
namespace {

// Thresholds of a block of rows, and which blocks of keys they reach within band2.
template <class T>
__global__ void __launch_bounds__(kThreads, kPrograms)
    asa_thresholds_kernel(Problem<T> p, int splits, const float* largest, const float* total, Saved<T> saved,
                          float band2, Thresholds thresholds) {
  struct Row {
    float lse2, cut2, kappa2;
  };
  Row* const rows = reinterpret_cast<Row*>(shared_memory());
  const int blocks = p.rows.blocks(), key_blocks = p.keys.blocks();
  const int z = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int image = image_of(z, p.heads, p.per_image), n_keys = p.keys.counts[image];
  if (threadIdx.x < kBlock) {
    const int position = block * kBlock + int(threadIdx.x);
    const int64_t row = row_at(z, p.rows.padded, position), all = int64_t(p.n_heads) * p.rows.padded;
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
        if (saved.base2.data != nullptr) saved.base2.of(z)[token] = lse2;
      }
    } else if (token >= 0) {
      lse2 = saved.base2.of(z)[token];
    }
    // Without alpha the cut is -inf, which differences of huge scores may reach.
    Row own{p.alpha.data == nullptr ? 0 : lse2, -INFINITY, -INFINITY};
    if (token < 0) {
      own.cut2 = INFINITY;
    } else if (p.alpha.data != nullptr) {
      const float alpha = multiplier_at(p.alpha, z, p.heads, token);
      own.cut2 = alpha >= 0 ? log2f(alpha) - log2f(float(n_keys)) : NAN;
    }
    if (thresholds.kappa2 != nullptr && token >= 0) own.kappa2 = saved.kappa2.of(z)[token];
    if (splits > 0) {
      // Scores are formed again to decide pairs: the largest must not miss a threshold that it exceeds.
      const float above = base - own.lse2;
      if (above > own.cut2) own.cut2 = fminf(own.cut2, above - last_bits(base));
      own.kappa2 = fminf(own.kappa2, base - last_bits(base));
    } else {
      own.kappa2 -= 2 * last_bits(own.kappa2);  // here too, no neighbour may miss it
    }
    rows[threadIdx.x] = own;
    if (p.has_bits) {
      thresholds.lse2[row] = own.lse2;
      thresholds.cut2[row] = own.cut2;
      if (thresholds.kappa2 != nullptr) thresholds.kappa2[row] = own.kappa2;
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

// Whether tiles hold a bit; a tile a warp.
__global__ void __launch_bounds__(kThreads) asa_occupied_kernel(const uint32_t* words, int64_t stride, int n_heads,
                                                                int row_blocks, int key_blocks, uint8_t* flags) {
  const int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int z = int(tile / (row_blocks * key_blocks)), lane = threadIdx.x % 32;
  if (z >= n_heads) return;
  const int i = int(tile / key_blocks % row_blocks), j = int(tile % key_blocks), padded = row_blocks * kBlock;
  const uint32_t* const left = words + z * stride + int64_t(2 * j) * padded + i * kBlock + lane;
  const bool any = __any_sync(~0u, (left[0] | left[32] | left[padded] | left[padded + 32]) != 0);
  if (lane == 0) flags[tile] = any;
}

// The blocks to visit from a block; a block a warp.
__global__ void __launch_bounds__(kThreads) asa_lists_kernel(const uint8_t* by_rows, const uint8_t* by_columns,
                                                             bool upper, int n_heads, int blocks, Lists lists) {
  const int index = blockIdx.x * kWarps + int(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int z = index / blocks, i = index % blocks;
  if (z >= n_heads) return;
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

// Keeps every real key; a word of every row a program.
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

using Bits = uint32_t[kBlock][2];  // of a tile, by rows

struct Shared {
  char chunks[kStages * 2 * kChunkBytes];
  Bits there, back;
};

// Writes the bits of a thread's numbers; the tile is complete after a barrier.
__device__ __forceinline__ void write_bits(Bits& tile, uint32_t bits, const Fragment& at) {
#pragma unroll
  for (int high = 0; high < 2; ++high)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      uint32_t word = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) word |= (bits >> (4 * (n + 4 * side) + 2 * high) & 3) << (8 * n + at.column);
      word |= __shfl_xor_sync(~0u, word, 1);
      word |= __shfl_xor_sync(~0u, word, 2);
      if (threadIdx.x % 4 == 0) tile[at.row + 8 * high][side] = word;
    }
}

// A word of the tile's transpose.
__device__ __forceinline__ uint32_t transposed(const Bits& tile, int row, int side) {
  uint32_t word = 0;
#pragma unroll 8
  for (int x = 0; x < 32; ++x) word |= (tile[32 * side + x][row / 32] >> row % 32 & 1) << x;
  return word;
}

// Every gridDim.y-th listed block of a block of rows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    asa_mask_kernel(Problem<T> p, Thresholds thresholds, Lists lists, uint8_t* occupied) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int blocks = p.rows.blocks(), padded = p.rows.padded;
  const int z = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int* const list = lists.lists + int64_t(blockIdx.x) * lists.others;
  const int length = lists.lengths[blockIdx.x], n_keys = p.keys.counts[image_of(z, p.heads, p.per_image)];
  const int chunks = chunks_of<T>(p.width), products = p.mutual && !p.symmetric ? 2 : 1;
  const int64_t own = row_at(z, padded, block * kBlock), keys = row_at(z, p.keys.padded, 0);
  const auto load = [&](int step, char* chunk) {
    const int turn = int(blockIdx.y) + step / (chunks * products) * int(gridDim.y);
    if (turn >= length) return;
    const int64_t other = keys + int64_t(list[turn]) * kBlock;
    const bool back = step / chunks % products == 1;
    copy_chunk(chunk, (back ? p.k : p.q) + own * p.width, p.width, step % chunks);
    copy_chunk(chunk + kChunkBytes, (back ? p.q : p.k) + other * p.width, p.width, step % chunks);
  };
  Ring<kStages, 2 * kChunkBytes, decltype(load)> ring(shared.chunks, load);
  const Fragment at;
  const bool has_topk = thresholds.kappa2 != nullptr;
  uint32_t* const words = p.words + z * p.words_stride;

  for (int turn = blockIdx.y; turn < length; turn += gridDim.y) {
    const int j = list[turn];
    Tile s;
    multiply_chunks<T>(s, ring, chunks);
    uint32_t bits = 0;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int64_t row = own + at.row + 8 * high;
      const float lse2 = thresholds.lse2[row], cut2 = thresholds.cut2[row];
      const float kappa2 = has_topk ? thresholds.kappa2[row] : -INFINITY;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * high; i < 2 * high + 2; ++i) {
          const float s2 = s[n][i] * p.scale2;
          const bool kept = s2 - lse2 > cut2 && s2 >= kappa2 && j * kBlock + at.column_of(n, i) < n_keys;
          bits |= uint32_t(kept) << (4 * n + i);
        }
    }
    write_bits(shared.there, bits, at);
    if (p.mutual) {
      if (products == 2) multiply_chunks<T>(s, ring, chunks);
      uint32_t back = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t column = keys + j * kBlock + at.column_of(n, i);
          const float lse2 = thresholds.lse2[column], cut2 = thresholds.cut2[column];
          const float kappa2 = has_topk ? thresholds.kappa2[column] : -INFINITY;
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            const float s2 = s[n][i + 2 * high] * p.scale2;
            const bool kept = s2 - lse2 > cut2 && s2 >= kappa2 && block * kBlock + at.row + 8 * high < n_keys;
            back |= uint32_t(kept) << (4 * n + i + 2 * high);
          }
        }
      write_bits(shared.back, back, at);
    }
    __syncthreads();
    const int row = threadIdx.x % kBlock, side = threadIdx.x / kBlock;
    uint32_t word = shared.there[row][side];
    if (p.mutual && !p.one_way_bits) word &= j == block ? transposed(shared.there, row, side) : shared.back[row][side];
    words[int64_t(2 * j + side) * padded + block * kBlock + row] = word;
    const int64_t tiles = int64_t(z) * blocks * lists.others;
    if (occupied != nullptr && word != 0) occupied[tiles + int64_t(block) * lists.others + j] = 1;
    if (p.mutual && j != block) {
      uint32_t other = transposed(shared.back, row, side);
      if (!p.one_way_bits) other &= transposed(shared.there, row, side);
      words[int64_t(2 * block + side) * padded + j * kBlock + row] = other;
      if (occupied != nullptr && other != 0) occupied[tiles + int64_t(j) * lists.others + block] = 1;
    }
    // The next tile's bits are written after the barriers of its chunks.
  }
  ring.finish();
}

}  // namespace

template <class T>
void find_thresholds(const Problem<T>& problem, int splits, const float* largest, const float* total,
                     const Saved<T>& saved, float band2, const Thresholds& thresholds, cudaStream_t stream) {
  launch("asa_thresholds_kernel", &asa_thresholds_kernel<T>, dim3(problem.n_heads * problem.rows.blocks()), kThreads,
         kBlock * 3 * sizeof(float), stream, problem, splits, largest, total, saved, band2, thresholds);
}

template <class T>
void find_occupied(const Problem<T>& problem, uint8_t* flags, cudaStream_t stream) {
  const int row_blocks = problem.rows.blocks(), key_blocks = problem.keys.blocks();
  launch("asa_occupied_kernel", &asa_occupied_kernel,
         dim3(programs_of(int64_t(problem.n_heads) * row_blocks * key_blocks)), kThreads, 0, stream, problem.words,
         problem.words_stride, problem.n_heads, row_blocks, key_blocks, flags);
}

void list_blocks(const uint8_t* by_rows, const uint8_t* by_columns, bool upper, int n_heads, int blocks,
                 const Lists& lists, cudaStream_t stream) {
  launch("asa_lists_kernel", &asa_lists_kernel, dim3(programs_of(int64_t(n_heads) * blocks)), kThreads, 0, stream,
         by_rows, by_columns, upper, n_heads, blocks, lists);
}

template <class T>
void keep_everybody(const Problem<T>& problem, cudaStream_t stream) {
  launch("asa_everybody_kernel", &asa_everybody_kernel<T>, dim3(problem.n_heads * (problem.keys.padded / 32)), kThreads,
         0, stream, problem);
}

template <class T>
void find_neighbours(const Problem<T>& problem, const Thresholds& thresholds, const Lists& lists, uint8_t* occupied,
                     cudaStream_t stream) {
  const int blocks = problem.n_heads * problem.rows.blocks();
  const int splits = min(lists.others, 1 + 8 * processors() / blocks);  // lists differ in length
  launch("asa_mask_kernel", &asa_mask_kernel<T>, dim3(blocks, splits), kThreads, sizeof(Shared), stream, problem,
         thresholds, lists, occupied);
}

#define INSTANTIATE(T)                                                                                      \
  template void find_thresholds(const Problem<T>&, int, const float*, const float*, const Saved<T>&, float, \
                                const Thresholds&, cudaStream_t);                                           \
  template void find_occupied(const Problem<T>&, uint8_t*, cudaStream_t);                                   \
  template void keep_everybody(const Problem<T>&, cudaStream_t);                                            \
  template void find_neighbours(const Problem<T>&, const Thresholds&, const Lists&, uint8_t*, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
