// Tokens into the order and form that the other kernels read.
//
// Attention does not depend on the order of tokens, but which tiles are skipped does: neighbours on the grid are
// neighbours in memory if it is cut into tiles of 8 x 8, or 4 x 4 x 4. Real positions come first and zeros follow;
// padding is left out. A program arranges a block of one tensor. It finds the tokens of its block by itself, so that
// orders need no launch of their own.

#include "lists.h"
#include "rows.h"

namespace asa_ops::cuda {
namespace {

constexpr int kArrangeThreads = 256;

// The token at a position of the order: extra tokens, then tiles, 8 x 8 or, of a volume, 4 x 4 x 4: slabs of slices, in
// them bands of rows, in them tiles. Those at the borders are smaller, no position is empty.
__device__ __forceinline__ int token_at(int position, const Order& o) {
  if (position < o.extra) return position;
  position -= o.extra;
  const bool is_map = o.depth == 1;
  const int side = is_map ? 8 : 4, slab = is_map ? 0 : position / (side * o.height * o.width);
  const int thick = is_map ? 1 : min(side, o.depth - side * slab),
            in_slab = position - slab * side * o.height * o.width;
  const int band = in_slab / (side * thick * o.width), in_band = in_slab % (side * thick * o.width);
  const int tall = min(side, o.height - side * band);
  const int tile = in_band / (side * thick * tall), in_tile = in_band % (side * thick * tall);
  const int wide = min(side, o.width - side * tile);
  const int slice = is_map ? 0 : side * slab + in_tile / (tall * wide), row = side * band + in_tile / wide % tall;
  return o.extra + (slice * o.height + row) * o.width + side * tile + in_tile % wide;
}

struct alignas(16) Shared {
  int tokens[kBlock];
  int in_warps[kArrangeThreads / 32];
  uint32_t not_finite[kBlock / 32];
};

// The tokens of a block; with `store` also the orders in memory.
__device__ __forceinline__ void find_tokens(const Order& o, int image, int block, bool store, Shared& shared) {
  const int thread = threadIdx.x, position = block * kBlock + thread;
  int32_t* const place = o.place + int64_t(image) * o.n;
  int count = o.n;
  if (o.real == nullptr) {
    if (thread < kBlock) {
      const int token = position < o.n ? token_at(position, o) : -1;
      shared.tokens[thread] = token;
      if (store && token >= 0) place[token] = position;
    }
  } else {
    const bool* const real = o.real + int64_t(image) * o.n;
    const int share = (o.n + kArrangeThreads - 1) / kArrangeThreads;
    const int first = min(o.n, thread * share), last = min(o.n, first + share);
    int own = 0;
    for (int p = first; p < last; ++p) own += real[token_at(p, o)];
    if (thread < kBlock) shared.tokens[thread] = -1;
    int at = sum_before<kArrangeThreads>(own, shared.in_warps, count) - block * kBlock;
    for (int p = first; p < last; ++p) {
      const int token = token_at(p, o);
      if (store && block == 0 && p == o.extra) o.extra_counts[image] = at;
      if (!real[token]) {
        if (store && block == 0) place[token] = -1;
        continue;
      }
      if (at >= 0 && at < kBlock) {
        shared.tokens[at] = token;
        if (store) place[token] = block * kBlock + at;
      }
      ++at;
    }
  }
  __syncthreads();
  if (!store) return;
  if (thread < kBlock) o.order[int64_t(image) * o.padded + position] = shared.tokens[thread];
  if (block != 0 || thread != 0) return;
  o.counts[image] = count;
  if (o.real == nullptr || o.extra == o.n) o.extra_counts[image] = min(o.extra, count);
}

// Loads the tokens of a block to `stage`, arranged, with zeros up to their width and where there is none.
template <class T>
__device__ __forceinline__ void load_block(const Tokens<T>& x, int z, int heads, const int* tokens, T* stage) {
  const Strides& strides = x.strides;
  const T* const head = x.x + z / heads * strides.b + z % heads / strides.shared * strides.h;
  if (x.by_groups) {
    constexpr int kGroup = 16 / int(sizeof(T));
    const int groups = x.width / kGroup;
    for (int i = threadIdx.x; i < kBlock * groups; i += kArrangeThreads) {
      const int row = i / groups, d = i % groups * kGroup, token = tokens[row];
      const bool there = token >= 0 && d < x.dim;
      *reinterpret_cast<float4*>(stage + arranged_at<T>(row, d, x.width)) =
          there ? *reinterpret_cast<const float4*>(head + token * strides.n + d) : float4{0, 0, 0, 0};
    }
    return;
  }
  const bool along_tokens = strides.d != 1;
  for (int i = threadIdx.x; i < kBlock * x.width; i += kArrangeThreads) {
    const int row = along_tokens ? i % kBlock : i / x.width, d = along_tokens ? i / kBlock : i % x.width;
    const int token = tokens[row];
    stage[arranged_at<T>(row, d, x.width)] =
        token >= 0 && d < x.dim ? head[token * strides.n + d * strides.d] : from_float<T>(0);
  }
}

// Rounds a block to TF32: products of its numbers are exact in every kernel then, whatever multiplies them. What is
// finite stays so.
__device__ __forceinline__ void round_block(float* stage, int count) {
  for (int i = threadIdx.x; i < count; i += kArrangeThreads) {
    const float x = stage[i], rounded = bits_as<float>(tf32_bits(x));
    stage[i] = fabsf(x) < INFINITY && !(fabsf(rounded) < INFINITY) ? x : rounded;
  }
}

// Values that are not finite become 0, and the bits of their tokens are set; with `bounds` the head's largest is noted.
template <class T>
__device__ __forceinline__ void check_values(const Problem<T>& p, int z, int block, T* stage, Shared& shared) {
  if (threadIdx.x < kBlock / 32) shared.not_finite[threadIdx.x] = 0;
  __syncthreads();
  float largest = 0;
  for (int i = threadIdx.x; i < kBlock * p.width_v; i += kArrangeThreads) {
    const float x = fabsf(to_float(stage[i]));
    if (!(x < INFINITY)) {
      constexpr int kColumns = 128 / int(sizeof(T));
      const int row = i / kColumns % kBlock;
      atomicOr(&shared.not_finite[row / 32], 1u << row % 32);
      stage[i] = from_float<T>(0);
    } else {
      largest = fmaxf(largest, x);
    }
  }
  if (p.bounds != nullptr) {
    largest = max_over_warp(largest);
    if (threadIdx.x % 32 == 0) note_largest(p.bounds + z, largest);
  }
  __syncthreads();
  if (threadIdx.x < kBlock / 32)
    p.not_finite[row_at(z, p.keys.padded, block * kBlock) / 32 + threadIdx.x] = shared.not_finite[threadIdx.x];
}

// delta_i = <do_i, out_i>, and the other fields of RowGradients.
//
// The output of a row without survivors is constant, so a gradient that reaches it, even NaN, goes to the row's
// thresholds only: arranged is 0 and delta NaN then. A row whose output is NaN makes the gradients of its image and
// head NaN.
template <class T>
__device__ __forceinline__ void find_row_gradients(const Problem<T>& p, int z, int block, const Saved<T>& saved,
                                                   const RowGradients& row, const int* tokens, T* stage) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < kBlock; i += kArrangeThreads / 32) {
    const int64_t index = row_at(z, p.rows.padded, block * kBlock + i);
    const int token = tokens[i];
    if (token < 0) {
      if (lane != 0) continue;
      row.delta[index] = 0, row.share[index] = 1;
      row.top[index] = row.grad_top[index] = row.kept2[index] = INFINITY;
      continue;
    }
    const int64_t saved_row = row_at(z, p.rows.n, token);
    Vector gradient{}, out{}, residual{};
    bool finite = true, nan_row = false;
    each_number(p.dim_v, [&](int r, int d) {
      gradient.x[r] = to_float(stage[arranged_at<T>(i, d, p.width_v)]);
      finite = finite && fabsf(gradient.x[r]) < INFINITY;
      out.x[r] = to_float(saved.out[saved_row * p.dim_v + d]);
      nan_row = nan_row || out.x[r] != out.x[r];
      if (saved.residual.data != nullptr) residual.x[r] = to_float(saved.residual.of(z)[int64_t(token) * p.dim_v + d]);
    });
    nan_row = __any_sync(~0u, nan_row);
    const int survivors = saved.survivors[saved_row];
    const bool ended = (survivors == 0 || nan_row) && __any_sync(~0u, !finite);
    each_number(p.dim_v, [&](int r, int d) {
      const bool ends = (survivors == 0 || nan_row) && !(fabsf(gradient.x[r]) < INFINITY);
      if (ends) gradient.x[r] = 0, stage[arranged_at<T>(i, d, p.width_v)] = from_float<T>(0);
      if (out.x[r] != out.x[r]) out.x[r] = 0;
      if (residual.x[r] != residual.x[r]) residual.x[r] = 0;
    });
    const float delta = dot(gradient, out) + dot(gradient, residual);
    float size = 0;
    if (p.bounds != nullptr) {
      for (const float x : gradient.x) size += fabsf(x);
      size = sum_over_warp(size);
    }
    if (lane != 0) continue;
    if (p.bounds != nullptr && size < INFINITY) note_largest(p.bounds + p.n_heads + z, size);
    const float* const base2 = saved.base2.of(z) + token;
    const float largest = base2[p.rows.n], total = base2[2 * int64_t(p.rows.n)];
    const float top = top_of(largest);
    row.delta[index] = ended ? NAN : delta;
    row.top[index] = top;
    row.grad_top[index] = survivors == 1 ? INFINITY : top;
    row.share[index] = 1 / total;
    row.kept2[index] = largest + log2f(total);
    if (nan_row) atomicOr(row.not_finite_head + z, 1u);
  }
}

