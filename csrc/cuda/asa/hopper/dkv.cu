// dk and dv for compute capability 9.0: dv = p^T do and dk = scale * ds^T q, summed over the queries of which a key is a
// survivor.
//
// An item is a block of 64 keys and a stretch of its list. K and V stay, blocks of Q and dO pass. Both sums of 64 x 256
// would fill a thread's registers, so the warpgroups divide the work, not the rows: the first forms p transposed and
// sums dv; the second forms <v, do> transposed, gets p from the first through shared memory (a thread's numbers lie
// alike in both), and sums dk one block behind, so that its products run while the first takes exponentials. Lists that
// programs share are as in sums.cu.

#include "pipeline.h"

#include <cfloat>

namespace asa_ops::cuda::hopper {
namespace {

constexpr int kExchanges = 2;  // of p, in turn

template <int D>
struct Shape {
  static constexpr int kBlockBytes = kBlock * D * 2;
  using Others = Ring<D == 256 ? 2 : 4, kBlockBytes>;  // of Q, and of dO
  static constexpr int kExchangeBytes = kExchanges * kBlock * kBlock * int(sizeof(float));
  static constexpr int kBarriers = 2 * Others::kBarriers + 2 + 2 * kExchanges;
  static constexpr int kBytes = 1024 + 2 * kBlockBytes + 2 * Others::kBytes + kExchangeBytes +
                                kBarriers * int(sizeof(Barrier)) + int(sizeof(Stretch));
  static_assert(kBytes <= kSharedBytes);
};

// Calls use(n, k, x) for what an array says of the thread's columns, queries from `first` on.
template <class Use>
__device__ __forceinline__ void each_column(const float* of_queries, int64_t first, const Place& at, Use use) {
#pragma unroll
  for (int n = 0; n < kBlock / 8; ++n) {
    const float2 x = *reinterpret_cast<const float2*>(of_queries + first + 8 * n + at.column);
    use(n, 0, x.x), use(n, 1, x.y);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1)
    asa_dkv_kernel(Problem<T> p, Lists lists, RowGradients rows, PartialSums parts, T* dk, T* dv) {
#if ASA_OPS_SM90A
  using Others = typename Shape<D>::Others;
  constexpr int kBlockBytes = Shape<D>::kBlockBytes;
  char* const memory = aligned_shared_memory();
  char* const first_query = memory + 2 * kBlockBytes;
  char* const first_gradient = first_query + Others::kBytes;
  float4* const exchange = reinterpret_cast<float4*>(first_gradient + Others::kBytes);  // [kExchanges][8][kGroup]
  Barrier* const barriers = reinterpret_cast<Barrier*>(exchange + kExchanges * 8 * kGroup);
  const Others queries(first_query, barriers), gradients(first_gradient, barriers + Others::kBarriers);
  Barrier *const own_full = barriers + 2 * Others::kBarriers, *const own_empty = own_full + 1;
  Barrier *const given = own_empty + 1, *const taken = given + kExchanges;  // p is there; it may be overwritten
  const int group = group_of_thread();
  if (threadIdx.x == 0) {
    queries.init(kReaders * 4), gradients.init(kReaders * 4);
    barrier_init(own_full, 1), barrier_init(own_empty, kReaders * 4);
    for (int i = 0; i < kExchanges; ++i) barrier_init(given + i, kGroup), barrier_init(taken + i, kGroup);
    barrier_init_done();
  }
  __syncthreads();
  const Work<T> work(p, lists, false, given + 2 * kExchanges);

  if (group == kReaders) {
    fewer_registers<kCopierRegisters>();
    if (threadIdx.x != kReaders * kGroup) return;
    uint32_t position = 0, turn = 0;
    work.each([&](const Item& item) {
      if (item.first >= item.end) return;
      const int z = work.head(item);
      const Entries entries(lists, item.tile);
      const int64_t own = row_at(z, p.keys.padded, work.block(item) * kBlock) * D;
      barrier_wait(own_empty, (turn++ & 1) ^ 1);
      barrier_expect(own_full, 2 * kBlockBytes);
      copy_bytes(memory, p.k + own, kBlockBytes, own_full);
      copy_bytes(memory + kBlockBytes, p.v + own, kBlockBytes, own_full);
      for (int e = item.first; e < item.end; ++e, ++position) {
        const int64_t other = row_at(z, p.rows.padded, entries.block(e) * kBlock) * D;
        queries.fill(position, kBlockBytes,
                     [&](char* to, Barrier* full) { copy_bytes(to, p.q + other, kBlockBytes, full); });
        gradients.fill(position, kBlockBytes,
                       [&](char* to, Barrier* full) { copy_bytes(to, p.d_out + other, kBlockBytes, full); });
      }
    });
    return;
  }

  more_registers<kReaderRegisters>();
  const Place at;
  const int lane = threadIdx.x % 32;
  const uint32_t key = shared_address(memory), value = key + kBlockBytes;
  float4* const mine = exchange + threadIdx.x % kGroup;
  uint32_t position = 0, turn = 0;
  float sum[D / 2], s[kBlock / 2];
  uint32_t weights[kBlock / 4];

  // Starts an item: waits for K and V.
  const auto begin = [&](const Item& item) {
#pragma unroll
    for (int n = 0; n < D / 2; ++n) sum[n] = 0;
    if (item.first < item.end) barrier_wait(own_full, turn++ & 1);
  };
  // Ends it: stores the rows of dv or dk, which have `dim` numbers.
  const auto end = [&](const Item& item, T* out, int dim, float factor) {
    if (item.first < item.end) {
      __syncwarp();
      if (lane == 0) barrier_arrive(own_empty);
    }
    const int64_t part = (group * kBlock + at.row) * D + at.column;
    if (!sum_parts<T, D>(work, item, parts, part, kReaders * kBlock * D, sum)) return;
    const int z = work.head(item), image = image_of(z, p.heads, p.per_image);
    if (rows.not_finite_head[z] != 0) factor = NAN;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position_of = work.block(item) * kBlock + at.row + 8 * half;
      const int token = p.keys.order[row_at(image, p.keys.padded, position_of)];
      if (token >= 0)
        store_row<T, D>(out + row_at(z, p.keys.n, token) * dim, dim, at.column,
                        [&](int n, int k) { return sum[4 * n + 2 * half + k] * factor; });
    }
  };

  if (group == 0) {  // p and dv
    work.each([&](const Item& x) {
      const Item item = uniform_item(x);
      const int z = work.head(item), block = work.block(item), image = image_of(z, p.heads, p.per_image);
      const int n_rows = p.rows.counts[image], keys_left = p.keys.counts[image] - block * kBlock - at.row / 32 * 32;
      const Entries entries(lists, item.tile);
      // Bits of the 32 keys among which the thread's rows are, of queries.
      const uint32_t* const words =
          p.survivors.words == nullptr
              ? nullptr
              : p.survivors.of(z) + int64_t(2 * block + at.row / 32) * p.rows.padded + at.column;
      begin(item);
      for (int e = item.first; e < item.end; ++e, ++position) {
        const int i = uniform(entries.block(e));
        uint32_t bits = 0;  // 4 n + 2 half + k
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n) {
          uint2 two;
          if (words != nullptr) {
            two = *reinterpret_cast<const uint2*>(words + i * kBlock + 8 * n);
          } else {
            const int query = i * kBlock + 8 * n + at.column;
            two = {query < n_rows ? first_bits(keys_left) : 0, query + 1 < n_rows ? first_bits(keys_left) : 0};
          }
          const uint32_t even = two.x >> at.row % 32, odd = two.y >> at.row % 32;
          bits |= ((even & 1) | (odd & 1) << 1 | (even >> 8 & 1) << 2 | (odd >> 8 & 1) << 3) << (4 * n);
        }
        queries.wait(position);
        products_fence();
        multiply_rows<T, kBlock, D>(s, key, kChunkBytes, queries.address(position), kChunkBytes, true);
        products_commit();
        products_wait<0>();
        settled(s);
        queries.free(position);
        const int64_t first = row_at(z, p.rows.padded, i * kBlock);
        each_column(rows.top, first, at, [&](int n, int k, float top) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& p_ij = s[4 * n + 2 * half + k];
            p_ij = exp2_fast(fminf(fmaf(p_ij, p.scale2, -top), 0));
          }
        });
        // Not 0 where a pair survives: the other warpgroup tells survivors by that.
        each_column(rows.share, first, at, [&](int n, int k, float share) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& p_ij = s[4 * n + 2 * half + k];
            p_ij = bits >> (4 * n + 2 * half + k) & 1 ? fmaxf(p_ij * share, FLT_MIN) : 0;
          }
        });
        barrier_wait(taken + position % kExchanges, (position / kExchanges & 1) ^ 1);
#pragma unroll
        for (int n = 0; n < 8; ++n)
          mine[(position % kExchanges * 8 + n) * kGroup] = float4{s[4 * n], s[4 * n + 1], s[4 * n + 2], s[4 * n + 3]};
        barrier_arrive(given + position % kExchanges);
        pack_weights<T, kBlock>(weights, s);
        gradients.wait(position);
        products_fence();
        multiply_weights<T, D, kBlock>(sum, weights, gradients.address(position), kChunkBytes, false);
        products_commit();
        products_wait<0>();
        settled(sum);
        settled(weights);
        gradients.free(position);
      }
      end(item, dv, p.dim_v, 1);
    });
    return;
  }

  work.each([&](const Item& x) {  // dk
    const Item item = uniform_item(x);
    const int z = work.head(item);
    const Entries entries(lists, item.tile);
    const float shrink = shrink_of(p.bounds, p.n_heads, z);
    begin(item);
    // ds from <v, do> and p, at `position`.
    const auto weigh = [&](int e) {
      const int64_t first = row_at(z, p.rows.padded, uniform(entries.block(e)) * kBlock);
      each_column(rows.delta, first, at,
                  [&](int n, int k, float delta) { s[4 * n + k] -= delta, s[4 * n + 2 + k] -= delta; });
      barrier_wait(given + position % kExchanges, position / kExchanges & 1);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float4 p_ij = mine[(position % kExchanges * 8 + n) * kGroup];
        s[4 * n] = p_ij.x != 0 ? p_ij.x * s[4 * n] * shrink : 0;
        s[4 * n + 1] = p_ij.y != 0 ? p_ij.y * s[4 * n + 1] * shrink : 0;
        s[4 * n + 2] = p_ij.z != 0 ? p_ij.z * s[4 * n + 2] * shrink : 0;
        s[4 * n + 3] = p_ij.w != 0 ? p_ij.w * s[4 * n + 3] * shrink : 0;
      }
      barrier_arrive(taken + position % kExchanges);
      // A single survivor has all the weight, so no gradient.
      each_column(rows.grad_top, first, at, [&](int n, int k, float top) {
        if (top == INFINITY) s[4 * n + k] = s[4 * n + 2 + k] = 0;
      });
    };
    if (item.first < item.end) {
      gradients.wait(position);
      products_fence();
      multiply_rows<T, kBlock, D>(s, value, kChunkBytes, gradients.address(position), kChunkBytes, true);
      products_commit();
      products_wait<0>();
      settled(s);
      gradients.free(position);
      weigh(item.first);
      pack_weights<T, kBlock>(weights, s);
      for (int e = item.first + 1; e < item.end; ++e) {
        gradients.wait(position + 1);
        products_fence();
        multiply_rows<T, kBlock, D>(s, value, kChunkBytes, gradients.address(position + 1), kChunkBytes, true);
        products_commit();
        queries.wait(position);
        products_fence();
        multiply_weights<T, D, kBlock>(sum, weights, queries.address(position), kChunkBytes, false);
        products_commit();
        products_wait<1>();
        settled(s);
        gradients.free(position + 1);
        ++position;
        weigh(e);
        products_wait<0>();
        settled(sum);
        settled(weights);
        queries.free(position - 1);
        pack_weights<T, kBlock>(weights, s);
      }
      queries.wait(position);
      products_fence();
      multiply_weights<T, D, kBlock>(sum, weights, queries.address(position), kChunkBytes, false);
      products_commit();
      products_wait<0>();
      settled(sum);
      queries.free(position);
      ++position;
    }
    end(item, dk, p.dim, p.scale / shrink);
  });
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
         T* dk, T* dv, cudaStream_t stream) {
  launch("asa_dkv_kernel", &asa_dkv_kernel<T, D>, dim3(programs), kProgram, Shape<D>::kBytes, stream, p, lists, row,
         parts, dk, dv);
}

}  // namespace

template <class T>
void find_dkv(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
              T* dk, T* dv, cudaStream_t stream) {
  if (p.width == 64) return run<T, 64>(p, lists, row, parts, programs, dk, dv, stream);
  if (p.width == 128) return run<T, 128>(p, lists, row, parts, programs, dk, dv, stream);
  run<T, 256>(p, lists, row, parts, programs, dk, dv, stream);
}

template void find_dkv(const Problem<Half>&, const Lists&, const RowGradients&, const PartialSums&, int, Half*, Half*,
                       cudaStream_t);
template void find_dkv(const Problem<BFloat16>&, const Lists&, const RowGradients&, const PartialSums&, int, BFloat16*,
                       BFloat16*, cudaStream_t);

}  // namespace asa_ops::cuda::hopper
