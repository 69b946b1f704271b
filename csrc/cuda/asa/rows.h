// Rows that a warp takes each: tokens lie spread over its lanes, products are summed over it.

#pragma once

#include "problem.h"

namespace asa_ops::cuda {

// Programs for a row a warp.
inline dim3 row_programs(int n_heads, const Order& rows) {
  return dim3(unsigned(int64_t(n_heads) * rows.padded / kWarps));
}

// The row of this warp.
struct WarpRow {
  int64_t index;  // in [n_heads, padded]
  int z, position, image, token;  // token -1: there is none

  __device__ WarpRow(const Order& rows, int heads, int per_image)
      : index(int64_t(blockIdx.x) * kWarps + threadIdx.x / 32),
        z(int(index / rows.padded)),
        position(int(index % rows.padded)),
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

template <class T>
__device__ __forceinline__ Vector vector_at(const T* tokens, int64_t row, int width) {
  Vector v{};
  each_number(width, [&](int r, int d) { v.x[r] = to_float(tokens[row * width + d]); });
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

// The sum of a row's parts.
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

// The `offset`-th token of the window around a token, in raster order; -1 off the map.
template <class T>
__device__ __forceinline__ int window_token(const Problem<T>& p, int token, int offset) {
  const int r = token / p.grid_width + offset / p.window - p.window / 2;
  const int c = token % p.grid_width + offset % p.window - p.window / 2;
  return r < 0 || r >= p.grid_height || c < 0 || c >= p.grid_width ? -1 : r * p.grid_width + c;
}

// Calls use(offset, position) for the window around a row's token, position -1 off the map and for padding.
template <class T, class Use>
__device__ __forceinline__ void visit_window(const Problem<T>& p, const WarpRow& at, Use use) {
  for (int offset = 0; offset < p.window * p.window; ++offset) {
    const int token = window_token(p, at.token, offset);
    use(offset, token < 0 ? -1 : p.keys.place[row_at(at.image, p.keys.n, token)]);
  }
}

// Whether the `offset`-th token of the window around `token` is a local survivor.
template <class T>
__device__ __forceinline__ bool local_flag(const Problem<T>& p, const PerHead<uint8_t>& local, int z, int token,
                                           int offset) {
  return local.of(z)[int64_t(token) * (p.window * p.window) + offset] != 0;
}

template <class T>
__device__ __forceinline__ bool bit_at(const Problem<T>& p, int z, int query, int key) {
  return p.words[z * p.words_stride + int64_t(key / 32) * p.rows.padded + query] >> key % 32 & 1;
}

// Whether a key is a neighbour of a query, positions both.
template <class T>
__device__ __forceinline__ bool is_neighbour(const Problem<T>& p, int z, int query, int key) {
  return p.has_bits && bit_at(p, z, query, key) && (!p.one_way_bits || bit_at(p, z, key, query));
}

// Calls use(position) for the mutual neighbours of a row.
template <class T, class Use>
__device__ __forceinline__ void visit_neighbours(const Problem<T>& p, const WarpRow& at, Use use) {
  const int groups = p.keys.padded / 32, lane = threadIdx.x % 32;
  const uint32_t* const words = p.words + at.z * p.words_stride + at.position;
  for (int start = 0; start < groups; start += 32) {
    const uint32_t own = start + lane < groups ? words[int64_t(start + lane) * p.rows.padded] : 0;
    for (unsigned left = __ballot_sync(~0u, own != 0); left != 0; left &= left - 1) {
      const int holder = __ffs(int(left)) - 1;
      for (uint32_t word = __shfl_sync(~0u, own, holder); word != 0; word &= word - 1) {
        const int j = 32 * (start + holder) + __ffs(int(word)) - 1;
        if (!p.one_way_bits || bit_at(p, at.z, j, at.position)) use(j);
      }
    }
  }
}

// The local block of a row: log_mean2_i = log2 mean exp2 s2_ij over the window of i, and its survivors, s2_ij -
// log_mean2_i > log2 beta_i. Pairs of a window are few and scattered, so they are taken one at a time, in plain float32
// products. Scores are formed twice, so that a window of any size needs no memory.
template <class T>
__device__ __forceinline__ void find_local_survivors(const Problem<T>& p, const WarpRow& at, const Vector& q,
                                                     const Saved<T>& saved) {
  // Calls use(offset, whether a token is there, score) for every offset of the window.
  const auto visit = [&](auto use) {
    visit_window(p, at, [&](int offset, int j) {
      use(offset, j >= 0,
          j < 0 ? -INFINITY : dot(q, vector_at(p.k, row_at(at.z, p.keys.padded, j), p.width)) * p.scale2);
    });
  };
  float largest = -INFINITY, total = 0;
  int members = 0, first = 0;  // offset of the largest
  visit([&](int offset, bool in_window, float s) {
    if (s > largest) first = offset;
    const float base = fmaxf(largest, s), finite = base == -INFINITY ? 0 : base;
    total = total * exp2f(largest - finite) + exp2f(s - finite);
    members += in_window;
    largest = base;
  });
  const float mean2 = largest + log2f(total) - log2f(float(members));
  const float beta = multiplier_at(p.beta, at.z, p.heads, at.token);
  const float cut = beta >= 0 ? log2f(beta) : NAN;
  const int lane = threadIdx.x % 32;
  if (lane == 0) saved.log_mean2.of(at.z)[at.token] = mean2;
  uint8_t* const flags = saved.local.of(at.z) + int64_t(at.token) * (p.window * p.window);
  visit([&](int offset, bool in_window, float s) {
    const float seen = offset == first ? largest : s;  // formed again, the largest might miss a cut that it exceeds
    if (lane == 0) flags[offset] = in_window && seen - mean2 > cut;
  });
  __syncwarp();  // now all lanes may read the flags
}

// Calls use(position) for the survivors of a query that no tile sums.
template <class T, class Use>
__device__ __forceinline__ void visit_keys(const Problem<T>& p, const WarpRow& at, const PerHead<uint8_t>& local,
                                           Use use) {
  if (p.few) visit_neighbours(p, at, use);
  visit_window(p, at, [&](int offset, int j) {
    if (j >= 0 && local_flag(p, local, at.z, at.token, offset) && !is_neighbour(p, at.z, at.position, j)) use(j);
  });
}

// The same for the queries of which a key is a survivor: its window holds those whose windows hold it.
template <class T, class Use>
__device__ __forceinline__ void visit_queries(const Problem<T>& p, const WarpRow& at, const PerHead<uint8_t>& local,
                                              Use use) {
  if (p.few) visit_neighbours(p, at, use);
  visit_window(p, at, [&](int offset, int i) {
    if (i < 0) return;
    const int token = window_token(p, at.token, offset), back = p.window * p.window - 1 - offset;
    if (local_flag(p, local, at.z, token, back) && !is_neighbour(p, at.z, i, at.position)) use(i);
  });
}

}  // namespace asa_ops::cuda
