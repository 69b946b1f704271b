// The output of every row for compute capability 9.0: values summed over survivors, and the row ended.
//
// An item is two blocks of queries, one a warpgroup, and a stretch of their list. Q stays, blocks of K and V pass in the
// order K0 K1 V0 K2 V1 .. in which they are used: a warpgroup starts the scores of the next block before it sums the
// values of this one, and takes exponentials while the latter runs. One without survivors in a block lets it pass. The
// base of exponentials grows with the largest score met. A list that several programs share leaves parts; the last of
// them to come adds these up, in order.

#include "../thresholds.h"
#include "pipeline.h"

namespace asa_ops::cuda::hopper {
namespace {

// Survivors of the rows of an item; those of a row with a value that is not finite are negated and one less. In shared
// memory, where they take no registers.
using Counted = int[kReaders * kBlock];

template <class T, int D>
struct Memory {
  static constexpr int kTokenBytes = D * int(sizeof(T));
  static constexpr int kBlockBytes = kBlock * kTokenBytes, kOwnBytes = kReaders * kBlockBytes;
  using Others = Ring<kTokenBytes == 512 ? 5 : 6, kBlockBytes>;
  char* const own = aligned_shared_memory();
  Barrier* const barriers = reinterpret_cast<Barrier*>(own + kOwnBytes + Others::kBytes);
  const Others others{own + kOwnBytes, barriers};
  Barrier *const own_full = barriers + Others::kBarriers, *const own_empty = own_full + 1;
  int* const counted = reinterpret_cast<int*>(own_empty + 1);
  Stretches& stretches = *reinterpret_cast<Stretches*>(reinterpret_cast<Counted*>(counted) + 1);

