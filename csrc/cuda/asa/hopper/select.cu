// Which pairs survive, for compute capability 9.0: as asa_mask_kernel of ../select.cu decides them.
//
// An item is two blocks of rows, one a warpgroup, and a stretch of their list. Q and K of the rows stay, K and Q of the
// listed blocks pass: scores s_ij = <q_i, k_j>, and s_ji laid out [i, j] if neighbours must be mutual, none if query is
// key. A warpgroup without candidates in a block lets it pass.

#include "../mask.h"
#include "../thresholds.h"
#include "pipeline.h"

namespace asa_ops::cuda::hopper {
namespace {

template <int D>
struct Shape {
  static constexpr int kBlockBytes = kBlock * D * 2;
  using Others = Ring<D == 256 ? 3 : 6, kBlockBytes>;
  static constexpr int kOwnBytes = 2 * kReaders * kBlockBytes;  // of Q, then of K
  static constexpr int kBitsBytes = kReaders * int(sizeof(Bits));
  static constexpr int kBytes = 1024 + kOwnBytes + Others::kBytes + kBitsBytes +
                                (Others::kBarriers + 2) * int(sizeof(Barrier)) + int(sizeof(Stretch));
  static_assert(kBytes <= kSharedBytes);
};

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1)
    asa_mask_kernel(Problem<T> p, Plan plan, Saved<T> saved, uint32_t* done, Lists found) {
#if ASA_OPS_SM90A
  using Others = typename Shape<D>::Others;
  constexpr int kBlockBytes = Shape<D>::kBlockBytes;
  char* const memory = aligned_shared_memory();
  char* const own_keys = memory + kReaders * kBlockBytes;
  auto* const tiles = reinterpret_cast<Bits*>(memory + Shape<D>::kOwnBytes + Others::kBytes);
  Barrier* const barriers = reinterpret_cast<Barrier*>(tiles + kReaders);
  const Others others(memory + Shape<D>::kOwnBytes, barriers);
  Barrier *const own_full = barriers + Others::kBarriers, *const own_empty = own_full + 1;
  const int group = group_of_thread();
  if (threadIdx.x == 0) {
    others.init(kReaders * 4);
    barrier_init(own_full, 1), barrier_init(own_empty, kReaders * 4);
    barrier_init_done();
  }
  __syncthreads();
  const Lists& lists = plan.lists;
  const Work<T> work(p, lists, true, own_empty + 1);
  const bool two = p.mutual && !p.symmetric;  // products a tile

  if (group == kReaders) {
    fewer_registers<kCopierRegisters>();
    if (threadIdx.x != kReaders * kGroup) return;
    uint32_t position = 0, turn = 0;
    work.each([&](const Item& item) {
      const int z = work.head(item), block = work.block(item);
      const uint32_t* const entries = lists.entries + int64_t(item.tile) * lists.others;
      const int own_bytes = min(p.rows.blocks() - block, kReaders) * kBlockBytes;
      const int64_t own = row_at(z, p.rows.padded, block * kBlock) * D, keys = row_at(z, p.keys.padded, 0) * D;
      if (item.first >= item.end) return;
      barrier_wait(own_empty, (turn++ & 1) ^ 1);
      barrier_expect(own_full, two ? 2 * own_bytes : own_bytes);
      copy_bytes(memory, p.q + own, own_bytes, own_full);
      if (two) copy_bytes(own_keys, p.k + own, own_bytes, own_full);
      for (int e = item.first; e < item.end; ++e) {
        const int64_t other = keys + int64_t(entries[e] & kEntryBlock) * kBlock * D;
        const auto fill = [&](const T* from) {
          others.fill(position++, kBlockBytes,
                      [&](char* to, Barrier* full) { copy_bytes(to, from, kBlockBytes, full); });
        };
        fill(p.k + other);
        if (two) fill(p.q + other);
      }
    });
    return;
  }

  more_registers<kReaderRegisters>();
  const Place at;
  const int lane = threadIdx.x % 32, thread = threadIdx.x % kGroup;
  const uint32_t query = shared_address(memory) + group * kBlockBytes,
                 key = shared_address(own_keys) + group * kBlockBytes;
  const Thresholds& thresholds = plan.thresholds;
  const bool has_topk = thresholds.kappa2 != nullptr;
  uint32_t position = 0, turn = 0;

  work.each([&](const Item& x) {
    const Item item = uniform_item(x);
    const int z = work.head(item), block = work.block(item) + group;
    const int image = image_of(z, p.heads, p.per_image), n_keys = p.keys.counts[image];
    const uint32_t* const entries = lists.entries + int64_t(item.tile) * lists.others;
    const int64_t keys = row_at(z, p.keys.padded, 0);
    if (item.first < item.end) {
      RowThresholds own[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A warpgroup without rows passes every entry.
        const int64_t row = row_at(z, p.rows.padded, min(block, p.rows.blocks() - 1) * kBlock + at.row + 8 * half);
        own[half] = {thresholds.lse2[row], thresholds.cut2[row], has_topk ? thresholds.kappa2[row] : -INFINITY};
      }
      barrier_wait(own_full, turn++ & 1);
      for (int e = item.first; e < item.end; ++e) {
        const uint32_t entry = uint32_t(uniform(int(entries[e])));
        const uint32_t first = position, second = two ? position + 1 : position;
        position = second + 1;
        if (!(entry & kEntryFirst << group)) {
          others.wait(first), others.free(first);
          if (two) others.wait(second), others.free(second);
          continue;
        }
        const int j = int(entry & kEntryBlock);
        float s[kBlock / 2];
        others.wait(first);
        products_fence();
        multiply_rows<T, kBlock, D>(s, query, kChunkBytes, others.address(first), kChunkBytes, true);
        products_commit();
        products_wait<0>();
        settled(s);
        others.free(first);
        uint32_t bits = 0, back = 0;
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float s2 = s[4 * n + i] * p.scale2;
            const bool kept = s2 - own[i / 2].lse2 > own[i / 2].cut2 && s2 >= own[i / 2].kappa2 &&
                              j * kBlock + 8 * n + at.column + i % 2 < n_keys;
            bits |= uint32_t(kept) << (4 * n + i);
          }
        if (p.mutual) {
          if (two) {
            others.wait(second);
            products_fence();
            multiply_rows<T, kBlock, D>(s, key, kChunkBytes, others.address(second), kChunkBytes, true);
            products_commit();
            products_wait<0>();
            settled(s);
            others.free(second);
          }
          const int64_t column = keys + j * kBlock + at.column;
#pragma unroll
          for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const float lse2 = thresholds.lse2[column + 8 * n + k], cut2 = thresholds.cut2[column + 8 * n + k];
              const float kappa2 = has_topk ? thresholds.kappa2[column + 8 * n + k] : -INFINITY;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const float s2 = s[4 * n + 2 * half + k] * p.scale2;
                const bool kept = s2 - lse2 > cut2 && s2 >= kappa2 && block * kBlock + at.row + 8 * half < n_keys;
                back |= uint32_t(kept) << (4 * n + 2 * half + k);
              }
            }
        }
        const int row = thread % kBlock, side = thread / kBlock;
        const Found words = exchange_bits(p, tiles[group], bits, back, j == block, at.row, at.column, row, side,
                                          [&] { named_barrier(1 + group, kGroup); });
        store_bits(p, saved, z, image, block, j, entry & kEntryLocal, words, row, side);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(own_empty);
    }
    if (!p.few && arrive_last_of(done + z, work.counted(item), load_fresh(plan.entries + z), 3, kReaders * kGroup))
      list_occupied(p, found, z, true, threadIdx.x, kReaders * kGroup);
  });
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Plan& plan, const Saved<T>& saved, uint32_t* done, const Lists& lists,
         cudaStream_t stream) {
  launch("asa_mask_kernel<sm_90a>", &asa_mask_kernel<T, D>, dim3(programs_of(plan.lists, p.n_heads)), kProgram,
         Shape<D>::kBytes, stream, p, plan, saved, done, lists);
}

}  // namespace

template <class T>
void find_survivors(const Problem<T>& p, const Plan& plan, const Saved<T>& saved, uint32_t* done, const Lists& lists,
                    cudaStream_t stream) {
  if (p.width == 64) return run<T, 64>(p, plan, saved, done, lists, stream);
  if (p.width == 128) return run<T, 128>(p, plan, saved, done, lists, stream);
  run<T, 256>(p, plan, saved, done, lists, stream);
}

template void find_survivors(const Problem<Half>&, const Plan&, const Saved<Half>&, uint32_t*, const Lists&,
                             cudaStream_t);
template void find_survivors(const Problem<BFloat16>&, const Plan&, const Saved<BFloat16>&, uint32_t*, const Lists&,
                             cudaStream_t);

}  // namespace asa_ops::cuda::hopper
