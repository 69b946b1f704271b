// Maximum and sum of exponentials of every row over all keys, and peaks, for compute capability 9.0.
//
// Two blocks of queries stay in shared memory, one a warpgroup; tiles of 128 keys pass, up to 256 bytes of a token at a
// time. While the exponentials of a tile are taken, the products of the next one run: two sets of accumulators in turn.
// All tiles of a call are laid end to end and cut into stretches of equal length, so that one head fills the device; a
// stretch leaves a part for each two blocks of rows that it crosses.

#include "pipeline.h"

namespace asa_ops::cuda::hopper {
namespace {

constexpr int kKeys = 2 * kBlock;  // of a tile

template <class T, int D>
struct Memory {
  static constexpr int kTokenBytes = D * int(sizeof(T));
  static constexpr int kPanels = kTokenBytes < 256 ? 1 : 2;  // of a slot
  static constexpr int kParts = kTokenBytes / (kPanels * 128);  // slots of a tile
  static constexpr int kBlockBytes = kBlock * kTokenBytes, kOwnBytes = kReaders * kBlockBytes;
  using Keys = Ring<kTokenBytes == 512 ? 5 : 4, kKeys * kPanels * 128>;
  char* const queries = aligned_shared_memory();
  Barrier* const barriers = reinterpret_cast<Barrier*>(queries + kOwnBytes + Keys::kBytes);
  const Keys keys{queries + kOwnBytes, barriers};
  Barrier *const own_full = barriers + Keys::kBarriers, *const own_empty = own_full + 1;

  static constexpr int kBytes = 1024 + kOwnBytes + Keys::kBytes + (Keys::kBarriers + 2) * int(sizeof(Barrier));
  static_assert(kBytes <= kSharedBytes);
};

// Calls use(z, first block of rows, first tile of keys, end, part) for each two blocks of rows of a program's stretch,
// and the tiles of theirs that hold keys.
template <class T, class Use>
__device__ __forceinline__ void each_pair(const Problem<T>& p, const Statistics& statistics, Use use) {
  const int pairs = p.n_heads * statistics.row_tiles, per_row = statistics.key_tiles;
  const int64_t tiles = int64_t(pairs) * per_row;
  const int64_t end = tiles * (blockIdx.x + 1) / gridDim.x;
  for (int64_t at = tiles * blockIdx.x / gridDim.x; at < end;) {
    const int pair = int(at / per_row), first = int(at % per_row), z = pair / statistics.row_tiles;
    const int last = int(min(int64_t(per_row), first + end - at));
    const int with_keys = (p.keys.counts[image_of(z, p.heads, p.per_image)] + kKeys - 1) / kKeys;
    use(z, pair % statistics.row_tiles * kReaders, first, min(last, with_keys),
        int(blockIdx.x) - statistics.first_program(pair, pairs));
    at += last - first;
  }
}

// What one thread copies to shared memory.
template <class T, int D>
__device__ __forceinline__ void copy_tiles(const Problem<T>& p, const Statistics& statistics) {
  const Memory<T, D> memory;
  constexpr int kPanels = Memory<T, D>::kPanels, kBlockBytes = Memory<T, D>::kBlockBytes;
  uint32_t position = 0, turn = 0;
  each_pair(p, statistics, [&](int z, int block, int first, int end, int) {
    if (first >= end) return;
    const int own_bytes = min(p.rows.blocks() - block, kReaders) * kBlockBytes;
    barrier_wait(memory.own_empty, (turn++ & 1) ^ 1);
    barrier_expect(memory.own_full, own_bytes);
    copy_bytes(memory.queries, p.q + row_at(z, p.rows.padded, block * kBlock) * D, own_bytes, memory.own_full);
    for (int tile = first; tile < end; ++tile) {
      const int blocks = min(p.keys.blocks() - 2 * tile, 2);
      const char* const from = reinterpret_cast<const char*>(p.k + row_at(z, p.keys.padded, tile * kKeys) * D);
      for (int part = 0; part < Memory<T, D>::kParts; ++part)
        memory.keys.fill(position++, blocks * kPanels * kChunkBytes, [&](char* to, Barrier* full) {
          for (int b = 0; b < blocks; ++b)
            for (int c = 0; c < kPanels; ++c)
              copy_bytes(to + (2 * c + b) * kChunkBytes, from + b * kBlockBytes + (part * kPanels + c) * kChunkBytes,
                         kChunkBytes, full);
        });
    }
  });
}

// What the other warpgroups do with it.
template <class T, int D>
__device__ __forceinline__ void take_tiles(const Problem<T>& p, const Statistics& statistics, int group) {
  const Memory<T, D> memory;
  constexpr int kPanels = Memory<T, D>::kPanels, kParts = Memory<T, D>::kParts;
  const Place at;
  const int lane = thread_number() % 32;
  const uint32_t own = uniform_address(memory.queries) + group * Memory<T, D>::kBlockBytes;
  uint32_t position = 0, freed = 0, turn = 0;
  // Starts the products of a tile, a batch a slot.
  const auto start = [&](float (&s)[kKeys / 2]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part, ++position) {
      memory.keys.wait(position);
      products_fence();
      multiply_rows<Factor<T>, kKeys, D / kParts>(s, own + part * kPanels * kChunkBytes, kChunkBytes,
                                                  memory.keys.address(position), 2 * kChunkBytes, part == 0);
      products_commit();
    }
  };
  const auto free_tile = [&] {
#pragma unroll
    for (int part = 0; part < kParts; ++part) memory.keys.free(freed++);
  };