enum Role { kValue, kQuery, kKey, kGradient, kLists };  // of a program, by axis 1 of the grid

template <class T>
__global__ void __launch_bounds__(kArrangeThreads)
    asa_arrange_kernel(Problem<T> p, Arranging<T> all, Saved<T> saved, RowGradients row, Lists by_rows,
                       Lists by_columns) {
  const int64_t threads = int64_t(gridDim.x) * gridDim.y * kArrangeThreads;
  for (int64_t i = (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * kArrangeThreads + threadIdx.x;
       i < all.cleared_words; i += threads)
    all.cleared[i] = 0;
  if (blockIdx.y == kLists) {
    const int z = blockIdx.x;
    if (z >= p.n_heads) return;
    list_occupied(p, by_rows, z, true, threadIdx.x, kArrangeThreads);
    list_occupied(p, by_columns, z, false, threadIdx.x, kArrangeThreads);
    return;
  }
  const Tokens<T>& tokens = blockIdx.y == kValue   ? all.value
                            : blockIdx.y == kQuery ? all.query
                            : blockIdx.y == kKey   ? all.key
                                                   : all.gradient;
  const int blocks = tokens.order.count;
  if (tokens.out == nullptr || int64_t(blockIdx.x) >= int64_t(p.n_heads) * blocks) return;
  const int z = blockIdx.x / blocks, block = tokens.order.first + blockIdx.x % blocks;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  T* const stage = reinterpret_cast<T*>(shared_memory() + sizeof(Shared));
  const bool is_first = z % p.heads == 0 && (p.per_image == 1 || z == 0);
  const bool stores = is_first && (blockIdx.y == kValue || (blockIdx.y == kQuery && p.rows.order != p.keys.order));
  find_tokens(tokens.order, image_of(z, p.heads, p.per_image), block, stores, shared);
  load_block(tokens, z, p.heads, shared.tokens, stage);
  __syncthreads();
  if constexpr (std::is_same_v<T, float>)
    if (all.to_tf32) {
      round_block(stage, kBlock * tokens.width);
      __syncthreads();
    }
  if (blockIdx.y == kValue) check_values(p, z, block, stage, shared);
  if (blockIdx.y == kGradient) find_row_gradients(p, z, block, saved, row, shared.tokens, stage);
  __syncthreads();
  auto* const out =
      reinterpret_cast<float4*>(tokens.out + row_at(z, tokens.order.padded, block * kBlock) * tokens.width);
  for (int i = threadIdx.x; i < kBlock * tokens.width * int(sizeof(T)) / 16; i += kArrangeThreads)
    out[i] = reinterpret_cast<const float4*>(stage)[i];
  if constexpr (std::is_same_v<T, float>)
    if (tokens.transposed != nullptr) {
      float* const transposed = tokens.transposed + row_at(z, tokens.order.padded, block * kBlock) * tokens.width;
      for (int i = threadIdx.x; i < kBlock / 4 * tokens.width; i += kArrangeThreads) {  // four tokens, every other one
        const int d = i / 8 % tokens.width, first = i / 8 / tokens.width * 32 + i % 8 / 2 * 8 + i % 2;
        const auto at = [&](int row) { return stage[arranged_at<T>(row, d, tokens.width)]; };
        *reinterpret_cast<float4*>(transposed + transposed_at(first, d, tokens.width)) =
            float4{at(first), at(first + 2), at(first + 4), at(first + 6)};
      }
    }
}

template <class T>
void launch_arrange(const Problem<T>& p, const Arranging<T>& all, int roles, const Saved<T>& saved,
                    const RowGradients& row, const Lists& by_rows, const Lists& by_columns, cudaStream_t stream) {
  const int blocks = max(p.rows.blocks(), p.keys.blocks()), width = max(p.width, p.width_v);
  launch("asa_arrange_kernel", &asa_arrange_kernel<T>, dim3(p.n_heads * blocks, roles), kArrangeThreads,
         sizeof(Shared) + kBlock * width * sizeof(T), stream, p, all, saved, row, by_rows, by_columns);
}

}  // namespace

template <class T>
void arrange(const Problem<T>& problem, const Arranging<T>& tokens, cudaStream_t stream) {
  launch_arrange(problem, tokens, tokens.key.out == nullptr ? 2 : 3, {}, {}, {}, {}, stream);
}

template <class T>
void arrange_backward(const Problem<T>& problem, const Arranging<T>& tokens, const Saved<T>& saved,
                      const RowGradients& row, const Lists& by_rows, const Lists& by_columns, cudaStream_t stream) {
  const bool listed = by_rows.entries != nullptr || by_columns.entries != nullptr;  // one side may be empty
  launch_arrange(problem, tokens, listed ? 5 : 4, saved, row, by_rows, by_columns, stream);
}

#define INSTANTIATE(T)                                                                                         \
  template void arrange(const Problem<T>&, const Arranging<T>&, cudaStream_t);                                 \
  template void arrange_backward(const Problem<T>&, const Arranging<T>&, const Saved<T>&, const RowGradients&, \
                                 const Lists&, const Lists&, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
