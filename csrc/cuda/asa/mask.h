// The bits of a tile of pairs, from who is whose neighbour to who survives.

#pragma once

#include "rows.h"

namespace asa_ops::cuda {

using Bits = uint32_t[kBlock][2];  // of a tile, by rows

// Writes the bits of a thread's numbers of a tile, bit 4 n + i for [n][i] of a fragment at `row`, `column`; the tile is
// complete after a barrier.
__device__ __forceinline__ void write_bits(Bits& tile, uint32_t bits, int row, int column) {
#pragma unroll
  for (int high = 0; high < 2; ++high)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      uint32_t word = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) word |= (bits >> (4 * (n + 4 * side) + 2 * high) & 3) << (8 * n);
      word <<= column;
      word |= __shfl_xor_sync(~0u, word, 1);
      word |= __shfl_xor_sync(~0u, word, 2);
      if (threadIdx.x % 4 == 0) tile[row + 8 * high][side] = word;
    }
}

// A word of the tile's transpose.
__device__ __forceinline__ uint32_t transposed(const Bits& tile, int row, int side) {
  uint32_t word = 0;
#pragma unroll 8
  for (int x = 0; x < 32; ++x) word |= (tile[32 * side + x][row / 32] >> row % 32 & 1) << x;
  return word;
}

// The local survivors of a query among 32 keys, and notes which of them are its `neighbours` too.
template <class T>
__device__ __forceinline__ uint32_t local_bits(const Problem<T>& p, const Saved<T>& saved, int z, int image, int query,
                                               int group, uint32_t neighbours) {
  const int token = p.rows.order[row_at(image, p.rows.padded, query)];
  uint32_t word = 0;
  if (token >= 0)
    visit_window(p, image, token, [&](int offset, int j) {
      if (j < 0 || j / 32 != group) return;
      uint8_t& flag = local_flag(p, saved.local, z, token, offset);
      if (flag == 0) return;
      word |= 1u << j % 32;
      if (neighbours >> j % 32 & 1) flag = kBoth;
    });
  return word;
}

// Stores word `side` of row `row` of a tile (I, J), and of (J, I) if neighbours must be mutual: a thread a word, a warp 32
// rows.
// `there` is A_ij, `back` A_ji laid out [i, j].
template <class T>
__device__ __forceinline__ void store_bits(const Problem<T>& p, const Saved<T>& saved, int z, int image, int i, int j,
                                           bool has_local, const Bits& there, const Bits& back, int row, int side) {
  const auto store = [&](int own, int other, uint32_t neighbours, uint32_t offers, uint32_t offered) {
    const int query = own * kBlock + row, group = 2 * other + side;
    const int64_t at = int64_t(group) * p.rows.padded + query;
    uint32_t word = neighbours;
    if (has_local) word |= local_bits(p, saved, z, image, query, group, neighbours);
    p.survivors.of(z)[at] = word;
    const bool any = __any_sync(~0u, word != 0), speaks = row % 32 == 0;
    if (any && speaks) p.occupied.set(z, own, other), p.occupied_columns.set(z, other, own);
    if (p.one_way.words == nullptr) return;
    p.one_way.of(z)[at] = offers;
    if (__any_sync(~0u, offered != 0) && speaks) p.offered.set(z, own, other);
  };
  const uint32_t own = there[row][side];
  if (!p.mutual) return store(i, j, own, 0, 0);
  const uint32_t turned = transposed(there, row, side);
  if (i == j) return store(i, i, own & turned, own, turned);
  const uint32_t other = back[row][side], turned_back = transposed(back, row, side);
  store(i, j, own & other, own, other);
  store(j, i, turned_back & turned, turned_back, turned);
}

}  // namespace asa_ops::cuda
