// Which tiles are visited, and which pairs survive: on the device, with fixed capacity, without a host sync.
//
// peaks[J, i] is at least the largest score that query i gives to the 64 keys of block J. asa_plan_kernel finds the
// thresholds of rows and their local survivors, and lists the tiles to visit: those where some row's peak exceeds that
// row's threshold, in both directions if neighbours must be mutual, those with extra tokens, and those with a local
// survivor. Tiles that are left out hold no survivor; tiles that are visited in vain cost time only.
//
// asa_mask_kernel alone decides neighbours: A_ij = [s2_ij - lse2_i > cut2_i] and [s2_ij >= kappa2_i]. If they must be
// mutual, a second product laid out [i, j] gives s_ji for a tile (I, J) too (none if query is key), so that M = A_ij
// and A_ji; its bits are stored for the rows i and, transposed in shared memory, for the rows j. On the diagonal A_ji
// is the transpose of A_ij, so M is always symmetric. Local survivors join them in the bits that all later steps read.

#include "lists.h"
#include "mask.h"
#include "rows.h"
#include "thresholds.h"
#include "tiles.h"

namespace asa_ops::cuda {
namespace {

constexpr int kPlanThreads = 512, kPlanWarps = kPlanThreads / 32;
constexpr int kTogether = 4;  // members of a window whose scores are formed at a time

// The local survivors of a row, a warp: log_mean2_i = log2 mean exp2 s2_ij over the window of i, and s2_ij -
// log_mean2_i > log2 beta_i. Pairs of a window are few and scattered, so they are plain float32 products. Scores of
// small windows are kept, a lane one; others are formed twice, so that a window of any size needs no memory.
template <class T>
__device__ __forceinline__ void find_local_survivors(const Problem<T>& p, int z, int image, int token, int position,
                                                     const Saved<T>& saved, const TileBits& local) {
  const int members = p.window, lane = threadIdx.x % 32;
  const Vector q = vector_at(p.q, row_at(z, p.rows.padded, position), p.width);
  // Calls use(offset, position or -1, score) for every member.
  const auto visit = [&](auto use) {
    for (int first = 0; first < members; first += kTogether) {
      int at[kTogether];
      float s[kTogether];
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        const int other = first + m < members ? window_token(p, token, first + m) : -1;
        at[m] = other < 0 ? -1 : p.keys.place[row_at(image, p.keys.n, other)];
        const Vector k = vector_at(p.k, row_at(z, p.keys.padded, max(at[m], 0)), p.width);
        s[m] = at[m] < 0 ? -INFINITY : dot(q, k) * p.scale2;
      }
#pragma unroll
      for (int m = 0; m < kTogether; ++m)
        if (first + m < members) use(first + m, at[m], s[m]);
    }
  };
  float largest = -INFINITY, total = 0, own = 0;  // own: the score of member `lane`
  int there = 0, top = 0, own_at = -1;  // top: offset of the largest
  visit([&](int offset, int j, float s) {
    if (s > largest) top = offset;
    const float base = fmaxf(largest, s), finite = base == -INFINITY ? 0 : base;
    total = total * exp2f(largest - finite) + exp2f(s - finite);
    there += j >= 0;
    largest = base;
    if (offset == lane) own = s, own_at = j;
  });
  const float mean2 = largest + log2f(total) - log2f(float(there));
  const float beta = multiplier_at(p.beta, z, p.heads, token);
  const float cut = beta >= 0 ? log2f(beta) : NAN;
  if (lane == 0) saved.log_mean2.of(z)[token] = mean2;
  const auto judge = [&](int offset, int j, float s) {
    const float seen = offset == top ? largest : s;  // formed again, the largest might miss a cut that it exceeds
    const bool survives = j >= 0 && seen - mean2 > cut;
    local_flag(p, saved.local, z, token, offset) = survives ? kLocal : 0;
    if (!survives || local.words == nullptr) return;
    local.set(z, position / kBlock, j / kBlock);
    if (p.mutual) local.set(z, j / kBlock, position / kBlock);
  };
  if (members <= 32) {
    if (lane < members) judge(lane, own_at, own);
  } else {
    visit([&](int offset, int j, float s) {
      if (lane == offset % 32) judge(offset, j, s);
    });
  }
}

// The log-sum-exp of a row from its parts, and its largest score.
struct LogSumExp {
  float lse2, largest;
};

__device__ __forceinline__ LogSumExp combine(const Statistics& parts, int count, int64_t row, int64_t rows) {
  float base = -INFINITY, sum = 0;
  for (int part = 0; part < count; ++part) base = fmaxf(base, parts.largest[part * rows + row]);
  base = base == -INFINITY ? 0 : base;
  for (int part = 0; part < count; ++part) {
    const float total = parts.total[part * rows + row];
    sum += total == 0 ? 0 : total * exp2f(parts.largest[part * rows + row] - base);
  }
  return {base + log2f(sum), base};
}

// A block of rows a program; the last of a head lists its tiles. One program a multiprocessor: with room for two,
// registers spill on compute capability 10.0.
template <class T>
__global__ void __launch_bounds__(kPlanThreads, 1) asa_plan_kernel(Problem<T> p, Plan plan, Saved<T> saved) {
  RowThresholds* const rows = reinterpret_cast<RowThresholds*>(shared_memory());
  const int z = blockIdx.x / p.rows.count, block = p.rows.first + blockIdx.x % p.rows.count;
  const int image = image_of(z, p.heads, p.per_image), n_keys = p.keys.counts[image];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int32_t* const tokens = p.rows.order + row_at(image, p.rows.padded, block * kBlock);
  if (thread < kBlock) {
    const int token = tokens[thread];
    const int64_t row = row_at(z, p.rows.padded, block * kBlock + thread);
    const int parts = plan.statistics.count(z, p.n_heads, block);
    const LogSumExp found =
        combine(plan.statistics, parts, int64_t(blockIdx.x) * kBlock + thread, int64_t(p.n_heads) * p.rows.computed());
    if (token >= 0) {
      saved.lse[row_at(z, p.rows.n, token)] = found.lse2 * kLn2;
      if (saved.base2.data != nullptr) saved.base2.of(z)[token] = found.lse2;
    }
    if (p.has_bits) {
      RowThresholds own = thresholds_of(p, saved, z, token, n_keys, found.lse2);
      // Scores are formed again to decide pairs: the largest must not miss a threshold that it exceeds.
      const float above = found.largest - own.lse2, slack = last_bits(found.largest);
      if (above > own.cut2) own.cut2 = fminf(own.cut2, above - slack);
      own.kappa2 = fminf(own.kappa2, found.largest - slack);
      rows[thread] = own;
      plan.thresholds.lse2[row] = own.lse2, plan.thresholds.cut2[row] = own.cut2;
      if (plan.thresholds.kappa2 != nullptr) plan.thresholds.kappa2[row] = own.kappa2;
    }
  }
  if (p.window > 0)
    for (int i = warp; i < kBlock; i += kPlanWarps)
      if (tokens[i] >= 0) find_local_survivors(p, z, image, tokens[i], block * kBlock + i, saved, plan.local);
  if (!p.has_bits) return;

  clear_occupied(p, z, block, thread, kPlanThreads);
  __syncthreads();
  // Sets the bits of this block's tiles whose rows any, or all, pass in a block of keys, and those of their transposes.
  const auto mark = [&](const TileBits& tiles, const TileBits& back, auto passes) {
    auto* const bytes = reinterpret_cast<uint8_t*>(tiles.word(z, block, 0));
    for (int eight = warp; eight < 4 * tiles.groups; eight += kPlanWarps) {
      unsigned bits = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int j = 8 * eight + k;
        if (j * kBlock >= n_keys) break;
        const bool marked = passes(j, int64_t(j) * p.rows.computed() + block * kBlock + lane);
        bits |= unsigned(marked) << k;
        if (marked && back.words != nullptr && lane == 0) back.set(z, j, block);
      }
      if (lane == 0) bytes[eight] = uint8_t(bits);
    }
  };
  const int of_rows = p.rows.extra_counts[image], of_keys = p.keys.extra_counts[image];
  mark(plan.reached, plan.reached_back, [&](int j, int64_t at) {
    const Half* const peaks = p.peaks.of(z) + at;
    return block * kBlock < of_rows || j * kBlock < of_keys ||
           __any_sync(~0u, is_reached(rows[lane], to_float(peaks[0]), plan.band2) ||
                               is_reached(rows[lane + 32], to_float(peaks[32]), plan.band2));
  });
  if (p.floors.data != nullptr)
    mark(plan.whole, plan.whole_back, [&](int, int64_t at) {
      const Half* const floors = p.floors.of(z) + at;
      return !__any_sync(~0u, !is_reached(rows[lane], -to_float(floors[0]), 0) ||
                                  !is_reached(rows[lane + 32], -to_float(floors[32]), 0));
    });
  if (plan.lists.entries == nullptr || !arrive_last(plan.done + z, 1, p.rows.count)) return;
  const auto of = [&](const TileBits& tiles, const TileBits& back, int i, int group) {
    const uint32_t there = load_fresh(tiles.word(z, i, group));
    return p.mutual ? there & load_fresh(back.word(z, i, group)) : there;
  };
  const auto local_of = [&](int i, int group) { return p.window > 0 ? load_fresh(plan.local.word(z, i, group)) : 0; };
  list_tiles(
      plan.lists, z, p.rows.blocks(), thread, kPlanThreads,
      [&](int i, int group) {
        const uint32_t there = of(plan.reached, plan.reached_back, i, group) | local_of(i, group);
        return p.mutual ? there & ~first_bits(i - 32 * group) : there;
      },
      local_of,
      [&](int i, int group) { return p.floors.data != nullptr ? of(plan.whole, plan.whole_back, i, group) : 0; },
      plan.entries + z);
}

