// dq for compute capability 9.0: ds = p (<do, v> - delta), and dq = scale * ds k, summed over the survivors of rows.
//
// An item is two blocks of queries, one a warpgroup, and a stretch of their list. Q and dO stay, blocks of K and V pass;
// K is read along its rows for scores and across them for the sum; of float32 it passes a second time, transposed. Lists
// that programs share are as in sums.cu.

#include "pipeline.h"

namespace asa_ops::cuda::hopper {
namespace {

template <class T, int D>
struct Memory {
  static constexpr int kTokenBytes = D * int(sizeof(T));
  static constexpr int kBlockBytes = kBlock * kTokenBytes, kOwnBytes = kReaders * kBlockBytes;
  using Others = Ring<kTokenBytes == 512 ? 3 : kTokenBytes == 256 ? 6 : 8, kBlockBytes>;
  char* const queries = aligned_shared_memory();
  char* const gradients = queries + kOwnBytes;
  Barrier* const barriers = reinterpret_cast<Barrier*>(gradients + kOwnBytes + Others::kBytes);
  const Others others{gradients + kOwnBytes, barriers};
  Barrier *const own_full = barriers + Others::kBarriers, *const own_empty = own_full + 1;
  Stretches& stretches = *reinterpret_cast<Stretches*>(own_empty + 1);

