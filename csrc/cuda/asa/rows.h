// Rows that a warp takes each: tokens lie spread over its lanes, products are summed over it.

#pragma once

#include "problem.h"

namespace asa_ops::cuda {

// Programs for a row a warp, of those that a call computes.
inline dim3 row_programs(int n_heads, const Order& rows) {
  return dim3(unsigned(int64_t(n_heads) * rows.computed() / kWarps));
}

// The row of this warp.
struct WarpRow {
  int64_t computed;  // in [n_heads, computed]
  int z, position;
  int64_t index;  // in [n_heads, padded]
  int image, token;  // token -1: there is none

  __device__ WarpRow(const Order& rows, int heads, int per_image)
      : computed(int64_t(blockIdx.x) * kWarps + threadIdx.x / 32),
        z(int(computed / rows.computed())),
        position(rows.first * kBlock + int(computed % rows.computed())),
        index(row_at(z, rows.padded, position)),
        image(image_of(z, heads, per_image)),
        token(rows.order[row_at(image, rows.padded, position)]) {}
};

// Up to 256 numbers of a row: each lane has every 32nd.
struct Vector {
  float x[8];
};

// Calls use(r, d) for the numbers r of a lane's share, d of the row.
template <class Use>
__device__ __forceinline__ void each_number(int width, Use use) {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int d = 32 * r + int(threadIdx.x) % 32;
    if (d < width) use(r, d);
  }
}

// An arranged token.
template <class T>
__device__ __forceinline__ Vector vector_at(const T* tokens, int64_t row, int width) {
  Vector v{};
  each_number(width, [&](int r, int d) { v.x[r] = to_float(tokens[arranged_at<T>(row, d, width)]); });
  return v;
}

__device__ __forceinline__ void add(Vector& sum, float weight, const Vector& v) {
#pragma unroll
  for (int r = 0; r < 8; ++r) sum.x[r] = fmaf(weight, v.x[r], sum.x[r]);
}

__device__ __forceinline__ void scale(Vector& v, float factor) {
#pragma unroll
  for (int r = 0; r < 8; ++r) v.x[r] *= factor;
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(~0u, x, other);
  return x;
}

__device__ __forceinline__ float max_over_warp(float x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, other));
  return x;
}

// Raises `bound` to a number that is not negative; both as bits, which order as the numbers do. For one lane.
__device__ __forceinline__ void note_largest(uint32_t* bound, float x) { atomicMax(bound, bits_as<uint32_t>(x)); }

// <a, b>, the same number in every lane.
__device__ __forceinline__ float dot(const Vector& a, const Vector& b) {
  float sum = 0;
#pragma unroll
  for (int r = 0; r < 8; ++r) sum = fmaf(a.x[r], b.x[r], sum);
  return sum_over_warp(sum);
}

// The sum of a row's parts, of all `rows` that are computed.
__device__ __forceinline__ Vector sum_of(const Parts& parts, int64_t row, int64_t rows, int width) {
  Vector sum{};
  for (int part = 0; part < parts.splits; ++part)
    each_number(width, [&](int r, int d) { sum.x[r] += parts.sums[(part * rows + row) * width + d]; });
  return sum;
}

// The same of one number a row.
__device__ __forceinline__ float number_of(const Parts& parts, int64_t row, int64_t rows) {
  float sum = 0;
  for (int part = 0; part < parts.splits; ++part) sum += parts.sums[part * rows + row];
  return sum;
}

// The `offset`-th token of the window around a token, in raster order; -1 off the grid, where extra tokens are.
template <class T>
__device__ __forceinline__ int window_token(const Problem<T>& p, int token, int offset) {
  const int depth = p.keys.depth, height = p.keys.height, width = p.keys.width, *const sides = p.sides;
  const int place = token - p.keys.extra;
  if (place < 0) return -1;
  int line = place / width, slice = 0;
  const int c = place % width + offset % sides[2] - sides[2] / 2;
  offset /= sides[2];
  if (depth > 1) {
    slice = line / height + offset / sides[1] - sides[0] / 2;
    line %= height, offset %= sides[1];
  }
  const int r = line + offset - sides[1] / 2;
  const bool inside = slice >= 0 && slice < depth && r >= 0 && r < height && c >= 0 && c < width;
  return inside ? p.keys.extra + (slice * height + r) * width + c : -1;
}

