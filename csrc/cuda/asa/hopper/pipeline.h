// How the kernels for compute capability 9.0 are built: a program stays on its processor and does a stretch of all
// work. One warp copies tiles to shared memory, two warpgroups multiply them.

#pragma once

#include "../../hopper/device.h"
#include "../lists.h"
#include "launchers.h"

namespace asa_ops::cuda::hopper {

constexpr int kReaders = 2;  // warpgroups that multiply
constexpr int kProgram = (kReaders + 1) * kGroup;  // threads; the last warpgroup copies, by its first thread
constexpr int kReaderRegisters = 240, kCopierRegisters = 24;
constexpr int kSharedBytes = 232448;  // that a program may have

// As what products take numbers: float32 as TF32, to which its tokens are rounded.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, float>, TF32, T>;

// Whether the right operand of sums over tokens lies transposed: TF32 is read along rows only.
template <class T>
constexpr bool kTransposed = std::is_same_v<T, float>;

// Bytes from one panel of that operand to the next: of a block of tokens, or of its transpose.
template <class T, int D>
constexpr int kSummedPanel = kTransposed<T> ? D * 128 : kChunkBytes;

// Registers of a thread's numbers of a block of columns as weights.
template <class T>
constexpr int kWeights = kBlock * int(sizeof(T)) / 8;

// Calls run(width) for the width of tokens, a constant. Tiles of float32 at 256 do not fit.
template <class T, class Run>
void with_width(int width, Run run) {
  if (width == 64) return run(std::integral_constant<int, 64>());
  if constexpr (!std::is_same_v<T, float>)
    if (width == 256) return run(std::integral_constant<int, 256>());
  run(std::integral_constant<int, 128>());
}

// Which warpgroup a thread is in, the same number in all lanes.
__device__ __forceinline__ int group_of_thread() { return uniform(int(threadIdx.x) / kGroup); }

// An address that is the same in all lanes, and known to be so: descriptors made of it take no registers of theirs.
__device__ __forceinline__ uint32_t uniform_address(const void* at) {
  return uint32_t(uniform(int(shared_address(at))));
}

// Slots of shared memory that tiles pass through: position p is in slot p % SLOTS. Whoever reads waits until a position
// is full, and frees it when products have read it.
template <int SLOTS, int BYTES>
struct Ring {
  static constexpr int kBytes = SLOTS * BYTES, kBarriers = 2 * SLOTS;
  char* memory;
  Barrier *full, *empty;

  __device__ Ring(char* memory, Barrier* barriers) : memory(memory), full(barriers), empty(barriers + SLOTS) {}

  // By one thread, for so many warps that read.
  __device__ void init(int warps) const {
    for (int i = 0; i < SLOTS; ++i) barrier_init(full + i, 1), barrier_init(empty + i, warps);
  }
  // Fills a position with what copy(memory, barrier) copies, `bytes` in all.
  template <class Copy>
  __device__ __forceinline__ void fill(uint32_t position, uint32_t bytes, Copy copy) const {
    const uint32_t slot = position % SLOTS;
    barrier_wait(empty + slot, (position / SLOTS & 1) ^ 1);
    barrier_expect(full + slot, bytes);
    copy(memory + slot * BYTES, full + slot);
  }
  __device__ __forceinline__ void wait(uint32_t position) const {
    barrier_wait(full + position % SLOTS, position / SLOTS & 1);
  }
  __device__ __forceinline__ void free(uint32_t position) const {
    __syncwarp();  // other lanes may still have to look whether it is full
    if (thread_number() % 32 == 0) barrier_arrive(empty + position % SLOTS);
  }
  __device__ __forceinline__ uint32_t address(uint32_t position) const {
    return uniform_address(memory + position % SLOTS * BYTES);
  }
};

// Where a thread's numbers lie in a tile of 64 rows of its warpgroup: of 8 columns n it has [4 n + i], in row `row` (i
// 0, 1) and 8 rows further on (i 2, 3), columns `column` and the next one.
struct Place {
  int row, column;
  __device__ Place()
      : row(thread_number() % kGroup / 32 * 16 + thread_number() % 32 / 4), column(thread_number() % 4 * 2) {}
};

// Whether a thread's column of a row survives, by the row's two words shifted right by `column`; n, k as in Place.
__device__ __forceinline__ bool survives_in(uint32_t low, uint32_t high, int n, int k) {
  return (n < 4 ? low : high) >> (8 * (n % 4) + k) & 1;
}

// All entries of all lists, laid end to end, an empty list as one, are cut into stretches of equal length: one for each
// program. What a program does of a list is an item.
struct Item {
  int tile;  // of rows, of all heads
  int first, end;  // entries
  int start;  // of the list, among all entries
};

constexpr int kMostPrograms = 160;

// Where the stretches of all programs begin; in shared memory, where it takes no registers.
struct Stretches {
  int first[kMostPrograms + 1];
  int tile, start;  // of this program's first item
  int in_warps[kProgram / 32];  // room
};

// The lists of a call, of rows or of columns.
template <class T>
class Work {
 public:
  const Problem<T>& p;
  const Lists& lists;
  const bool by_rows;
  Stretches& stretches;

