// dq for compute capability 9.0: ds = p (<do, v> - delta), and dq = scale * ds k, summed over the survivors of rows.
//
// An item is two blocks of queries, one a warpgroup, and a stretch of their list. Q and dO stay, blocks of K and V pass;
// K is read along its rows for scores and across them for the sum. Lists that programs share are as in sums.cu.

#include "pipeline.h"

namespace asa_ops::cuda::hopper {
namespace {

template <int D>
struct Shape {
  static constexpr int kBlockBytes = kBlock * D * 2;
  using Others = Ring<D == 256 ? 3 : D == 128 ? 6 : 8, kBlockBytes>;
  static constexpr int kOwnBytes = 2 * kReaders * kBlockBytes;  // of Q, then of dO
  static constexpr int kBytes =
      1024 + kOwnBytes + Others::kBytes + (Others::kBarriers + 2) * int(sizeof(Barrier)) + int(sizeof(Stretch));
  static_assert(kBytes <= kSharedBytes);
};

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1)
    asa_dq_kernel(Problem<T> p, Lists lists, RowGradients rows, PartialSums parts, T* dq) {
#if ASA_OPS_SM90A
  using Others = typename Shape<D>::Others;
  constexpr int kBlockBytes = Shape<D>::kBlockBytes, kRows = kReaders * kBlock;
  char* const memory = aligned_shared_memory();
  char* const own_gradients = memory + kReaders * kBlockBytes;
  Barrier* const barriers = reinterpret_cast<Barrier*>(memory + Shape<D>::kOwnBytes + Others::kBytes);
  const Others others(memory + Shape<D>::kOwnBytes, barriers);
  Barrier *const own_full = barriers + Others::kBarriers, *const own_empty = own_full + 1;
  const int group = group_of_thread();
  if (threadIdx.x == 0) {
    others.init(kReaders * 4);
    barrier_init(own_full, 1), barrier_init(own_empty, kReaders * 4);
    barrier_init_done();
  }
  __syncthreads();
  const Work<T> work(p, lists, true, own_empty + 1);

  if (group == kReaders) {
    fewer_registers<kCopierRegisters>();
    if (threadIdx.x != kReaders * kGroup) return;
    uint32_t position = 0, turn = 0;
    work.each([&](const Item& item) {
      if (item.first >= item.end) return;
      const int z = work.head(item), block = work.block(item);
      const Entries entries(lists, item.tile);
      const int own_bytes = min(p.rows.blocks() - block, kReaders) * kBlockBytes;
      const int64_t own = row_at(z, p.rows.padded, block * kBlock) * D, keys = row_at(z, p.keys.padded, 0) * D;
      barrier_wait(own_empty, (turn++ & 1) ^ 1);
      barrier_expect(own_full, 2 * own_bytes);
      copy_bytes(memory, p.q + own, own_bytes, own_full);
      copy_bytes(own_gradients, p.d_out + own, own_bytes, own_full);
      for (int e = item.first; e < item.end; ++e) {
        const int64_t other = keys + int64_t(entries.block(e)) * kBlock * D;
        for (const T* const tokens : {p.k, p.v})
          others.fill(position++, kBlockBytes,
                      [&](char* to, Barrier* full) { copy_bytes(to, tokens + other, kBlockBytes, full); });
      }
    });
    return;
  }

  more_registers<kReaderRegisters>();
  const Place at;
  const int lane = threadIdx.x % 32;
  const uint32_t query = shared_address(memory) + group * kBlockBytes;
  const uint32_t gradient = shared_address(own_gradients) + group * kBlockBytes;
  uint32_t position = 0, turn = 0;

  work.each([&](const Item& x) {
    const Item item = uniform_item(x);
    const int z = work.head(item), block = work.block(item) + group;
    const int image = image_of(z, p.heads, p.per_image), n_keys = p.keys.counts[image];
    const Entries entries(lists, item.tile);
    const bool there = block < p.rows.blocks();
    const uint32_t use = there ? kEntryFirst << group : 0;
    const int row = (there ? block : 0) * kBlock + at.row;
    const uint32_t* const words = p.survivors.words == nullptr ? nullptr : p.survivors.of(z) + row;
    const float shrink = shrink_of(p.bounds, p.n_heads, z);
    float top[2], share[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t index = row_at(z, p.rows.padded, row + 8 * half);
      top[half] = rows.grad_top[index], share[half] = rows.share[index] * shrink, delta[half] = rows.delta[index];
    }
    float sum[D / 2], s[kBlock / 2], ds[kBlock / 2];
    uint32_t weights[kBlock / 4];
#pragma unroll
    for (int n = 0; n < D / 2; ++n) sum[n] = 0;
    if (item.first < item.end) barrier_wait(own_full, turn++ & 1);
    for (int e = item.first; e < item.end; ++e, position += 2) {
      const uint32_t entry = uint32_t(uniform(int(entries[e])));
      if (!(entry & use)) {
        others.wait(position), others.free(position);
        others.wait(position + 1), others.free(position + 1);
        continue;
      }
      const int j = int(entry & kEntryBlock);
      uint32_t low[2], high[2];  // the bits of the thread's rows, shifted right by its column
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* const from = words + int64_t(2 * j) * p.rows.padded + 8 * half;
        low[half] = (words == nullptr ? first_bits(n_keys - 64 * j) : from[0]) >> at.column;
        high[half] = (words == nullptr ? first_bits(n_keys - 64 * j - 32) : from[p.rows.padded]) >> at.column;
      }
      others.wait(position);
      products_fence();
      multiply_rows<T, kBlock, D>(s, query, kChunkBytes, others.address(position), kChunkBytes, true);
      products_commit();
      others.wait(position + 1);
      products_fence();
      multiply_rows<T, kBlock, D>(ds, gradient, kChunkBytes, others.address(position + 1), kChunkBytes, true);
      products_commit();
      products_wait<1>();
      settled(s);
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[4 * n + i] = exp2_fast(fminf(fmaf(s[4 * n + i], p.scale2, -top[i / 2]), 0));
      products_wait<0>();
      settled(ds);
      others.free(position + 1);
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[4 * n + i] = survives_in(low[i / 2], high[i / 2], n, i % 2)
                             ? s[4 * n + i] * share[i / 2] * (ds[4 * n + i] - delta[i / 2])
                             : 0;
      pack_weights<T, kBlock>(weights, s);
      products_fence();
      multiply_weights<T, D, kBlock>(sum, weights, others.address(position), kChunkBytes, false);
      products_commit();
      products_wait<0>();
      settled(sum);
      settled(weights);
      others.free(position);
    }
    if (item.first < item.end) {
      __syncwarp();
      if (lane == 0) barrier_arrive(own_empty);
    }
    const int64_t part = (group * kBlock + at.row) * D + at.column;
    if (!sum_parts<T, D>(work, item, parts, part, kRows * D, sum) || !there) return;
    const float factor = rows.not_finite_head[z] != 0 ? NAN : p.scale / shrink;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = p.rows.order[row_at(image, p.rows.padded, row + 8 * half)];
      if (token >= 0)
        store_row<T, D>(dq + row_at(z, p.rows.n, token) * p.dim, p.dim, at.column,
                        [&](int n, int k) { return sum[4 * n + 2 * half + k] * factor; });
    }
  });
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
         T* dq, cudaStream_t stream) {
  launch("asa_dq_kernel", &asa_dq_kernel<T, D>, dim3(programs), kProgram, Shape<D>::kBytes, stream, p, lists, row,
         parts, dq);
}

}  // namespace

template <class T>
void find_dq(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
             T* dq, cudaStream_t stream) {
  if (p.width == 64) return run<T, 64>(p, lists, row, parts, programs, dq, stream);
  if (p.width == 128) return run<T, 128>(p, lists, row, parts, programs, dq, stream);
  run<T, 256>(p, lists, row, parts, programs, dq, stream);
}

template void find_dq(const Problem<Half>&, const Lists&, const RowGradients&, const PartialSums&, int, Half*,
                      cudaStream_t);
template void find_dq(const Problem<BFloat16>&, const Lists&, const RowGradients&, const PartialSums&, int, BFloat16*,
                      cudaStream_t);

}  // namespace asa_ops::cuda::hopper