  static constexpr int kBytes =
      1024 + 2 * kOwnBytes + Others::kBytes + (Others::kBarriers + 2) * int(sizeof(Barrier)) + int(sizeof(Stretches));
  static_assert(kBytes <= kSharedBytes);
};

// What one thread copies to shared memory.
template <class T, int D>
__device__ __forceinline__ void copy_tiles(const Problem<T>& p, const Lists& lists) {
  const Memory<T, D> memory;
  const Work<T> work(p, lists, true, memory.stretches);
  constexpr int kBlockBytes = Memory<T, D>::kBlockBytes;
  uint32_t position = 0, turn = 0;
  work.each([&](const Item& item) {
    if (item.first >= item.end) return;
    const int z = work.head(item), block = work.block(item);
    const Entries entries(lists, item.tile);
    const int own_bytes = min(p.rows.blocks() - block, kReaders) * kBlockBytes;
    const int64_t own = row_at(z, p.rows.padded, block * kBlock) * D, keys = row_at(z, p.keys.padded, 0) * D;
    barrier_wait(memory.own_empty, (turn++ & 1) ^ 1);
    barrier_expect(memory.own_full, 2 * own_bytes);
    copy_bytes(memory.queries, p.q + own, own_bytes, memory.own_full);
    copy_bytes(memory.gradients, p.d_out + own, own_bytes, memory.own_full);
    for (int e = item.first; e < item.end; ++e) {
      const int64_t other = keys + int64_t(entries.block(e)) * kBlock * D;
      const auto fill = [&](const T* tokens) {
        memory.others.fill(position++, kBlockBytes,
                           [&](char* to, Barrier* full) { copy_bytes(to, tokens + other, kBlockBytes, full); });
      };
      fill(p.k), fill(p.v);
      if (kTransposed<T>) fill(p.k_transposed);
    }
  });
}

// What the other warpgroups do with it.
template <class T, int D>
__device__ __forceinline__ void sum_tiles(const Problem<T>& p, const Lists& lists, const RowGradients& rows,
                                          const PartialSums& parts, T* dq, int group) {
  const Memory<T, D> memory;
  const Work<T> work(p, lists, true, memory.stretches);
  constexpr int kRows = kReaders * kBlock;
  const Place at;
  const uint32_t query = uniform_address(memory.queries) + group * Memory<T, D>::kBlockBytes;
  const uint32_t gradient = uniform_address(memory.gradients) + group * Memory<T, D>::kBlockBytes;
  constexpr int kSlots = kTransposed<T> ? 3 : 2;  // of an entry: K and V, and what is summed, the last one or K
  constexpr int kSummed = kTransposed<T> ? 2 : 0;
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
    float top[2], share[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t index = row_at(z, p.rows.padded, row + 8 * half);
      top[half] = rows.grad_top[index], share[half] = rows.share[index] * shrink_of(p.bounds, p.n_heads, z),
      delta[half] = rows.delta[index];
    }
    float sum[D / 2], s[kBlock / 2], ds[kBlock / 2];
    uint32_t weights[kWeights<T>];
#pragma unroll
    for (int n = 0; n < D / 2; ++n) sum[n] = 0;
    if (item.first < item.end) barrier_wait(memory.own_full, turn++ & 1);
    for (int e = item.first; e < item.end; ++e, position += kSlots) {
      const uint32_t entry = uint32_t(uniform(int(entries[e])));
      if (!(entry & use)) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
          memory.others.wait(position + slot), memory.others.free(position + slot);
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
      memory.others.wait(position);
      products_fence();
      multiply_rows<Factor<T>, kBlock, D>(s, query, kChunkBytes, memory.others.address(position), kChunkBytes, true);
      products_commit();
      memory.others.wait(position + 1);
      products_fence();
      multiply_rows<Factor<T>, kBlock, D>(ds, gradient, kChunkBytes, memory.others.address(position + 1), kChunkBytes,
                                          true);
      products_commit();
      products_wait<1>();
      settled(s);
      if (kTransposed<T>) memory.others.free(position);
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[4 * n + i] = exp2_fast(fminf(fmaf(s[4 * n + i], p.scale2, -top[i / 2]), 0));
      products_wait<0>();
      settled(ds);
      memory.others.free(position + 1);
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[4 * n + i] = survives_in(low[i / 2], high[i / 2], n, i % 2)
                             ? s[4 * n + i] * share[i / 2] * (ds[4 * n + i] - delta[i / 2])
                             : 0;
      pack_weights<Factor<T>, kBlock>(weights, s);
      if (kTransposed<T>) memory.others.wait(position + kSummed);
      products_fence();
      multiply_weights<Factor<T>, D, kBlock>(sum, weights, memory.others.address(position + kSummed),
                                             kSummedPanel<T, D>, false);
      products_commit();
      products_wait<0>();
      settled(sum);
      settled(weights);
      memory.others.free(position + kSummed);
    }
    if (item.first < item.end && thread_number() % 32 == 0)
      barrier_arrive(memory.own_empty);  // after __syncwarp in free
    const int64_t part = (group * kBlock + at.row) * D + at.column;
    const float factor = rows.not_finite_head[z] != 0 ? NAN : p.scale / shrink_of(p.bounds, p.n_heads, z);
    with_whole_sum<T, D>(work, item, parts, part, kRows * D, sum, [&](auto unroll, int half, auto values) {
      const int token = there ? p.rows.order[row_at(image, p.rows.padded, row + 8 * half)] : -1;
      if (token < 0) return;
      store_row<T, D, unroll>(dq + row_at(z, p.rows.n, token) * p.dim, nullptr, p.dim, at.column, [&](int n) {
        const float2 x = values(n);
        return float2{x.x * factor, x.y * factor};
      });
    });
  });
}

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1)
    asa_dq_kernel(Problem<T> p, Lists lists, RowGradients rows, PartialSums parts, T* dq) {
#if ASA_OPS_SM90A
  {
    const Memory<T, D> memory;
    if (threadIdx.x == 0) {
      memory.others.init(kReaders * 4);
      barrier_init(memory.own_full, 1), barrier_init(memory.own_empty, kReaders * 4);
      barrier_init_done();
    }
    Work<T>(p, lists, true, memory.stretches).cut();  // all threads meet there
  }
  const int group = group_of_thread();
  if (group == kReaders) {
    fewer_registers<kCopierRegisters>();
    if (threadIdx.x == kReaders * kGroup) copy_tiles<T, D>(p, lists);
  } else {
    more_registers<kReaderRegisters>();
    sum_tiles<T, D>(p, lists, rows, parts, dq, group);
  }
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
         T* dq, cudaStream_t stream) {
  launch("asa_dq_kernel", &asa_dq_kernel<T, D>, dim3(programs), kProgram, Memory<T, D>::kBytes, stream, p, lists, row,
         parts, dq);
}

}  // namespace

template <class T>
void find_dq(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
             T* dq, cudaStream_t stream) {
  with_width<T>(p.width, [&](auto width) { run<T, width>(p, lists, row, parts, programs, dq, stream); });
}

template void find_dq(const Problem<Half>&, const Lists&, const RowGradients&, const PartialSums&, int, Half*,
                      cudaStream_t);
template void find_dq(const Problem<BFloat16>&, const Lists&, const RowGradients&, const PartialSums&, int, BFloat16*,
                      cudaStream_t);
template void find_dq(const Problem<float>&, const Lists&, const RowGradients&, const PartialSums&, int, float*,
                      cudaStream_t);

}  // namespace asa_ops::cuda::hopper