  each_pair(p, statistics, [&](int z_, int block_, int first_, int end_, int part_) {
    const int z = uniform(z_), block = uniform(block_), first = uniform(first_), end = uniform(end_);
    const int n_keys = p.keys.counts[image_of(z, p.heads, p.per_image)];
    const int row = (block + group) * kBlock + at.row;
    const bool there = block + group < p.rows.blocks();
    float high[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of the thread's columns
    if (first < end) {
      barrier_wait(memory.own_full, turn++ & 1);

      const auto take = [&](float (&s)[kKeys / 2], int tile) {
        if ((tile + 1) * kKeys > n_keys) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (tile * kKeys + 8 * n + at.column + i % 2 >= n_keys) s[4 * n + i] = -INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float peak[2] = {-INFINITY, -INFINITY}, floor[2] = {INFINITY, INFINITY};
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
            const float x = s[4 * n + 2 * half], y = s[4 * n + 2 * half + 1];
            peak[n / 8] = fmaxf(peak[n / 8], fmaxf(x, y)), floor[n / 8] = fminf(floor[n / 8], fminf(x, y));
          }
          const float base = fmaxf(high[half], fmaxf(peak[0], peak[1]) * p.scale2);
          const float finite = base == -INFINITY ? 0 : base;
          float parts[2] = {sum[half] * exp2_fast(high[half] - finite), 0};
          high[half] = base;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) parts[i] += exp2_fast(fmaf(s[4 * n + 2 * half + i], p.scale2, -finite));
          sum[half] = parts[0] + parts[1];
          if (p.has_bits) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              // A little above, and below, however another kernel's product rounds.
              const auto above = [](float x) { return half_above(fmaf(fabsf(x), 1e-4f, x) + 1e-6f); };
              const float top = max_over_quad(peak[side]) * p.scale2;
              const float bottom = max_over_quad(-floor[side]) * p.scale2;
              const int64_t to = int64_t(2 * tile + side) * p.rows.padded + row + 8 * half;
              if (lane % 4 == 0 && there && 2 * tile + side < p.keys.blocks()) p.peaks.of(z)[to] = above(top);
              if (lane % 4 == 0 && there && 2 * tile + side < p.keys.blocks() && p.floors.data != nullptr)
                p.floors.of(z)[to] = above(bottom);
            }
          }
        }
      };
      // The products of `next` run while `now` is taken.
      const auto step = [&](float (&now)[kKeys / 2], float (&next)[kKeys / 2], int tile) {
        start(next);
        products_wait<kParts>();
        settled(now);
        free_tile();
        take(now, tile);
      };
      const auto last = [&](float (&now)[kKeys / 2], int tile) {
        products_wait<0>();
        settled(now);
        free_tile();
        if (lane == 0) barrier_arrive(memory.own_empty);  // after __syncwarp in free_tile
        take(now, tile);
      };
      // Waits stand where no branch is: the assembler gives up overlap otherwise.
      float even[kKeys / 2], odd[kKeys / 2];
      int tile = first;
      start(even);
      for (; tile + 2 < end; tile += 2) {
        step(even, odd, tile);
        step(odd, even, tile + 1);
      }
      if (tile + 1 < end) {
        step(even, odd, tile);
        last(odd, tile + 1);
      } else {
        last(even, tile);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = max_over_quad(high[half]), finite = base == -INFINITY ? 0 : base;
      const float all = sum_over_quad(sum[half] * exp2_fast(high[half] - finite));
      const int64_t to = int64_t(part_) * p.n_heads * p.rows.padded + row_at(z, p.rows.padded, row + 8 * half);
      if (lane % 4 == 0 && there) statistics.largest[to] = base, statistics.total[to] = all;
    }
  });
}

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1) asa_statistics_kernel(Problem<T> p, Statistics statistics) {
#if ASA_OPS_SM90A
  {
    const Memory<T, D> memory;
    if (threadIdx.x == 0) {
      memory.keys.init(kReaders * 4);
      barrier_init(memory.own_full, 1), barrier_init(memory.own_empty, kReaders * 4);
      barrier_init_done();
    }
    __syncthreads();
  }
  const int group = group_of_thread();
  if (group == kReaders) {
    fewer_registers<kCopierRegisters>();
    if (threadIdx.x == kReaders * kGroup) copy_tiles<T, D>(p, statistics);
  } else {
    more_registers<kReaderRegisters>();
    take_tiles<T, D>(p, statistics, group);
  }
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Statistics& statistics, cudaStream_t stream) {
  launch("asa_statistics_kernel<sm_90a>", &asa_statistics_kernel<T, D>, dim3(statistics.programs), kProgram,
         Memory<T, D>::kBytes, stream, p, statistics);
}

}  // namespace

Statistics cut_statistics(int row_blocks, int key_blocks, int n_heads) {
  Statistics statistics{};
  statistics.row_tiles = (row_blocks + kReaders - 1) / kReaders, statistics.key_tiles = (key_blocks + 1) / 2;
  const int64_t rows = int64_t(n_heads) * statistics.row_tiles, tiles = rows * statistics.key_tiles;
  statistics.programs = int(std::min<int64_t>(processors(), tiles));
  statistics.splits = int(std::min<int64_t>(statistics.key_tiles, statistics.programs / rows + 2));
  return statistics;
}

template <class T>
void find_statistics(const Problem<T>& p, const Statistics& statistics, cudaStream_t stream) {
  with_width<T>(p.width, [&](auto width) { run<T, width>(p, statistics, stream); });
}

template void find_statistics(const Problem<Half>&, const Statistics&, cudaStream_t);
template void find_statistics(const Problem<BFloat16>&, const Statistics&, cudaStream_t);
template void find_statistics(const Problem<float>&, const Statistics&, cudaStream_t);

}  // namespace asa_ops::cuda::hopper
