// What kernels share in which a warp takes a row: its tokens spread over the lanes, products summed over the warp.

#pragma once

#include "asa.h"

namespace asa_ops::cuda {

// Programs for a row a warp.
inline dim3 row_programs(int zs, const Order& rows) { return dim3(unsigned(int64_t(zs) * rows.padded / kWarps)); }

// The row of this warp.
struct WarpRow {
  int64_t index;  // in [zs, padded]
  int z, position, image, token;  // token -1: there is none

  __device__ WarpRow(const Order& rows, int heads, int per_image)
      : index(int64_t(blockIdx.x) * kWarps + threadIdx.x / 32),
        z(int(index / rows.padded)),
        position(int(index % rows.padded)),
        image(image_of(z, heads, per_image)),
        token(rows.order[row_at(image, rows.padded, position)]) {}
};

// A token of up to 256 numbers: each lane has every 32nd.
struct Vector {
  float x[8];

  template <class T>
  __device__ Vector(const T* tokens, int64_t row, int width) {
#pragma unroll
    for (int r = 0; r < 8; ++r) x[r] = 32 * r < width ? to_float(tokens[row * width + 32 * r + threadIdx.x % 32]) : 0;
  }
};

// <a, b>, the same number in every lane.
__device__ __forceinline__ float dot(const Vector& a, const Vector& b) {
  float sum = 0;
#pragma unroll
  for (int r = 0; r < 8; ++r) sum = fmaf(a.x[r], b.x[r], sum);
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  return sum;
}

// The position of the `offset`-th token of the window around a row's token; -1 off the map and for padding.
template <class T>
__device__ __forceinline__ int window_neighbour(const Problem<T>& p, const WarpRow& at, int offset) {
  const int r = at.token / p.grid_width + offset / p.window - p.window / 2;
  const int c = at.token % p.grid_width + offset % p.window - p.window / 2;
  if (r < 0 || r >= p.grid_height || c < 0 || c >= p.grid_width) return -1;
  return p.keys.place[row_at(at.image, p.keys.n, r * p.grid_width + c)];
}

}  // namespace asa_ops::cuda