  static constexpr int kBytes = 1024 + kOwnBytes + Others::kBytes + (Others::kBarriers + 2) * int(sizeof(Barrier)) +
                                int(sizeof(Counted)) + int(sizeof(Stretches));
  static_assert(kBytes <= kSharedBytes);
};

// The position, among those of an item of `count` entries, of an entry's K and V.
__device__ __forceinline__ int position_k(int entry) { return entry == 0 ? 0 : 2 * entry - 1; }
__device__ __forceinline__ int position_v(int entry, int count) {
  return entry == count - 1 ? 2 * entry + 1 : 2 * entry + 2;
}

// Counts the survivors of a thread's two rows, whose words are from `row` on, and looks for values that are not finite:
// the four threads of a row share its entries.
template <class T>
__device__ __forceinline__ void count_survivors(const Problem<T>& p, const Entries& entries, int z, int row, int length,
                                                uint32_t use, int n_keys, int* counted) {
  int counts[2] = {0, 0}, broken[2] = {0, 0};
  const uint32_t* const words = p.survivors.words == nullptr ? nullptr : p.survivors.of(z) + row;
  const uint32_t* const not_finite = p.not_finite + row_at(z, p.keys.padded, 0) / 32;
  for (int e = thread_number() % 4; e < length; e += 4) {
    const uint32_t entry = entries[e];
    if (!(entry & use)) continue;
    const int j = int(entry & kEntryBlock);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t bad = not_finite[2 * j + side], all = first_bits(n_keys - 64 * j - 32 * side);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = words == nullptr ? all : words[int64_t(2 * j + side) * p.rows.padded + 8 * half];
        counts[half] += __popc(word), broken[half] |= (word & bad) != 0;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int count = sum_over_quad(counts[half]), is_broken = sum_over_quad(broken[half]);
    if (thread_number() % 4 == 0) counted[8 * half] = is_broken ? ~count : count;
  }
  __syncwarp();
}

// The output and the statistics of a row, as asa_finish_out_kernel ends them, by the four threads that share it: `base`
// and `total` are the largest score of a survivor in base 2, and the sum of exponentials below it.
template <class T, int D, int UNROLL, class Values>
__device__ __forceinline__ void end_row(const Problem<T>& p, const Saved<T>& saved, int z, int row, int counted,
                                        float base, float total, Values values) {
  const int image = image_of(z, p.heads, p.per_image);
  const int token = p.rows.order[row_at(image, p.rows.padded, row)];
  if (token < 0) return;
  const int64_t to = row_at(z, p.rows.n, token);
  const int count = counted < 0 ? ~counted : counted;
  const float all = count == 0 ? 1 : total;
  const float lse = p.has_bits ? saved.lse[to] : (base + log2f(total)) * kLn2;
  // A row of scores with NaN or +inf has no softmax, a multiplier that is NaN or negative no threshold.
  const bool finite = fabsf(lse) < INFINITY;
  bool nan_row = counted < 0 || (p.keys.counts[image] > 0 && !finite);
  if (p.alpha.data != nullptr) nan_row = nan_row || !(multiplier_at(p.alpha, z, p.heads, token) >= 0);
  if (p.beta.data != nullptr) nan_row = nan_row || !(multiplier_at(p.beta, z, p.heads, token) >= 0);
  if (thread_number() % 4 == 0) {
    if (!p.has_bits) saved.lse[to] = lse;
    saved.lse_kept[to] = finite ? (base + log2f(all)) * kLn2 : lse;
    saved.survivors[to] = count;
    if (saved.base2.data != nullptr) {
      float* const base2 = saved.base2.of(z) + token;
      if (!p.has_bits) base2[0] = lse / kLn2;
      base2[p.rows.n] = base;
      base2[2 * int64_t(p.rows.n)] = all;
    }
  }
  const float share = nan_row ? NAN : count == 0 ? 0 : 1 / all;
  T* const rest = saved.residual.data == nullptr ? nullptr : saved.residual.of(z) + int64_t(token) * p.dim_v;
  store_row<T, D, UNROLL>(saved.out + to * p.dim_v, rest, p.dim_v, thread_number() % 4 * 2, [&](int n) {
    const float2 x = values(n);
    return float2{x.x * share, x.y * share};
  });
}

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
    const int64_t keys = row_at(z, p.keys.padded, 0) * D;
    barrier_wait(memory.own_empty, (turn++ & 1) ^ 1);
    barrier_expect(memory.own_full, own_bytes);
    copy_bytes(memory.own, p.q + row_at(z, p.rows.padded, block * kBlock) * D, own_bytes, memory.own_full);
    const auto fill = [&](const T* tokens, int e) {
      memory.others.fill(position++, kBlockBytes, [&](char* to, Barrier* full) {
        copy_bytes(to, tokens + keys + int64_t(entries.block(e)) * kBlock * D, kBlockBytes, full);
      });
    };
    fill(p.k, item.first);
    for (int e = item.first; e < item.end; ++e) {
      if (e + 1 < item.end) fill(p.k, e + 1);
      fill(kTransposed<T> ? p.v_transposed : p.v, e);
    }
  });
}

