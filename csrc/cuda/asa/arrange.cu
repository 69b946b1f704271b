// Tokens into the order and form that the other kernels read.
//
// Attention does not depend on the order of tokens, but which tiles are skipped does: neighbours on the map are
// neighbours in memory if the map is cut into tiles of 8 x 8. Real positions come first and zeros follow; padding is
// left out.

#include "rows.h"

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
  int placed = 0, turn = 0;
  for (int start = 0; start < n; start += kThreads, turn ^= 1) {
    const int p = start + int(threadIdx.x);
    const int token = p < n ? token_at(p, height, width) : 0;
    const bool is_real = p < n && (real == nullptr || real[token]);
    const unsigned votes = __ballot_sync(~0u, is_real);
    if (lane == 0) in_warps[turn * kWarps + warp] = __popc(votes);
    __syncthreads();
    int before = placed;
    for (int w = 0; w < kWarps; ++w) {
      const int here = in_warps[turn * kWarps + w];
      before += w < warp ? here : 0;
      placed += here;
    }
    const int position = before + __popc(votes & first_bits(lane));
    if (is_real) order[position] = token;
    if (p < n) place[token] = is_real ? position : -1;
  }
  for (int p = placed + int(threadIdx.x); p < padded; p += kThreads) order[p] = -1;
  if (threadIdx.x == 0) counts[image] = placed;
}

// out[z, p] = x[token at p], zeros up to `width`, of every tensor. Values that are not finite become 0 and the bit of
// their token is set; with `bounds`, the head's largest is kept there. A row a warp.
template <class T>
__global__ void __launch_bounds__(kThreads)
    asa_arrange_kernel(Tokens<T> value, Tokens<T> query, Tokens<T> key, int n_heads, int heads, int per_image,
                       uint32_t* not_finite, uint32_t* bounds) {
  const bool is_value = blockIdx.y == 0;
  const Tokens<T> tokens = is_value ? value : blockIdx.y == 1 ? query : key;
  if (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32 >= int64_t(n_heads) * tokens.order.padded) return;
  const WarpRow at(tokens.order, heads, per_image);
  const Strides& strides = tokens.strides;
  const T* const head = tokens.x + at.z / heads * strides.b + at.z % heads / strides.shared * strides.h;
  const T* const from = head + max(at.token, 0) * strides.n;
  bool finite = true;
  float largest = 0;
  each_number(tokens.width, [&](int, int d) {
    T number = at.token >= 0 && d < tokens.dim ? from[d * strides.d] : from_float<T>(0);
    if (is_value && !(fabsf(to_float(number)) < INFINITY)) finite = false, number = from_float<T>(0);
    tokens.out[at.index * tokens.width + d] = number;
    largest = fmaxf(largest, fabsf(to_float(number)));
  });
  if (!is_value) return;
  if (bounds != nullptr) {
    largest = max_over_warp(largest);
    if (threadIdx.x % 32 == 0) note_largest(bounds + at.z, largest);
  }
  if (__any_sync(~0u, !finite) && threadIdx.x % 32 == 0) atomicOr(not_finite + at.index / 32, 1u << at.index % 32);
}