// The offset of a token in the window around another, both in raster order; -1 outside.
template <class T>
__device__ __forceinline__ int window_offset(const Problem<T>& p, int token, int other) {
  const int height = p.keys.height, width = p.keys.width, *const sides = p.sides;
  const int place = token - p.keys.extra, other_place = other - p.keys.extra;
  if (place < 0 || other_place < 0) return -1;
  int line = place / width, other_line = other_place / width, a = 0;
  const int c = other_place % width - place % width + sides[2] / 2;
  if (p.keys.depth > 1) {
    a = other_line / height - line / height + sides[0] / 2;
    line %= height, other_line %= height;
  }
  const int r = other_line - line + sides[1] / 2;
  const bool inside = a >= 0 && a < sides[0] && r >= 0 && r < sides[1] && c >= 0 && c < sides[2];
  return inside ? (a * sides[1] + r) * sides[2] + c : -1;
}

// The offset of the token itself in the window around its `offset`-th one.
template <class T>
__device__ __forceinline__ int back_of(const Problem<T>& p, int offset) {
  return p.window - 1 - offset;
}

// Calls use(offset, position) for the window around a token, position -1 off the grid and for padding.
template <class T, class Use>
__device__ __forceinline__ void visit_window(const Problem<T>& p, int image, int token, Use use) {
  for (int offset = 0; offset < p.window; ++offset) {
    const int other = window_token(p, token, offset);
    use(offset, other < 0 ? -1 : p.keys.place[row_at(image, p.keys.n, other)]);
  }
}

// Whether the `offset`-th token of the window around `token` is a local survivor (kLocal), and whether such a one is a
// neighbour too (kBoth).
constexpr uint8_t kLocal = 1, kBoth = 3;

template <class T>
__device__ __forceinline__ uint8_t& local_flag(const Problem<T>& p, const PerHead<uint8_t>& local, int z, int token,
                                               int offset) {
  return local.of(z)[int64_t(token) * p.window + offset];
}

__device__ __forceinline__ bool bit_at(const PairBits& bits, int z, int query, int key) {
  return bits.of(z)[int64_t(key / 32) * bits.rows + query] >> key % 32 & 1;
}

// Whether a pair survives, positions both.
template <class T>
__device__ __forceinline__ bool survives(const Problem<T>& p, int z, int query, int key) {
  return p.occupied.at(z, query / kBlock, key / kBlock) && bit_at(p.survivors, z, query, key);
}

// Calls use(position) for the survivors of a row by its bits.
template <class T, class Use>
__device__ __forceinline__ void visit_bits(const Problem<T>& p, const WarpRow& at, Use use) {
  const int groups = p.keys.padded / 32, lane = threadIdx.x % 32;
  const uint32_t* const words = p.survivors.of(at.z) + at.position;
  for (int start = 0; start < groups; start += 32) {
    const int group = start + lane;
    const bool there = group < groups && p.occupied.at(at.z, at.position / kBlock, group / 2);
    const uint32_t own = there ? words[int64_t(group) * p.survivors.rows] : 0;
    for (unsigned left = __ballot_sync(~0u, own != 0); left != 0; left &= left - 1) {
      const int holder = __ffs(int(left)) - 1;
      for (uint32_t word = __shfl_sync(~0u, own, holder); word != 0; word &= word - 1)
        use(32 * (start + holder) + __ffs(int(word)) - 1);
    }
  }
}

// Calls use(position) for the survivors of a query that no tile sums.
template <class T, class Use>
__device__ __forceinline__ void visit_keys(const Problem<T>& p, const WarpRow& at, const PerHead<uint8_t>& local,
                                           Use use) {
  if (p.few) return visit_bits(p, at, use);
  if (p.has_bits) return;
  visit_window(p, at.image, at.token, [&](int offset, int j) {
    if (j >= 0 && local_flag(p, local, at.z, at.token, offset)) use(j);
  });
}

// The same for the queries of which a key is a survivor: its window holds those whose windows hold it, and neighbours
// that are few are each other's.
template <class T, class Use>
__device__ __forceinline__ void visit_queries(const Problem<T>& p, const WarpRow& at, const PerHead<uint8_t>& local,
                                              Use use) {
  if (p.few)
    visit_bits(p, at, [&](int i) {
      if (p.window > 0) {
        const int offset = window_offset(p, at.token, p.rows.order[row_at(at.image, p.rows.padded, i)]);
        if (offset >= 0 && local_flag(p, local, at.z, at.token, offset) == kLocal) return;  // and no neighbour
      }
      use(i);
    });
  if (p.has_bits && !p.few) return;
  visit_window(p, at.image, at.token, [&](int offset, int i) {
    if (i < 0) return;
    const int token = window_token(p, at.token, offset);
    if (local_flag(p, local, at.z, token, back_of(p, offset)) == kLocal) use(i);
  });
}

}  // namespace asa_ops::cuda
