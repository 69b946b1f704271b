// Lists of the tiles that a step visits, made from a bit for every tile.

#pragma once

#include "problem.h"

namespace asa_ops::cuda {

// A thread a tile of rows, among `threads`: lists of a head. word_of(block, group) has the bits of 32 tiles of a block
// of rows, local_of those that may hold pairs of a window.
template <class Words, class Local>
__device__ __forceinline__ void list_tiles(const Lists& lists, int z, int row_blocks, int thread, int threads,
                                           Words word_of, Local local_of) {
  const int groups = (lists.others + 31) / 32;
  for (int tile = thread; tile < lists.tiles; tile += threads) {
    const int64_t row = int64_t(z) * lists.tiles + tile;
    uint32_t* const entries = lists.entries + row * lists.others;
    int length = 0;
    for (int group = 0; group < groups; ++group) {
      const int first = tile * lists.blocks;
      const bool two = lists.blocks == 2 && first + 1 < row_blocks;
      const uint32_t one = word_of(first, group), other = two ? word_of(first + 1, group) : 0;
      const uint32_t local = local_of(first, group) | (two ? local_of(first + 1, group) : 0);
      for (uint32_t left = one | other; left != 0; left &= left - 1) {
        const int bit = __ffs(int(left)) - 1;
        entries[length++] = uint32_t(32 * group + bit) | (local >> bit & 1) * kEntryLocal |
                            ((one >> bit & 1) | (other >> bit & 1) << 1) * kEntryFirst;
      }
    }
    lists.lengths[row] = length;
  }
}

// The entries of a tile of rows.
struct Entries {
  const uint32_t* list;  // null: every block, as in dense attention
  int length;

  // Of the `index`-th tile of all heads; `n` tokens of its side, `others` of the other one, of which dense attention
  // takes all.
  __device__ Entries(const Lists& lists, int64_t index, int n, int others)
      : list(lists.entries == nullptr ? nullptr : lists.entries + index * lists.others),
        length(list != nullptr                                   ? lists.lengths[index]
               : index % lists.tiles * lists.blocks * kBlock < n ? (others + kBlock - 1) / kBlock
                                                                 : 0) {}

  __device__ __forceinline__ uint32_t operator[](int k) const {
    return list != nullptr ? list[k] : uint32_t(k) | 3 * kEntryFirst;
  }
  __device__ __forceinline__ int block(int k) const { return int((*this)[k] & kEntryBlock); }
};

// Lists the tiles that hold survivors.
template <class T>
__device__ __forceinline__ void list_occupied(const Problem<T>& p, const Lists& lists, int z, bool by_rows, int thread,
                                              int threads) {
  const TileBits& tiles = by_rows ? p.occupied : p.occupied_columns;
  list_tiles(
      lists, z, (by_rows ? p.rows : p.keys).blocks(), thread, threads,
      [&](int block, int group) { return load_fresh(tiles.word(z, block, group)); }, [](int, int) { return 0u; });
}

}  // namespace asa_ops::cuda
