// Scores of every row: the statistics that decide its neighbours, and its k-th largest score.
//
// The k-th largest is exact, for any k, and no score is ever stored. The bits of a float, taken as an integer, order as
// it does. Every sweep over the keys counts how many scores fall into each of kBins parts of the interval known to hold
// the k-th largest, until exactly k scores reach its lower end or it holds a single value: five sweeps at most, since 7
// bits are settled in each. The last sweep finds the two scores next to the gap; any threshold between them selects the
// same scores, however another kernel's product rounds.

#include "tiles.h"

namespace asa_ops::cuda {
namespace {

// Of every row over each `splits`-th block of keys, axis 1 of the grid.
template <class T>
__global__ void __launch_bounds__(kThreads) asa_statistics_kernel(Problem<T> p, Statistics statistics) {
  const int z = blockIdx.x / p.rows.count, block = p.rows.first + blockIdx.x % p.rows.count;
  const int split = blockIdx.y, splits = statistics.splits;
  const int n_keys = p.keys.counts[image_of(z, p.heads, p.per_image)];
  const int chunks = chunks_of<T>(p.width);
  const T* const q = p.q + row_at(z, p.rows.padded, block * kBlock) * p.width;
  const T* const k = p.k + row_at(z, p.keys.padded, 0) * p.width;
  const auto load = [&](int step, char* chunk) {
    const int j = split + step / chunks * splits;
    if (j * kBlock >= n_keys) return;
    copy_chunk(chunk, k + int64_t(j) * kBlock * p.width, step % chunks);
  };
  copy_block(shared_memory(), q, p.width);
  copy_commit();
  Ring<kStages, kChunkBytes, decltype(load)> ring(shared_memory() + chunks * kChunkBytes, load);
  const Fragment at;
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of the thread's columns
  for (int j = split; j * kBlock < n_keys; j += splits) {
    Tile s;
    multiply_chunks<T>(s, ring, chunks, shared_memory());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float peak = -INFINITY;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = j * kBlock + at.column_of(n, i) < n_keys ? s[n][i] * p.scale2 : -INFINITY;
          peak = fmaxf(peak, s[n][i]);
        }
      const float base = fmaxf(high[half], peak), finite = base == -INFINITY ? 0 : base;
      sum[half] *= exp2f(high[half] - finite);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) sum[half] += exp2f(s[n][i] - finite);
      high[half] = base;
      if (p.has_bits) {
        peak = max_over_quad(peak);
        // A little above, so that no tile is missed however another kernel's product rounds.
        if (threadIdx.x % 4 == 0)
          p.peaks.of(z)[int64_t(j) * p.rows.computed() + block * kBlock + at.row + 8 * half] =
              half_above(peak + fabsf(peak) * 1e-4f + 1e-6f);
      }
    }
  }
  ring.finish();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float base = max_over_quad(high[half]), finite = base == -INFINITY ? 0 : base;
    const float all = sum_over_quad(sum[half] * exp2f(high[half] - finite));
    const int64_t row = (int64_t(split) * gridDim.x + blockIdx.x) * kBlock + at.row + 8 * half;  // of the parts
    if (threadIdx.x % 4 == 0) statistics.largest[row] = base, statistics.total[row] = all;
  }
}

constexpr int kBins = 128;
constexpr int32_t kLowest = -0x7f800001, kBeyond = 0x7f800001;  // -inf as an integer; one more than inf