  __device__ Work(const Problem<T>& p, const Lists& lists, bool by_rows, Stretches& stretches)
      : p(p), lists(lists), by_rows(by_rows), stretches(stretches) {}

  // Finds the stretches; by all threads of a program.
  __device__ __forceinline__ void cut() const {
    const int tiles = p.n_heads * lists.tiles, share = (tiles + kProgram - 1) / kProgram;
    const int from = min(tiles, int(threadIdx.x) * share), to = min(tiles, from + share);
    int own = 0;
    for (int tile = from; tile < to; ++tile) own += counted(tile);
    int total, start = sum_before<kProgram>(own, stretches.in_warps, total);
    // No stretch is empty but those of the last programs: whoever has a part of a list comes to add it up.
    const int busy = min(total, int(gridDim.x));
    const auto first_of = [&](int program) { return program < busy ? int(int64_t(total) * program / busy) : total; };
    if (threadIdx.x <= gridDim.x) stretches.first[threadIdx.x] = first_of(threadIdx.x);
    const int first = first_of(blockIdx.x);
    if (start <= first && first < start + own) {
      int tile = from;
      for (; start + counted(tile) <= first; ++tile) start += counted(tile);
      stretches.tile = tile, stretches.start = start;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int end() const { return stretches.first[blockIdx.x + 1]; }

  // Calls use(item) for all of them.
  template <class Use>
  __device__ __forceinline__ void each(Use use) const {
    if (stretches.first[blockIdx.x] == end()) return;
    int tile = stretches.tile, start = stretches.start, first = stretches.first[blockIdx.x] - start;
    for (; start < end(); start += counted(tile++), first = 0)
      use(Item{tile, first, min(length(tile), end() - start), start});
  }

  __device__ __forceinline__ int length(int tile) const {
    const int image = image_of(tile / lists.tiles, p.heads, p.per_image);
    const int n = (by_rows ? p.rows : p.keys).counts[image], others = (by_rows ? p.keys : p.rows).counts[image];
    return length_of(lists, tile, n, others);
  }
  __device__ __forceinline__ int counted(int tile) const { return max(length(tile), 1); }
  // Of an item.
  __device__ __forceinline__ int counted(const Item& item) const {
    return min(counted(item.tile), end() - item.start) - item.first;
  }
  __device__ __forceinline__ int head(const Item& item) const { return item.tile / lists.tiles; }
  __device__ __forceinline__ int block(const Item& item) const { return item.tile % lists.tiles * lists.blocks; }

  // The programs that have parts of the list of an item.
  __device__ __forceinline__ int first_program(const Item& item) const {
    int program = blockIdx.x;
    while (stretches.first[program] > item.start) --program;
    return program;
  }
  __device__ __forceinline__ int last_program(const Item& item) const {
    int program = blockIdx.x;
    while (stretches.first[program + 1] < item.start + counted(item.tile)) ++program;
    return program;
  }
  // Where a program leaves its part of the list: it has one of a list that others began, and one of a list that others
  // end.
  __device__ __forceinline__ int slot(const Item& item, int program) const {
    return stretches.first[program] >= item.start ? program : int(gridDim.x) + program;
  }
};

// The same in all lanes, and known to be so.
__device__ __forceinline__ Item uniform_item(const Item& x) {
  return {uniform(x.tile), uniform(x.first), uniform(x.end), uniform(x.start)};
}

// Stores a thread's numbers of a row, rounded, to the `dim` numbers of `row`, and unless it is null to `rest` what rounding
// took: value(n) are those in columns 8 n + `column` and the next one, D at most.
template <class T, int D, int UNROLL, class Value>
__device__ __forceinline__ void store_row(T* row, T* rest, int dim, int column, Value value) {
  if (dim % 2 == 0) {
#pragma unroll UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const float2 x = value(n);
      if constexpr (sizeof(T) == 4) {
        if (8 * n + column < dim) *reinterpret_cast<float2*>(row + 8 * n + column) = x;
      } else {
        const uint32_t rounded = pack<T>(x.x, x.y);
        if (8 * n + column >= dim) continue;
        *reinterpret_cast<uint32_t*>(row + 8 * n + column) = rounded;
        if (rest != nullptr)
          *reinterpret_cast<uint32_t*>(rest + 8 * n + column) =
              pack<T>(x.x - to_float(T{uint16_t(rounded)}), x.y - to_float(T{uint16_t(rounded >> 16)}));
      }
    }
  } else {
#pragma unroll UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const float2 x = value(n);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float exact = k == 0 ? x.x : x.y;
        const T rounded = from_float<T>(exact);
        if (8 * n + column + k >= dim) continue;
        row[8 * n + column + k] = rounded;
        if (rest != nullptr) rest[8 * n + column + k] = from_float<T>(exact - to_float(rounded));
      }
    }
  }
}

