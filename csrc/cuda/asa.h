// Adaptive sparse attention on the GPU: what the kernels of csrc/cuda share.
//
// Tokens are arranged first (asa_arrange.cu): [zs * padded, width], zs = B * heads, the map cut into tiles of 8 x 8,
// padding left out, zeros up to whole blocks of 64 tokens and to a width of 64, 128 or 256. So no tile needs a bounds
// check. Scores are in base 2: s2 = scale * log2(e) * <q_i, k_j>. Everything runs in one stream; no size depends on the
// data, nothing is read back, and what is summed is summed in a fixed order: results repeat bit for bit.

#pragma once

#include "device.h"

namespace asa_ops::cuda {

constexpr int kBlock = 64;     // tokens of a block, rows and columns of a tile
constexpr int kThreads = 128;  // of a program: four warps, each with 16 rows of a tile, or with one row
constexpr int kWarps = kThreads / 32;

// In which order the tokens of every image stand.
struct Order {
  int n = 0, padded = 0;
  const int32_t* order = nullptr;   // [images, padded] token at a position, -1 where there is none
  const int32_t* place = nullptr;   // [images, n] position of a token, -1 for padding
  const int32_t* counts = nullptr;  // [images] real tokens
};

// Where the numbers of a [B, heads, N, D] tensor lie.
struct Strides {
  int64_t b = 0, h = 0, n = 0, d = 0;
};

// A multiplier of thresholds, [B, heads or 1, N] float32.
struct Multiplier {
  const float* data = nullptr;
  Strides strides;
};

// A call. T: Half, BFloat16 or float.
template <class T>
struct Problem {
  int heads, zs;
  int per_image;  // 1: the order differs from image to image, 0: one for all
  Order rows, keys;
  int width;
  int grid_height, grid_width, window;
  int topk;
  float scale2;
  Multiplier beta;
  const T *q, *k;  // arranged
};

__device__ __forceinline__ int image_of(int z, int heads, int per_image) { return z / heads * per_image; }

// Index of a head's row in an array of rows.
__device__ __forceinline__ int64_t row_at(int z, int padded, int row) { return int64_t(z) * padded + row; }

__device__ __forceinline__ float multiplier_at(const Multiplier& x, int z, int heads, int token) {
  return x.data[z / heads * x.strides.b + z % heads * x.strides.h + token * x.strides.n];
}

// Launchers, one for each step, in the file of that name.

// asa_arrange.cu
void find_order(const bool* real, int images, int n, int height, int width, int padded, int32_t* order, int32_t* place,
                int32_t* counts, cudaStream_t stream);
template <class T>
void arrange(const T* x, Strides strides, int zs, int heads, int per_image, const Order& order, int dim, int width, T* out,
             cudaStream_t stream);

// asa_topk.cu: a threshold in base 2 for every row, [zs, n] in raster order, at or just below its k-th largest score.
template <class T>
void find_kth(const Problem<T>& problem, float* kappa, cudaStream_t stream);

// asa_window.cu: log_mean2 [zs, n], in base 2, and local survivors [zs, n, window^2], raster order.
template <class T>
void find_local_survivors(const Problem<T>& problem, float* log_mean2, uint8_t* local, cudaStream_t stream);

}  // namespace asa_ops::cuda
