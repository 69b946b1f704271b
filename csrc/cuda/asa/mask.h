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

// Of 32 words, one a lane, the transpose: lane x gets bit x of all of them.
__device__ __forceinline__ uint32_t transposed_in_warp(uint32_t word) {
  const int lane = threadIdx.x % 32;
  uint32_t low = 0x0000ffff;  // bits whose number has a 0 where `step` has its 1
#pragma unroll
  for (int step = 16; step > 0; step /= 2, low ^= low << step) {
    const uint32_t other = __shfl_xor_sync(~0u, word, step);
    word = lane & step ? (word & ~low) | (other & ~low) >> step : (word & low) | (other & low) << step;
  }
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

// The keys of a group that are neighbours of a query because one of the two is an extra token.
template <class T>
__device__ __forceinline__ uint32_t extra_bits(const Problem<T>& p, int image, int query, int group) {
  if (p.keys.extra == 0 || query >= p.rows.counts[image]) return 0;
  return query < p.rows.extra_counts[image] ? ~0u : first_bits(p.keys.extra_counts[image] - 32 * group);
}

// The words of a tile that a thread stores: word `side` of row `row` of a tile (I, J), and, if neighbours must be mutual,
// a word of (J, I). A warp has 32 rows, and transposes 32 x 32 bits; so the second is word row / 32 of row 32 side + row
// % 32.
struct Words {
  uint32_t there, back;
};

struct Found {
  Words neighbours;
  Words own, other;  // A_ij and A_ji, where both are stored
};

// From the bits of a thread's numbers, A_ij and, if neighbours must be mutual, A_ji laid out [i, j], by way of `tile`.
// sync() is a barrier of those that share it.
template <class T, class Sync>
__device__ __forceinline__ Found exchange_bits(const Problem<T>& p, Bits& tile, uint32_t own, uint32_t other,
                                               bool diagonal, int at_row, int at_column, int row, int side, Sync sync) {
  uint32_t across = 0;  // on the diagonal, the thread's word of the transpose
  const auto pass = [&](uint32_t bits) {
    write_bits(tile, bits, at_row, at_column);
    sync();
    const uint32_t there = tile[row][side];
    if (p.mutual && diagonal) across = transposed(tile, row, side);
    sync();
    return Words{there, p.mutual && !diagonal ? transposed_in_warp(there) : 0};
  };
  Found found{};
  if (p.one_way.words == nullptr) {
    found.neighbours = pass(p.mutual && !diagonal ? own & other : own);
    if (p.mutual && diagonal) found.neighbours.there &= across;  // symmetric, come what may
    return found;
  }
  found.own = pass(own);
  found.other = diagonal ? Words{across, 0} : pass(other);
  found.neighbours = {found.own.there & found.other.there, found.own.back & found.other.back};
  return found;
}

// Stores it, for the rows and for the keys that the call computes: a thread a word. Extra tokens join the neighbours
// here, but not what thresholds ask for: none decides of them.
template <class T>
__device__ __forceinline__ void store_bits(const Problem<T>& p, const Saved<T>& saved, int z, int image, int i, int j,
                                           bool has_local, const Found& found, int row, int side) {
  const int n_keys = p.keys.counts[image];
  const auto store = [&](int own, int other, int row, int side, uint32_t neighbours, uint32_t offers,
                         uint32_t offered) {
    const int query = own * kBlock + row, group = 2 * other + side;
    const bool of_rows = p.rows.computes(own), of_keys = p.keys.computes(other);
    const auto at = [&](const PairBits& bits) -> uint32_t& { return bits.of(z)[int64_t(group) * bits.rows + query]; };
    const uint32_t real = first_bits(n_keys - 32 * group);  // zeros, which stand where there are no keys, may score
    neighbours = (neighbours | extra_bits(p, image, query, group)) & real;
    uint32_t word = neighbours;
    if (has_local) word |= local_bits(p, saved, z, image, query, group, neighbours);
    if (of_rows) at(p.survivors) = word;
    if (of_keys && p.columns.words != nullptr) at(p.columns) = word;
    const bool any = __any_sync(~0u, word != 0), speaks = row % 32 == 0;
    if (any && speaks && of_rows) p.occupied.set(z, own, other);
    if (any && speaks && of_keys) p.occupied_columns.set(z, other, own);
    if (p.one_way.words == nullptr) return;
    if (of_keys) at(p.one_way) = offers & real;
    if (__any_sync(~0u, offered != 0) && speaks && of_rows) p.offered.set(z, own, other);
  };
  store(i, j, row, side, found.neighbours.there, found.own.there, found.other.there);
  if (p.mutual && i != j)
    store(j, i, 32 * side + row % 32, row / 32, found.neighbours.back, found.other.back, found.own.back);
}

}  // namespace asa_ops::cuda