// arranged = do in order, delta_i = <do_i, out_i>, and the other fields of RowGradients. A row a warp.
//
// The output of a row without survivors is constant, so a gradient that reaches it, even NaN, goes to the row's
// thresholds only: arranged is 0 and delta NaN then. A row whose output is NaN makes the gradients of its image and
// head NaN.
template <class T>
__global__ void __launch_bounds__(kThreads, kPrograms)
    asa_arrange_gradient_kernel(Problem<T> p, const T* d_out, Strides strides, Saved<T> saved, T* arranged,
                                RowGradients row) {
  const WarpRow at(p.rows, p.heads, p.per_image);
  const int lane = threadIdx.x % 32;
  if (at.token < 0) {
    each_number(p.width_v, [&](int, int d) { arranged[at.index * p.width_v + d] = from_float<T>(0); });
    if (lane != 0) return;
    row.delta[at.index] = 0, row.share[at.index] = 1;
    row.top[at.index] = row.grad_top[at.index] = row.kept2[at.index] = INFINITY;
    return;
  }
  const int64_t saved_row = row_at(at.z, p.rows.n, at.token);
  const T* const from = d_out + at.z / p.heads * strides.b + at.z % p.heads * strides.h + at.token * strides.n;
  Vector gradient{}, out{}, residual{};
  bool finite = true, nan_row = false;
  each_number(p.dim_v, [&](int r, int d) {
    gradient.x[r] = to_float(from[d * strides.d]);
    finite = finite && fabsf(gradient.x[r]) < INFINITY;
    out.x[r] = to_float(saved.out[saved_row * p.dim_v + d]);
    nan_row = nan_row || out.x[r] != out.x[r];
    if (saved.residual.data != nullptr)
      residual.x[r] = to_float(saved.residual.of(at.z)[int64_t(at.token) * p.dim_v + d]);
  });
  nan_row = __any_sync(~0u, nan_row);
  const int survivors = saved.survivors[saved_row];
  const bool ended = (survivors == 0 || nan_row) && __any_sync(~0u, !finite);
  each_number(p.width_v, [&](int r, int d) {
    const bool ends = (survivors == 0 || nan_row) && !(fabsf(gradient.x[r]) < INFINITY);
    gradient.x[r] = ends ? 0 : gradient.x[r];
    if (out.x[r] != out.x[r]) out.x[r] = 0;
    if (residual.x[r] != residual.x[r]) residual.x[r] = 0;
    arranged[at.index * p.width_v + d] = from_float<T>(gradient.x[r]);
  });
  const float delta = dot(gradient, out) + dot(gradient, residual);
  float size = 0;
  if (p.bounds != nullptr) {
    for (const float x : gradient.x) size += fabsf(x);
    size = sum_over_warp(size);
  }
  if (lane != 0) return;
  if (p.bounds != nullptr && size < INFINITY) note_largest(p.bounds + p.n_heads + at.z, size);
  const float* const base2 = saved.base2.of(at.z) + at.token;
  const float largest = base2[p.rows.n], total = base2[2 * int64_t(p.rows.n)];
  const float top = top_of(largest);
  row.delta[at.index] = ended ? NAN : delta;
  row.top[at.index] = top;
  row.grad_top[at.index] = survivors == 1 ? INFINITY : top;
  row.share[at.index] = 1 / total;
  row.kept2[at.index] = largest + log2f(total);
  if (nan_row) atomicOr(row.not_finite_head + at.z, 1u);
}

}  // namespace

void find_order(const bool* real, int images, int n, int height, int width, int padded, int32_t* order, int32_t* place,
                int32_t* counts, cudaStream_t stream) {
  launch("asa_order_kernel", &asa_order_kernel, dim3(images), kThreads, 2 * kWarps * sizeof(int), stream, real, n,
         height, width, padded, order, place, counts);
}

template <class T>
void arrange(const Tokens<T>& value, const Tokens<T>& query, const Tokens<T>& key, int tensors, int n_heads, int heads,
             int per_image, uint32_t* not_finite, uint32_t* bounds, cudaStream_t stream) {
  const Order& longest = value.order.padded > query.order.padded ? value.order : query.order;
  const dim3 programs(row_programs(n_heads, longest).x, tensors);
  launch("asa_arrange_kernel", &asa_arrange_kernel<T>, programs, kThreads, 0, stream, value, query, key, n_heads, heads,
         per_image, not_finite, bounds);
}

template <class T>
void arrange_gradient(const Problem<T>& problem, const T* d_out, Strides strides, const Saved<T>& saved, T* arranged,
                      const RowGradients& row, cudaStream_t stream) {
  launch("asa_arrange_gradient_kernel", &asa_arrange_gradient_kernel<T>, row_programs(problem.n_heads, problem.rows),
         kThreads, 0, stream, problem, d_out, strides, saved, arranged, row);
}

#define INSTANTIATE(T)                                                                                           \
  template void arrange(const Tokens<T>&, const Tokens<T>&, const Tokens<T>&, int, int, int, int, uint32_t*,     \
                        uint32_t*, cudaStream_t);                                                                \
  template void arrange_gradient(const Problem<T>&, const T*, Strides, const Saved<T>&, T*, const RowGradients&, \
                                 cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