__device__ __forceinline__ int32_t ordered(float x) {
  const int32_t bits = bits_as<int32_t>(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int32_t x) { return bits_as<float>(x ^ (x >> 31 & 0x7fffffff)); }

// Where the k-th largest score of a row lies: `reached` scores, at least k, are no less than low; `above`, fewer than
// k, are no less than high.
struct Interval {
  int32_t low, high;
  int reached, above;
  int shift;  // a bin is 2^shift wide
};

struct Shared {
  char chunks[kStages * 2 * kChunkBytes];
  int bins[kBlock][kBins];
  Interval rows[kBlock];
  int open;
};

// The smallest shift for which kBins bins cover the interval.
__device__ __forceinline__ int shift_of(const Interval& row) {
  const uint32_t width = uint32_t(row.high) - uint32_t(row.low);
  int shift = 0;
  while ((uint64_t(kBins) << shift) < width) ++shift;
  return shift;
}

template <class T>
__global__ void __launch_bounds__(kThreads) asa_topk_kernel(Problem<T> p, PerHead<float> kappa2) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int z = blockIdx.x / p.rows.count, i0 = (p.rows.first + blockIdx.x % p.rows.count) * kBlock;
  const int image = image_of(z, p.heads, p.per_image);
  const int n_rows = p.rows.counts[image], n_keys = p.keys.counts[image];
  const int chunks = chunks_of<T>(p.width);
  const T* const q = p.q + row_at(z, p.rows.padded, i0) * p.width;
  const T* const k = p.k + row_at(z, p.keys.padded, 0) * p.width;
  const Fragment at;

  // Calls use(s2, row of the block) for every score of the block, column by column of a row in any order.
  const auto sweep = [&](auto use) {
    const auto load = [&](int step, char* chunk) {
      const int j0 = step / chunks * kBlock;
      if (j0 >= n_keys) return;
      copy_chunk(chunk, q, step % chunks);
      copy_chunk(chunk + kChunkBytes, k + int64_t(j0) * p.width, step % chunks);
    };
    Ring<kStages, 2 * kChunkBytes, decltype(load)> ring(shared.chunks, load);
    for (int j0 = 0; j0 < n_keys; j0 += kBlock) {
      Tile s;
      multiply_chunks<T>(s, ring, chunks);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (j0 + at.column_of(n, i) < n_keys) use(s[n][i] * p.scale2, i / 2);
    }
    ring.finish();
  };

  if (threadIdx.x < kBlock) {
    Interval& row = shared.rows[threadIdx.x];
    row = {kLowest, kBeyond, n_keys, 0, 0};
    row.shift = shift_of(row);
  }
  const auto is_open = [&](const Interval& row) {
    return row.reached > p.topk && uint32_t(row.high) - uint32_t(row.low) > 1;
  };
  // Whether any row is open, the same in all threads.
  const auto any_open = [&] {
    if (threadIdx.x == 0) shared.open = 0;
    __syncthreads();
    if (threadIdx.x < kBlock && i0 + int(threadIdx.x) < n_rows && is_open(shared.rows[threadIdx.x])) shared.open = 1;
    __syncthreads();
    return shared.open != 0;
  };
  while (any_open()) {
    for (int i = threadIdx.x; i < kBlock * kBins; i += kThreads) shared.bins[i / kBins][i % kBins] = 0;
    __syncthreads();
    sweep([&](float s, int high) {
      const Interval& row = shared.rows[at.row + 8 * high];  // not in registers, of which there are none to spare
      const uint32_t above = uint32_t(ordered(s)) - uint32_t(row.low);
      if (s == s && above < uint32_t(row.high) - uint32_t(row.low))
        atomicAdd(&shared.bins[at.row + 8 * high][above >> row.shift], 1);
    });
    if (threadIdx.x < kBlock) {
      Interval& row = shared.rows[threadIdx.x];
      if (is_open(row)) {
        int count = row.above, bin = kBins;
        while (bin > 0 && count < p.topk) count += shared.bins[threadIdx.x][--bin];
        if (count >= p.topk) {
          row.above = count - shared.bins[threadIdx.x][bin];
          row.reached = count;
          const int64_t low = row.low + (int64_t(bin) << row.shift), high = low + (int64_t(1) << row.shift);
          row.low = int32_t(low);
          row.high = high < row.high ? int32_t(high) : row.high;
          row.shift = shift_of(row);
        } else {
          // Formed again, some scores that had reached the interval miss it (or are NaN, and so is the row's output).
          row.reached = p.topk, row.high = row.low + 1;
        }
      }
    }
  }

  float kth[2] = {INFINITY, INFINITY}, following[2] = {-INFINITY, -INFINITY};
  const float floor[2] = {from_ordered(shared.rows[at.row].low), from_ordered(shared.rows[at.row + 8].low)};
  sweep([&](float s, int high) {
    if (s >= floor[high])
      kth[high] = fminf(kth[high], s);
    else
      following[high] = fmaxf(following[high], s);
  });
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    kth[high] = -max_over_quad(-kth[high]);
    following[high] = max_over_quad(following[high]);
    const int position = i0 + at.row + 8 * high;
    if (threadIdx.x % 4 != 0 || position >= n_rows) continue;
    const int reached = shared.rows[at.row + 8 * high].reached;
    if (kth[high] == INFINITY) kth[high] = floor[high];  // formed again, all scores may miss the floor
    const float middle = following[high] + (kth[high] - following[high]) * 0.5f;
    float threshold = middle > following[high] && middle < kth[high] ? middle : kth[high];
    if (n_keys <= p.topk || reached == n_keys) threshold = -INFINITY;
    const int token = p.rows.order[row_at(image, p.rows.padded, position)];
    kappa2.of(z)[token] = threshold;
  }
}

}  // namespace

template <class T>
void find_statistics(const Problem<T>& problem, const Statistics& statistics, cudaStream_t stream) {
  const int bytes = chunks_of<T>(problem.width) * kChunkBytes + kStages * kChunkBytes;
  launch("asa_statistics_kernel", &asa_statistics_kernel<T>,
         dim3(problem.n_heads * problem.rows.count, statistics.splits), kThreads, bytes, stream, problem, statistics);
}

template <class T>
void find_kth(const Problem<T>& problem, const PerHead<float>& kappa2, cudaStream_t stream) {
  launch("asa_topk_kernel", &asa_topk_kernel<T>, dim3(problem.n_heads * problem.rows.count), kThreads, sizeof(Shared),
         stream, problem, kappa2);
}

#define INSTANTIATE(T)                                                               \
  template void find_statistics(const Problem<T>&, const Statistics&, cudaStream_t); \
  template void find_kth(const Problem<T>&, const PerHead<float>&, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
