// Lists of the tiles that a step visits, made from a bit for every tile.

#pragma once

#include "problem.h"

namespace asa_ops::cuda {

// The sum of x over the threads before this one, and over all: by all THREADS threads of a program, with room for a
// number a warp.
template <int THREADS>
__device__ __forceinline__ int sum_before(int x, int* in_warps, int& all) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_sync(~0u, sum, max(lane - step, 0));
    if (lane >= step) sum += other;
  }
  if (lane == 31) in_warps[warp] = sum;
  __syncthreads();
  all = 0;
  for (int w = 0; w < THREADS / 32; ++w) {
    sum += w < warp ? in_warps[w] : 0;
    all += in_warps[w];
  }
  return sum - x;
}

// A thread a tile of rows, among `threads`: lists of a head. word_of(block, group) has the bits of 32 tiles of a block
// of rows, local_of those that may hold pairs of a window, whole_of those whose pairs are all neighbours. `all`, if
// given, counts the entries of all lists, and an empty one as one.
template <class Words, class Local, class Whole>
__device__ __forceinline__ void list_tiles(const Lists& lists, int z, int row_blocks, int thread, int threads,
                                           Words word_of, Local local_of, Whole whole_of, uint32_t* all = nullptr) {
  const int groups = (lists.others + 31) / 32;
  for (int tile = thread; tile < lists.tiles; tile += threads) {
    const int64_t row = int64_t(z) * lists.tiles + tile;
    uint32_t* const entries = lists.entries + row * lists.others;
    int length = 0;
    for (int group = 0; group < groups; ++group) {
      const int first = lists.first + tile * lists.blocks;
      const bool two = lists.blocks == 2 && first + 1 < row_blocks;
      const uint32_t one = word_of(first, group), other = two ? word_of(first + 1, group) : 0;
      const uint32_t local = local_of(first, group) | (two ? local_of(first + 1, group) : 0);
      const uint32_t whole = whole_of(first, group), other_whole = two ? whole_of(first + 1, group) : 0;
      for (uint32_t left = one | other; left != 0; left &= left - 1) {
        const int bit = __ffs(int(left)) - 1;
        entries[length++] = uint32_t(32 * group + bit) | (local >> bit & 1) * kEntryLocal |
                            ((one >> bit & 1) | (other >> bit & 1) << 1) * kEntryFirst |
                            ((whole >> bit & 1) | (other_whole >> bit & 1) << 1) * kEntryWhole;
      }
    }
    lists.lengths[row] = length;
    if (all != nullptr) atomicAdd(all, uint32_t(max(length, 1)));
  }
}

// How many entries the `index`-th tile of all heads has. Dense attention has no lists: of `n` tokens of its side, those
// that stand for tokens take all blocks of `others`.
__device__ __forceinline__ int length_of(const Lists& lists, int64_t index, int n, int others) {
  if (lists.lengths != nullptr) return lists.lengths[index];
  const int64_t block = lists.first + index % lists.tiles * lists.blocks;
  return block * kBlock < n ? (others + kBlock - 1) / kBlock : 0;
}

// The entries of a tile of rows.
struct Entries {
  const uint32_t* list;  // null: every block

  __device__ Entries(const Lists& lists, int64_t index)
      : list(lists.entries == nullptr ? nullptr : lists.entries + index * lists.others) {}

  __device__ __forceinline__ uint32_t operator[](int k) const {
    return list != nullptr ? list[k] : uint32_t(k) | 3 * kEntryFirst;
  }
  __device__ __forceinline__ int block(int k) const { return int((*this)[k] & kEntryBlock); }
};

// Clears the bits of tiles of a block of rows, and of all blocks of keys that are `block` modulo the blocks of rows.
template <class T>
__device__ __forceinline__ void clear_occupied(const Problem<T>& p, int z, int block, int thread, int threads) {
  if (p.rows.computes(block))
    for (int group = thread; group < p.occupied.groups; group += threads) {
      *p.occupied.word(z, block, group) = 0;
      if (p.offered.words != nullptr) *p.offered.word(z, block, group) = 0;
    }
  for (int j = block; j < p.keys.blocks(); j += p.rows.blocks())
    for (int group = thread; p.keys.computes(j) && group < p.occupied_columns.groups; group += threads)
      *p.occupied_columns.word(z, j, group) = 0;
}

// Lists the tiles that hold survivors.
template <class T>
__device__ __forceinline__ void list_occupied(const Problem<T>& p, const Lists& lists, int z, bool by_rows, int thread,
                                              int threads) {
  const TileBits& tiles = by_rows ? p.occupied : p.occupied_columns;
  const auto none = [](int, int) { return 0u; };
  list_tiles(
      lists, z, (by_rows ? p.rows : p.keys).blocks(), thread, threads,
      [&](int block, int group) { return load_fresh(tiles.word(z, block, group)); }, none, none);
}

}  // namespace asa_ops::cuda