// A list that several programs share: each leaves its part in memory, and the last one to come adds them up in order. It
// reads them a few numbers at a time, not to registers, which are full of its own sum otherwise.
constexpr int kTogether = 8;  // of them, for store_row

// A warpgroup's fragment of a part, D numbers a row, from number `at` of all on.
template <int D>
__device__ __forceinline__ void leave_part(float* parts, int64_t at, const float (&sum)[D / 2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<float2*>(parts + at + 8 * half * D + 8 * n) =
          float2{sum[4 * n + 2 * half], sum[4 * n + 2 * half + 1]};
}

// Calls store(values, unrolled) for each of a thread's two rows, `half`, if this program has the whole sum of an item's
// list: values(n) are the numbers in columns 8 n and 8 n + 1 of the thread's. `at` is where they lie in a part of
// `numbers`, in which all of both warpgroups do.
template <class T, int D, class Store>
__device__ __forceinline__ void with_whole_sum(const Work<T>& work, const Item& item, const PartialSums& parts,
                                               int64_t at, int64_t numbers, const float (&sum)[D / 2], Store store) {
  const int first = work.first_program(item), last = work.last_program(item);
  if (first == last) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store(std::integral_constant<int, D / 8>(), half,
            [&](int n) { return float2{sum[4 * n + 2 * half], sum[4 * n + 2 * half + 1]}; });
    return;
  }
  leave_part<D>(parts.sums, work.slot(item, blockIdx.x) * numbers + at, sum);
  if (!arrive_last_of(parts.done + item.tile, 1, last - first + 1, kReaders + 1, kReaders * kGroup)) return;
  for (int half = 0; half < 2; ++half)
    store(std::integral_constant<int, kTogether>(), half, [&](int n) {
      float2 all{0, 0};
      for (int program = first; program <= last; ++program) {
        const float2 x = load_fresh(reinterpret_cast<const float2*>(parts.sums + work.slot(item, program) * numbers +
                                                                    at + 8 * half * D + 8 * n));
        all.x += x.x, all.y += x.y;
      }
      return all;
    });
}

}  // namespace asa_ops::cuda::hopper
