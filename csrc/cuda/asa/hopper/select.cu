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

template <class T, int D>
struct Memory {
  static constexpr int kTokenBytes = D * int(sizeof(T));
  static constexpr int kBlockBytes = kBlock * kTokenBytes, kOwnBytes = kReaders * kBlockBytes;
  using Others = Ring<kTokenBytes == 512 ? 3 : 6, kBlockBytes>;
  char* const queries = aligned_shared_memory();
  char* const keys = queries + kOwnBytes;
  Bits* const tiles = reinterpret_cast<Bits*>(keys + kOwnBytes + Others::kBytes);  // one a warpgroup
  Barrier* const barriers = reinterpret_cast<Barrier*>(tiles + kReaders);
  const Others others{keys + kOwnBytes, barriers};
  Barrier *const own_full = barriers + Others::kBarriers, *const own_empty = own_full + 1;
  Stretches& stretches = *reinterpret_cast<Stretches*>(own_empty + 1);

  static constexpr int kBytes = 1024 + 2 * kOwnBytes + Others::kBytes + kReaders * int(sizeof(Bits)) +
                                (Others::kBarriers + 2) * int(sizeof(Barrier)) + int(sizeof(Stretches));
  static_assert(kBytes <= kSharedBytes);
};

// For which warpgroups, a bit each, products decide the tile of an entry.
__device__ __forceinline__ uint32_t undecided(uint32_t entry) { return entry / kEntryFirst & ~(entry / kEntryWhole); }

// Whether two products decide a tile: that of the transposed one too.
template <class T>
__device__ __forceinline__ bool takes_two(const Problem<T>& p) {
  return p.mutual && !p.symmetric;
}

// What one thread copies to shared memory.
template <class T, int D>
__device__ __forceinline__ void copy_tiles(const Problem<T>& p, const Lists& lists) {
  const Memory<T, D> memory;
  const Work<T> work(p, lists, true, memory.stretches);
  constexpr int kBlockBytes = Memory<T, D>::kBlockBytes;
  const bool two = takes_two(p);
  uint32_t position = 0, turn = 0;
  work.each([&](const Item& item) {
    const int z = work.head(item), block = work.block(item);
    const uint32_t* const entries = lists.entries + int64_t(item.tile) * lists.others;
    const int own_bytes = min(p.rows.blocks() - block, kReaders) * kBlockBytes;
    const int64_t own = row_at(z, p.rows.padded, block * kBlock) * D, keys = row_at(z, p.keys.padded, 0) * D;
    if (item.first >= item.end) return;
    barrier_wait(memory.own_empty, (turn++ & 1) ^ 1);
    barrier_expect(memory.own_full, two ? 2 * own_bytes : own_bytes);
    copy_bytes(memory.queries, p.q + own, own_bytes, memory.own_full);
    if (two) copy_bytes(memory.keys, p.k + own, own_bytes, memory.own_full);
    for (int e = item.first; e < item.end; ++e) {
      if (!undecided(entries[e])) continue;
      const int64_t other = keys + int64_t(entries[e] & kEntryBlock) * kBlock * D;
      const auto fill = [&](const T* from) {
        memory.others.fill(position++, kBlockBytes,
                           [&](char* to, Barrier* full) { copy_bytes(to, from, kBlockBytes, full); });
      };
      fill(p.k + other);
      if (two) fill(p.q + other);
    }
  });
}