// What the other warpgroups do with it.
template <class T, int D>
__device__ __forceinline__ void sum_tiles(const Problem<T>& p, const Lists& lists, const Saved<T>& saved,
                                          const PartialSums& parts, int group) {
  const Memory<T, D> memory;
  const auto& others = memory.others;
  const Work<T> work(p, lists, true, memory.stretches);
  constexpr int kRows = kReaders * kBlock;
  const Place at;
  const int lane = thread_number() % 32;
  int* const counted = memory.counted + group * kBlock + at.row;
  const uint32_t query = uniform_address(memory.own) + group * Memory<T, D>::kBlockBytes;
  uint32_t before = 0, turn = 0;  // positions that items before took

  work.each([&](const Item& x) {
    const Item item = uniform_item(x);
    const int z = work.head(item), block = work.block(item) + group;
    const int n_keys = p.keys.counts[image_of(z, p.heads, p.per_image)], count = item.end - item.first;
    const int row = block * kBlock + at.row;
    const Entries entries(lists, item.tile);
    const uint32_t* const words = p.survivors.words == nullptr ? nullptr : p.survivors.of(z) + row;
    const uint32_t use = kEntryFirst << group;
    const auto entry_at = [&](int e) { return uint32_t(uniform(int(entries[item.first + e]))); };
    const auto uses = [&](int e) { return e < count && (entry_at(e) & use) && block < p.rows.blocks(); };

    if (block < p.rows.blocks()) count_survivors(p, entries, z, row, work.length(item.tile), use, n_keys, counted);
    float base[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    float sum[D / 2], s[kBlock / 2];
    uint32_t weights[kWeights<T>];
    float shrink[2] = {1, 1};
#pragma unroll
    for (int n = 0; n < D / 2; ++n) sum[n] = 0;
    uint32_t low[2], high[2];  // the bits of the thread's rows, shifted right by its column
    const auto load_bits = [&](int e) {
      const int j = int(entry_at(e) & kEntryBlock);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* const from = words + int64_t(2 * j) * p.rows.padded + 8 * half;
        low[half] = (words == nullptr ? first_bits(n_keys - 64 * j) : from[0]) >> at.column;
        high[half] = (words == nullptr ? first_bits(n_keys - 64 * j - 32) : from[p.rows.padded]) >> at.column;
      }
    };
    const auto exponentials = [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float& x = s[4 * n + 2 * half + k];
            x = survives_in(low[half], high[half], n, k) ? x : -INFINITY;
            largest = fmaxf(largest, x);
          }
        const float grown = fmaxf(base[half], max_over_quad(largest) * p.scale2);
        const float from = grown == -INFINITY ? 0 : grown;
        shrink[half] = exp2_fast(base[half] - from);
        base[half] = grown;
        float more[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float& x = s[4 * n + 2 * half + k];
            x = exp2_fast(fmaf(x, p.scale2, -from));
            more[k] += x;
          }
        total[half] = fmaf(total[half], shrink[half], more[0] + more[1]);
      }
    };
    const auto rescale = [&] {
#pragma unroll
      for (int n = 0; n < D / 2; ++n) sum[n] *= shrink[n / 2 % 2];
    };

    if (count > 0) barrier_wait(memory.own_full, turn++ & 1);
    // Runs of entries that the warpgroup uses; no branch is taken while products are under way.
    for (int e = 0; e < count; ++e) {
      uint32_t at_k = before + position_k(e), at_v = before + position_v(e, count);
      if (!uses(e)) {
        others.wait(at_k), others.free(at_k);
        others.wait(at_v), others.free(at_v);
        continue;
      }
      bool next = uses(e + 1);
      load_bits(e);
      others.wait(at_k);
      products_fence();
      multiply_rows<Factor<T>, kBlock, D>(s, query, kChunkBytes, others.address(at_k), kChunkBytes, true);
      products_commit();
      products_wait<0>();
      settled(s);
      others.free(at_k);
      exponentials();
      rescale();
      pack_weights<Factor<T>, kBlock>(weights, s);
      for (; next; ++e) {
        at_k = before + position_k(e + 1), at_v = before + position_v(e, count);
        next = uses(e + 2);  // asked for early
        load_bits(e + 1);
        others.wait(at_k);
        products_fence();
        multiply_rows<Factor<T>, kBlock, D>(s, query, kChunkBytes, others.address(at_k), kChunkBytes, true);
        products_commit();
        others.wait(at_v);
        products_fence();
        multiply_weights<Factor<T>, D, kBlock>(sum, weights, others.address(at_v), kSummedPanel<T, D>, false);
        products_commit();
        products_wait<1>();
        settled(s);
        others.free(at_k);
        exponentials();
        products_wait<0>();
        settled(sum);
        settled(weights);
        others.free(at_v);
        rescale();
        pack_weights<Factor<T>, kBlock>(weights, s);
      }
      at_v = before + position_v(e, count);
      others.wait(at_v);
      products_fence();
      multiply_weights<Factor<T>, D, kBlock>(sum, weights, others.address(at_v), kSummedPanel<T, D>, false);
      products_commit();
      products_wait<0>();
      settled(sum);
      others.free(at_v);
    }
    before += 2 * count;
    if (count > 0 && lane == 0) barrier_arrive(memory.own_empty);  // after __syncwarp in free

#pragma unroll
    for (int half = 0; half < 2; ++half) total[half] = sum_over_quad(total[half]);
    const int first_program = work.first_program(item), last_program = work.last_program(item);
    const bool there = block < p.rows.blocks();
    if (first_program == last_program) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (there)
          end_row<T, D, D / 8>(p, saved, z, row + 8 * half, counted[8 * half], base[half], total[half],
                               [&](int n) { return float2{sum[4 * n + 2 * half], sum[4 * n + 2 * half + 1]}; });
      return;
    }
    const auto part_of = [&](int program) {
      return int64_t(work.slot(item, program)) * kRows + group * kBlock + at.row;
    };
    const int64_t own = part_of(blockIdx.x);
    leave_part<D>(parts.sums, own * D + at.column, sum);
    auto* const numbers = reinterpret_cast<float2*>(parts.numbers);
    if (lane % 4 == 0) numbers[own] = float2{base[0], total[0]}, numbers[own + 8] = float2{base[1], total[1]};
    const int programs = last_program - first_program + 1;
    if (!arrive_last_of(parts.done + item.tile, 1, programs, kReaders + 1, kReaders * kGroup) || !there) return;
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY, all = 0;
      for (int program = first_program; program <= last_program; ++program)
        largest = fmaxf(largest, load_fresh(numbers + part_of(program) + 8 * half).x);
      for (int program = first_program; program <= last_program; ++program) {
        const float2 of_part = load_fresh(numbers + part_of(program) + 8 * half);
        const float weight = exp2_fast(of_part.x - (largest == -INFINITY ? 0 : largest));
        all = fmaf(of_part.y, weight, all);
        __syncwarp();  // all four have read it
        if (lane % 4 == 0) numbers[part_of(program) + 8 * half].x = weight;
      }
      __syncwarp();
      end_row<T, D, kTogether>(p, saved, z, row + 8 * half, counted[8 * half], largest, all, [&](int n) {
        float2 x{0, 0};
        for (int program = first_program; program <= last_program; ++program) {
          const int64_t part = part_of(program) + 8 * half;
          const float weight = load_fresh(numbers + part).x;
          const float2 of_part = load_fresh(reinterpret_cast<const float2*>(parts.sums + part * D + at.column + 8 * n));
          x.x = fmaf(of_part.x, weight, x.x), x.y = fmaf(of_part.y, weight, x.y);
        }
        return x;
      });
    }
  });
}

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1)
    asa_values_kernel(Problem<T> p, Lists lists, Saved<T> saved, PartialSums parts) {
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
    sum_tiles<T, D>(p, lists, saved, parts, group);
  }
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Lists& lists, const Saved<T>& saved, const PartialSums& parts, int programs,
         cudaStream_t stream) {
  launch("asa_values_kernel", &asa_values_kernel<T, D>, dim3(programs), kProgram, Memory<T, D>::kBytes, stream, p,
         lists, saved, parts);
}

}  // namespace

int programs_of(const Lists& lists, int n_heads) {
  const int64_t most = int64_t(n_heads) * lists.tiles * lists.others;
  return int(std::max<int64_t>(1, std::min<int64_t>(std::min(processors(), kMostPrograms), most / 4)));
}

template <class T>
void aggregate(const Problem<T>& p, const Lists& lists, const Saved<T>& saved, const PartialSums& parts, int programs,
               cudaStream_t stream) {
  with_width<T>(p.width, [&](auto width) { run<T, width>(p, lists, saved, parts, programs, stream); });
}

template void aggregate(const Problem<Half>&, const Lists&, const Saved<Half>&, const PartialSums&, int, cudaStream_t);
template void aggregate(const Problem<BFloat16>&, const Lists&, const Saved<BFloat16>&, const PartialSums&, int,
                        cudaStream_t);
template void aggregate(const Problem<float>&, const Lists&, const Saved<float>&, const PartialSums&, int,
                        cudaStream_t);

}  // namespace asa_ops::cuda::hopper
