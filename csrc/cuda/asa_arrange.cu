// Tokens in the order and form that the other kernels want.
//
// Attention does not care about the order of tokens, skipping does: neighbours on the map are neighbours in memory if the
// map is cut into tiles of 8 x 8. Real positions come first, padding is left out; what follows them is zero.

#include "asa_tiles.h"

namespace asa_ops::cuda {
namespace {

// The token at a position of the 8 x 8 order; tiles at the borders are smaller, no position is empty.
__device__ __forceinline__ int token_at(int position, int height, int width) {
  const int band = position / (8 * width), in_band = position % (8 * width);
  const int tall = min(8, height - 8 * band);
  const int tile = in_band / (8 * tall), in_tile = in_band % (8 * tall);
  const int wide = min(8, width - 8 * tile);
  return (8 * band + in_tile / wide) * width + 8 * tile + in_tile % wide;
}

// order[p]: the token at position p, -1 where there is none; place[token]: its position, or -1. One program an image.
__global__ void __launch_bounds__(kThreads) asa_order_kernel(const bool* real, int n, int height, int width, int padded,
                                                             int32_t* order, int32_t* place, int32_t* counts) {
  const int image = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  order += int64_t(image) * padded, place += int64_t(image) * n;
  if (real != nullptr) real += int64_t(image) * n;
  int* const in_warps = reinterpret_cast<int*>(shared_memory());  // [2][kWarps], in turn
  int found = 0, turn = 0;
  for (int start = 0; start < n; start += kThreads, turn ^= 1) {
    const int p = start + int(threadIdx.x);
    const int token = p < n ? token_at(p, height, width) : 0;
    const bool is_real = p < n && (real == nullptr || real[token]);
    const unsigned votes = __ballot_sync(~0u, is_real);
    if (lane == 0) in_warps[turn * kWarps + warp] = __popc(votes);
    __syncthreads();
    int before = found;
    for (int w = 0; w < kWarps; ++w) {
      const int here = in_warps[turn * kWarps + w];
      before += w < warp ? here : 0;
      found += here;
    }
    const int position = before + __popc(votes & first_bits(lane));
    if (is_real) order[position] = token;
    if (p < n) place[token] = is_real ? position : -1;
  }
  for (int p = found + int(threadIdx.x); p < padded; p += kThreads) order[p] = -1;
  if (threadIdx.x == 0) counts[image] = found;
}

// out[z, p] = x[token at p], zeros up to `width`. A row a warp.
template <class T>
__global__ void __launch_bounds__(kThreads) asa_arrange_kernel(const T* x, Strides strides, int heads, int per_image, Order order,
                                                               int dim, int width, T* out) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int z = int(row / order.padded), p = int(row % order.padded), lane = threadIdx.x % 32;
  const int token = order.order[row_at(image_of(z, heads, per_image), order.padded, p)];
  const T* const from = x + z / heads * strides.b + z % heads * strides.h + token * strides.n;
  for (int d = lane; d < width; d += 32)
    out[row * width + d] = token >= 0 && d < dim ? from[d * strides.d] : from_float<T>(0);
}

}  // namespace

void find_order(const bool* real, int images, int n, int height, int width, int padded, int32_t* order, int32_t* place,
                int32_t* counts, cudaStream_t stream) {
  launch("asa_order_kernel", &asa_order_kernel, dim3(images), kThreads, 2 * kWarps * sizeof(int), stream, real, n, height, width,
         padded, order, place, counts);
}

template <class T>
void arrange(const T* x, Strides strides, int zs, int heads, int per_image, const Order& order, int dim, int width, T* out,
             cudaStream_t stream) {
  launch("asa_arrange_kernel", &asa_arrange_kernel<T>, dim3(int64_t(zs) * order.padded / kWarps), kThreads, 0, stream, x, strides,
         heads, per_image, order, dim, width, out);
}
template void arrange(const Half*, Strides, int, int, int, const Order&, int, int, Half*, cudaStream_t);
template void arrange(const BFloat16*, Strides, int, int, int, const Order&, int, int, BFloat16*, cudaStream_t);
template void arrange(const float*, Strides, int, int, int, const Order&, int, int, float*, cudaStream_t);

}  // namespace asa_ops::cuda