// What the other warpgroups do with it.
template <class T, int D>
__device__ __forceinline__ void decide_tiles(const Problem<T>& p, const Plan& plan, const Saved<T>& saved,
                                             uint32_t* done, const Lists& found, int group) {
  const Lists& lists = plan.lists;
  const Memory<T, D> memory;
  const Work<T> work(p, lists, true, memory.stretches);
  const Place at;
  const int thread = thread_number() % kGroup;
  const uint32_t query = uniform_address(memory.queries) + group * Memory<T, D>::kBlockBytes;
  const uint32_t key = uniform_address(memory.keys) + group * Memory<T, D>::kBlockBytes;
  const bool two = takes_two(p);
  const Thresholds& thresholds = plan.thresholds;
  const bool has_topk = thresholds.kappa2 != nullptr;
  uint32_t position = 0, turn = 0;

  work.each([&](const Item& x) {
    const Item item = uniform_item(x);
    const int z = work.head(item), block = work.block(item) + group;
    const int image = image_of(z, p.heads, p.per_image);
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
      barrier_wait(memory.own_full, turn++ & 1);
      for (int e = item.first; e < item.end; ++e) {
        const uint32_t entry = uint32_t(uniform(int(entries[e]))), open = undecided(entry);
        const uint32_t first = position, second = two ? position + 1 : position;
        if (open) position = second + 1;
        if (!(open >> group & 1)) {
          if (open) {
            memory.others.wait(first), memory.others.free(first);
            if (two) memory.others.wait(second), memory.others.free(second);
          }
          const Words all{~0u, ~0u};
          if (entry & kEntryFirst << group)
            store_bits(p, saved, z, image, block, int(entry & kEntryBlock), entry & kEntryLocal, {all, all, all},
                       thread % kBlock, thread / kBlock);
          continue;
        }
        const int j = int(entry & kEntryBlock);
        float s[kBlock / 2], t[kBlock / 2];
        const auto start = [&](uint32_t at_position, uint32_t left, float (&sum)[kBlock / 2]) {
          memory.others.wait(at_position);
          products_fence();
          multiply_rows<Factor<T>, kBlock, D>(sum, left, kChunkBytes, memory.others.address(at_position), kChunkBytes,
                                              true);
          products_commit();
        };
        // A_ij from s_ij, and A_ji from s_ji laid out alike.
        const auto judge_rows = [&](const float (&sum)[kBlock / 2]) {
          uint32_t bits = 0;
#pragma unroll
          for (int x = 0; x < kBlock / 2; ++x)
            bits |= uint32_t(sum[x] * p.scale2 - own[x / 2 % 2].lse2 > own[x / 2 % 2].cut2) << x;
          if (has_topk)
#pragma unroll
            for (int x = 0; x < kBlock / 2; ++x)
              bits &= ~(uint32_t(!(sum[x] * p.scale2 >= own[x / 2 % 2].kappa2)) << x);
          return bits;
        };
        const auto judge_columns = [&](const float (&sum)[kBlock / 2]) {
          const int64_t column = keys + j * kBlock + at.column;
          uint32_t bits = 0;
#pragma unroll
          for (int x = 0; x < kBlock / 2; ++x) {
            const int64_t row = column + x / 4 * 8 + x % 2;
            bits |= uint32_t(sum[x] * p.scale2 - thresholds.lse2[row] > thresholds.cut2[row]) << x;
          }
          if (has_topk)
#pragma unroll
            for (int x = 0; x < kBlock / 2; ++x)
              bits &= ~(uint32_t(!(sum[x] * p.scale2 >= thresholds.kappa2[column + x / 4 * 8 + x % 2])) << x);
          return bits;
        };
        uint32_t bits, back = 0;
        start(first, query, s);
        if (two) {  // no branch is taken while products are under way
          start(second, key, t);
          products_wait<1>();
          settled(s);
          memory.others.free(first);
          bits = judge_rows(s);
          products_wait<0>();
          settled(t);
          memory.others.free(second);
          back = judge_columns(t);
        } else {
          products_wait<0>();
          settled(s);
          memory.others.free(first);
          bits = judge_rows(s);
          if (p.mutual) back = judge_columns(s);
        }
        const int row = thread % kBlock, side = thread / kBlock;
        const Found words = exchange_bits(p, memory.tiles[group], bits, back, j == block, at.row, at.column, row, side,
                                          [&] { named_barrier(1 + group, kGroup); });
        store_bits(p, saved, z, image, block, j, entry & kEntryLocal, words, row, side);
      }
      if (thread_number() % 32 == 0) barrier_arrive(memory.own_empty);  // lanes have met in uniform since their wait
    }
    if (!p.few && arrive_last_of(done + z, work.counted(item), load_fresh(plan.entries + z), 3, kReaders * kGroup))
      list_occupied(p, found, z, true, thread_number(), kReaders * kGroup);
  });
}

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1)
    asa_mask_kernel(Problem<T> p, Plan plan, Saved<T> saved, uint32_t* done, Lists found) {
#if ASA_OPS_SM90A
  {
    const Memory<T, D> memory;
    if (threadIdx.x == 0) {
      memory.others.init(kReaders * 4);
      barrier_init(memory.own_full, 1), barrier_init(memory.own_empty, kReaders * 4);
      barrier_init_done();
    }
    Work<T>(p, plan.lists, true, memory.stretches).cut();  // all threads meet there
  }
  const int group = group_of_thread();
  if (group == kReaders) {
    fewer_registers<kCopierRegisters>();
    if (threadIdx.x == kReaders * kGroup) copy_tiles<T, D>(p, plan.lists);
  } else {
    more_registers<kReaderRegisters>();
    decide_tiles<T, D>(p, plan, saved, done, found, group);
  }
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Plan& plan, const Saved<T>& saved, uint32_t* done, const Lists& lists,
         cudaStream_t stream) {
  launch("asa_mask_kernel<sm_90a>", &asa_mask_kernel<T, D>, dim3(programs_of(plan.lists, p.n_heads)), kProgram,
         Memory<T, D>::kBytes, stream, p, plan, saved, done, lists);
}

}  // namespace

template <class T>
void find_survivors(const Problem<T>& p, const Plan& plan, const Saved<T>& saved, uint32_t* done, const Lists& lists,
                    cudaStream_t stream) {
  with_width<T>(p.width, [&](auto width) { run<T, width>(p, plan, saved, done, lists, stream); });
}

template void find_survivors(const Problem<Half>&, const Plan&, const Saved<Half>&, uint32_t*, const Lists&,
                             cudaStream_t);
template void find_survivors(const Problem<BFloat16>&, const Plan&, const Saved<BFloat16>&, uint32_t*, const Lists&,
                             cudaStream_t);
template void find_survivors(const Problem<float>&, const Plan&, const Saved<float>&, uint32_t*, const Lists&,
                             cudaStream_t);

}  // namespace asa_ops::cuda::hopper