struct Shared {
  char chunks[kStages * 2 * kChunkBytes];
  Bits bits;
};

// Every gridDim.y-th listed block of a block of rows; the last program of a head lists what holds survivors. Whoever
// lists a tile of mutual neighbours, it is decided in the same products, those of the tile above the diagonal.
template <class T>
__global__ void __launch_bounds__(kThreads, kPrograms)
    asa_mask_kernel(Problem<T> p, Plan plan, Saved<T> saved, uint32_t* done, Lists found) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int z = blockIdx.x / plan.lists.tiles, block = plan.lists.first + blockIdx.x % plan.lists.tiles;
  const int image = image_of(z, p.heads, p.per_image);
  const Entries list(plan.lists, blockIdx.x);
  const int length = plan.lists.lengths[blockIdx.x];
  const Thresholds& thresholds = plan.thresholds;
  const int chunks = chunks_of<T>(p.width), products = p.mutual && !p.symmetric ? 2 : 1;
  const int64_t rows = row_at(z, p.rows.padded, 0), keys = row_at(z, p.keys.padded, 0);
  const auto row_block = [&](int listed) { return p.mutual ? min(block, listed) : block; };
  const auto key_block = [&](int listed) { return p.mutual ? max(block, listed) : listed; };
  const auto load = [&](int step, char* chunk) {
    const int turn = int(blockIdx.y) + step / (chunks * products) * int(gridDim.y);
    if (turn >= length) return;
    const int listed = list.block(turn);
    const int64_t own = rows + row_block(listed) * kBlock, other = keys + key_block(listed) * kBlock;
    const bool back = step / chunks % products == 1;
    copy_chunk(chunk, (back ? p.k : p.q) + own * p.width, step % chunks);
    copy_chunk(chunk + kChunkBytes, (back ? p.q : p.k) + other * p.width, step % chunks);
  };
  Ring<kStages, 2 * kChunkBytes, decltype(load)> ring(shared.chunks, load);
  const Fragment at;
  const bool has_topk = thresholds.kappa2 != nullptr;

  for (int turn = blockIdx.y; turn < length; turn += gridDim.y) {
    const int first = row_block(list.block(turn)), j = key_block(list.block(turn));
    Tile s;
    multiply_chunks<T>(s, ring, chunks);
    uint32_t bits = 0, back = 0;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int64_t row = rows + first * kBlock + at.row + 8 * high;
      const float lse2 = thresholds.lse2[row], cut2 = thresholds.cut2[row];
      const float kappa2 = has_topk ? thresholds.kappa2[row] : -INFINITY;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * high; i < 2 * high + 2; ++i) {
          const float s2 = s[n][i] * p.scale2;
          const bool kept = s2 - lse2 > cut2 && s2 >= kappa2;
          bits |= uint32_t(kept) << (4 * n + i);
        }
    }
    if (p.mutual) {
      if (products == 2) multiply_chunks<T>(s, ring, chunks);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t column = keys + j * kBlock + at.column_of(n, i);
          const float lse2 = thresholds.lse2[column], cut2 = thresholds.cut2[column];
          const float kappa2 = has_topk ? thresholds.kappa2[column] : -INFINITY;
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            const float s2 = s[n][i + 2 * high] * p.scale2;
            const bool kept = s2 - lse2 > cut2 && s2 >= kappa2;
            back |= uint32_t(kept) << (4 * n + i + 2 * high);
          }
        }
    }
    const int row = threadIdx.x % kBlock, side = threadIdx.x / kBlock;
    const Found words =
        exchange_bits(p, shared.bits, bits, back, j == first, at.row, at.column, row, side, [] { __syncthreads(); });
    store_bits(p, saved, z, image, first, j, list[turn] & kEntryLocal, words, row, side);
  }
  ring.finish();
  if (found.entries == nullptr || !arrive_last(done + z, 1, plan.lists.tiles * gridDim.y)) return;
  list_occupied(p, found, z, true, threadIdx.x, kThreads);
}

}  // namespace

template <class T>
void make_plan(const Problem<T>& problem, const Plan& plan, const Saved<T>& saved, cudaStream_t stream) {
  launch("asa_plan_kernel", &asa_plan_kernel<T>, dim3(problem.n_heads * problem.rows.count), kPlanThreads,
         kBlock * sizeof(RowThresholds), stream, problem, plan, saved);
}

template <class T>
void find_survivors(const Problem<T>& problem, const Plan& plan, const Saved<T>& saved, uint32_t* done,
                    const Lists& lists, cudaStream_t stream) {
  const int blocks = problem.n_heads * plan.lists.tiles;
  const int splits = min(plan.lists.others, 1 + 8 * processors() / max(blocks, 1));  // lists differ in length
  launch("asa_mask_kernel", &asa_mask_kernel<T>, dim3(blocks, splits), kThreads, sizeof(Shared), stream, problem, plan,
         saved, done, lists);
}

#define INSTANTIATE(T)                                                                    \
  template void make_plan(const Problem<T>&, const Plan&, const Saved<T>&, cudaStream_t); \
  template void find_survivors(const Problem<T>&, const Plan&, const Saved<T>&, uint32_t*, const Lists&, cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
