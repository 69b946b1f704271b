// Who is whose neighbour: the one place where pairs are decided.
//
// A_ij = [s2_ij - lse2_i > cut2_i] and [s2_ij >= kappa2_i]. If mutual, a tile (I, J) also gets s_ji, by a second product
// laid out [i, j] (none if query is key), so that M = A_ij and A_ji; what is stored of it are bits of the rows i and of
// the rows j, turned over in shared memory. On the diagonal A_ji is A_ij turned over: M is symmetric, come what may.

#include "asa_tiles.h"

namespace asa_ops::cuda {
namespace {

constexpr int kStages = 3;

using Bits = uint32_t[kBlock][2];  // of a tile, by rows

struct Memory {
  char chunks[kStages * 2 * kChunkBytes];
  Bits there, back;
};

// Writes the bits of a thread's numbers; everybody's are there after a barrier.
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

// A word of the tile turned over.
__device__ __forceinline__ uint32_t turned(const Bits& tile, int row, int side) {
  uint32_t word = 0;
#pragma unroll 8
  for (int x = 0; x < 32; ++x) word |= (tile[32 * side + x][row / 32] >> row % 32 & 1) << x;
  return word;
}

// Every gridDim.y-th listed block of a block of rows.
template <class T>
__global__ void __launch_bounds__(kThreads) asa_mask_kernel(Problem<T> p, Thresholds thresholds, Lists lists) {
  Memory& memory = *reinterpret_cast<Memory*>(shared_memory());
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
  Ring<kStages, 2 * kChunkBytes, decltype(load)> ring(memory.chunks, load);
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
    write_bits(memory.there, bits, at);
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
      write_bits(memory.back, back, at);
    }
    __syncthreads();
    const int row = threadIdx.x % kBlock, side = threadIdx.x / kBlock;
    uint32_t word = memory.there[row][side];
    if (p.mutual && !p.one_way_bits) word &= j == block ? turned(memory.there, row, side) : memory.back[row][side];
    words[int64_t(2 * j + side) * padded + block * kBlock + row] = word;
    if (p.mutual && j != block) {
      uint32_t other = turned(memory.back, row, side);
      if (!p.one_way_bits) other &= turned(memory.there, row, side);
      words[int64_t(2 * block + side) * padded + j * kBlock + row] = other;
    }
    // The next tile's bits are written after the barriers of its chunks.
  }
  ring.finish();
}

}  // namespace

template <class T>
void find_neighbours(const Problem<T>& problem, const Thresholds& thresholds, const Lists& lists, cudaStream_t stream) {
  const int blocks = problem.zs * problem.rows.blocks();
  const int splits = min(lists.others, 1 + 8 * processors() / blocks);  // lists differ in length
  launch("asa_mask_kernel", &asa_mask_kernel<T>, dim3(blocks, splits), kThreads, sizeof(Memory), stream, problem, thresholds, lists);
}
template void find_neighbours(const Problem<Half>&, const Thresholds&, const Lists&, cudaStream_t);
template void find_neighbours(const Problem<BFloat16>&, const Thresholds&, const Lists&, cudaStream_t);
template void find_neighbours(const Problem<float>&, const Thresholds&, const Lists&, cudaStream_t);

}  // namespace asa_ops::cuda
