// dk and dv for compute capability 9.0: dv = p^T do and dk = scale * ds^T q, summed over the queries of which a key is a
// survivor.
//
// An item is a block of 64 keys and a stretch of its list. K and V stay, blocks of Q and dO pass. Both sums of 64 x 256
// would fill a thread's registers, so the warpgroups divide the work, not the rows: the first forms p transposed and
// sums dv; the second forms <v, do> transposed, gets p from the first through shared memory (a thread's numbers lie
// alike in both), and sums dk one block behind, so that its products run while the first takes exponentials. Of float32
// either has tiles of its own, in the order in which it reads them: the first Q and dO transposed of every block, the
// second dO, and Q transposed of the block before. Lists that programs share are as in sums.cu.

#include "pipeline.h"

#include <cfloat>

namespace asa_ops::cuda::hopper {
namespace {

constexpr int kExchanges = 2;  // of p, in turn

template <class T, int D>
struct Memory {
  static constexpr int kTokenBytes = D * int(sizeof(T));
  static constexpr int kBlockBytes = kBlock * kTokenBytes, kExchangeBytes = kBlock * kBlock * int(sizeof(float));
  using Others = Ring<kTokenBytes == 512 ? 2 : 4, kBlockBytes>;
  char* const key = aligned_shared_memory();
  char* const value = key + kBlockBytes;
  char* const others = value + kBlockBytes;
  float4* const exchange = reinterpret_cast<float4*>(others + 2 * Others::kBytes);  // [kExchanges][8][kGroup]
  Barrier* const barriers = reinterpret_cast<Barrier*>(exchange + kExchanges * 8 * kGroup);
  // Of Q and dO, which both warpgroups read; of float32 one for each warpgroup, which begins with these.
  const Others queries{others, barriers}, gradients{others + Others::kBytes, barriers + Others::kBarriers};
  Barrier *const own_full = barriers + 2 * Others::kBarriers, *const own_empty = own_full + 1;
  Barrier *const given = own_empty + 1, *const taken = given + kExchanges;  // p is there; it may be overwritten
  Stretches& stretches = *reinterpret_cast<Stretches*>(taken + kExchanges);

  static constexpr int kBarriers = 2 * Others::kBarriers + 2 + 2 * kExchanges;
  static constexpr int kBytes = 1024 + 2 * kBlockBytes + 2 * Others::kBytes + kExchanges * kExchangeBytes +
                                kBarriers * int(sizeof(Barrier)) + int(sizeof(Stretches));
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

// What one thread copies to shared memory.
template <class T, int D>
__device__ __forceinline__ void copy_tiles(const Problem<T>& p, const Lists& lists) {
  const Memory<T, D> memory;
  const Work<T> work(p, lists, false, memory.stretches);
  constexpr int kBlockBytes = Memory<T, D>::kBlockBytes;
  uint32_t positions[2] = {0, 0}, turn = 0;  // in both rings
  const auto fill = [&](const auto& ring, uint32_t& position, const T* tokens) {
    ring.fill(position++, kBlockBytes, [&](char* to, Barrier* full) { copy_bytes(to, tokens, kBlockBytes, full); });
  };
  work.each([&](const Item& item) {
    if (item.first >= item.end) return;
    const int z = work.head(item);
    const Entries entries(lists, item.tile);
    const int64_t own = row_at(z, p.keys.padded, work.block(item) * kBlock) * D;
    barrier_wait(memory.own_empty, (turn++ & 1) ^ 1);
    barrier_expect(memory.own_full, 2 * kBlockBytes);
    copy_bytes(memory.key, p.k + own, kBlockBytes, memory.own_full);
    copy_bytes(memory.value, p.v + own, kBlockBytes, memory.own_full);
    int64_t before = 0;
    for (int e = item.first; e < item.end; ++e) {
      const int64_t other = row_at(z, p.rows.padded, entries.block(e) * kBlock) * D;
      fill(memory.queries, positions[0], p.q + other);
      fill(memory.gradients, positions[1], p.d_out + other);
      if constexpr (kTransposed<T>) {
        fill(memory.queries, positions[0], p.d_out_transposed + other);
        if (e > item.first) fill(memory.gradients, positions[1], p.q_transposed + before);
        before = other;
      }
    }
    if constexpr (kTransposed<T>) fill(memory.gradients, positions[1], p.q_transposed + before);
  });
}

// What both other warpgroups have.
template <class T, int D>
struct Reader {
  const Problem<T>& p;
  const RowGradients& rows;
  const PartialSums& parts;
  const int group;
  const Memory<T, D> memory;
  const Work<T> work;
  const Place at;
  uint32_t turn = 0;

  __device__ Reader(const Problem<T>& p, const Lists& lists, const RowGradients& rows, const PartialSums& parts,
                    int group)
      : p(p), rows(rows), parts(parts), group(group), work(p, lists, false, memory.stretches) {}

  // Starts an item: waits for K and V.
  __device__ __forceinline__ void begin(const Item& item, float (&sum)[D / 2]) {
#pragma unroll
    for (int n = 0; n < D / 2; ++n) sum[n] = 0;
    if (item.first < item.end) barrier_wait(memory.own_full, turn++ & 1);
  }

  // Ends it: stores the rows of dv or dk, which have `dim` numbers.
  __device__ __forceinline__ void end(const Item& item, const float (&sum)[D / 2], T* out, int dim,
                                      float factor) const {
    if (item.first < item.end && thread_number() % 32 == 0)
      barrier_arrive(memory.own_empty);  // after __syncwarp in free
    const int64_t part = (group * kBlock + at.row) * D + at.column;
    const int z = work.head(item), image = image_of(z, p.heads, p.per_image);
    if (rows.not_finite_head[z] != 0) factor = NAN;
    with_whole_sum<T, D>(work, item, parts, part, kReaders * kBlock * D, sum, [&](auto unroll, int half, auto values) {
      const int row = work.block(item) * kBlock + at.row + 8 * half;
      const int token = p.keys.order[row_at(image, p.keys.padded, row)];
      if (token < 0) return;
      store_row<T, D, unroll>(out + row_at(z, p.keys.n, token) * dim, nullptr, dim, at.column, [&](int n) {
        const float2 x = values(n);
        return float2{x.x * factor, x.y * factor};
      });
    });
  }
};

// The first warpgroup: p and dv.
template <class T, int D>
__device__ __forceinline__ void sum_dv(const Problem<T>& p, const Lists& lists, const RowGradients& rows,
                                       const PartialSums& parts, T* dv) {
  Reader<T, D> reader(p, lists, rows, parts, 0);
  const Memory<T, D>& memory = reader.memory;
  const Work<T>& work = reader.work;
  const Place& at = reader.at;
  // Where the dO of a block passes, at which position, and where Q does.
  const auto& gradients = kTransposed<T> ? memory.queries : memory.gradients;
  const auto position_of_gradient = [](uint32_t position) { return kTransposed<T> ? 2 * position + 1 : position; };
  const auto position_of_query = [](uint32_t position) { return kTransposed<T> ? 2 * position : position; };
  float4* const mine = memory.exchange + thread_number() % kGroup;
  float sum[D / 2], s[kBlock / 2];
  uint32_t weights[kWeights<T>], position = 0;
  work.each([&](const Item& x) {
    const Item item = uniform_item(x);
    const int z = work.head(item), block = work.block(item), image = image_of(z, p.heads, p.per_image);
    const int n_rows = p.rows.counts[image], keys_left = p.keys.counts[image] - block * kBlock - at.row / 32 * 32;
    const Entries entries(lists, item.tile);
    // Bits of the 32 keys among which the thread's rows are, of queries.
    const uint32_t* const words =
        p.survivors.words == nullptr ? nullptr
                                     : p.survivors.of(z) + int64_t(2 * block + at.row / 32) * p.rows.padded + at.column;
    reader.begin(item, sum);
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
      memory.queries.wait(position_of_query(position));
      products_fence();
      multiply_rows<Factor<T>, kBlock, D>(s, shared_address(memory.key), kChunkBytes,
                                          memory.queries.address(position_of_query(position)), kChunkBytes, true);
      products_commit();
      products_wait<0>();
      settled(s);
      memory.queries.free(position_of_query(position));
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
      barrier_wait(memory.taken + position % kExchanges, (position / kExchanges & 1) ^ 1);
#pragma unroll
      for (int n = 0; n < 8; ++n)
        mine[(position % kExchanges * 8 + n) * kGroup] = float4{s[4 * n], s[4 * n + 1], s[4 * n + 2], s[4 * n + 3]};
      barrier_arrive(memory.given + position % kExchanges);
      pack_weights<Factor<T>, kBlock>(weights, s);
      gradients.wait(position_of_gradient(position));
      products_fence();
      multiply_weights<Factor<T>, D, kBlock>(sum, weights, gradients.address(position_of_gradient(position)),
                                             kSummedPanel<T, D>, false);
      products_commit();
      products_wait<0>();
      settled(sum);
      settled(weights);
      gradients.free(position_of_gradient(position));
    }
    reader.end(item, sum, dv, p.dim_v, 1);
  });
}

// The second one: dk.
template <class T, int D>
__device__ __forceinline__ void sum_dk(const Problem<T>& p, const Lists& lists, const RowGradients& rows,
                                       const PartialSums& parts, T* dk) {
  Reader<T, D> reader(p, lists, rows, parts, 1);
  const Memory<T, D>& memory = reader.memory;
  const Work<T>& work = reader.work;
  const Place& at = reader.at;
  // Where the Q of a block passes, and at which positions, those of dO too: of blocks before the `last` of an item, the
  // next block's dO comes first.
  const auto& queries = kTransposed<T> ? memory.gradients : memory.queries;
  const auto position_of_query = [](uint32_t position, bool last) {
    return kTransposed<T> ? 2 * position + 2 - last : position;
  };
  const auto position_of_gradient = [](uint32_t position, bool first) {
    return kTransposed<T> ? 2 * position - !first : position;
  };
  float4* const mine = memory.exchange + thread_number() % kGroup;
  float sum[D / 2], s[kBlock / 2];
  uint32_t weights[kWeights<T>], position = 0;
  work.each([&](const Item& x) {
    const Item item = uniform_item(x);
    const int z = work.head(item);
    const Entries entries(lists, item.tile);
    const float shrink = shrink_of(p.bounds, p.n_heads, z);
    reader.begin(item, sum);
    // ds from <v, do> and p, at `position`. Queries are there too then: the other warpgroup waited for them.
    const auto weigh = [&](int e) {
      const int64_t first = row_at(z, p.rows.padded, uniform(entries.block(e)) * kBlock);
      each_column(rows.delta, first, at,
                  [&](int n, int k, float delta) { s[4 * n + k] -= delta, s[4 * n + 2 + k] -= delta; });
      barrier_wait(memory.given + position % kExchanges, position / kExchanges & 1);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float4 p_ij = mine[(position % kExchanges * 8 + n) * kGroup];
        s[4 * n] = p_ij.x != 0 ? p_ij.x * s[4 * n] * shrink : 0;
        s[4 * n + 1] = p_ij.y != 0 ? p_ij.y * s[4 * n + 1] * shrink : 0;
        s[4 * n + 2] = p_ij.z != 0 ? p_ij.z * s[4 * n + 2] * shrink : 0;
        s[4 * n + 3] = p_ij.w != 0 ? p_ij.w * s[4 * n + 3] * shrink : 0;
      }
      barrier_arrive(memory.taken + position % kExchanges);
      // A single survivor has all the weight, so no gradient.
      each_column(rows.grad_top, first, at, [&](int n, int k, float top) {
        if (top == INFINITY) s[4 * n + k] = s[4 * n + 2 + k] = 0;
      });
    };
    if (item.first < item.end) {
      memory.gradients.wait(position_of_gradient(position, true));
      products_fence();
      multiply_rows<Factor<T>, kBlock, D>(s, shared_address(memory.value), kChunkBytes,
                                          memory.gradients.address(position_of_gradient(position, true)), kChunkBytes,
                                          true);
      products_commit();
      products_wait<0>();
      settled(s);
      memory.gradients.free(position_of_gradient(position, true));
      weigh(item.first);
      pack_weights<Factor<T>, kBlock>(weights, s);
      for (int e = item.first + 1; e < item.end; ++e) {
        memory.gradients.wait(position_of_gradient(position + 1, false));
        products_fence();
        multiply_rows<Factor<T>, kBlock, D>(s, shared_address(memory.value), kChunkBytes,
                                            memory.gradients.address(position_of_gradient(position + 1, false)),
                                            kChunkBytes, true);
        products_commit();
        if constexpr (kTransposed<T>)
          queries.wait(position_of_query(position, false));  // the other warpgroup waits for what it reads itself
        products_fence();
        multiply_weights<Factor<T>, D, kBlock>(sum, weights, queries.address(position_of_query(position, false)),
                                               kSummedPanel<T, D>, false);
        products_commit();
        products_wait<1>();
        settled(s);
        memory.gradients.free(position_of_gradient(position + 1, false));
        ++position;
        weigh(e);
        products_wait<0>();
        settled(sum);
        settled(weights);
        queries.free(position_of_query(position - 1, false));
        pack_weights<Factor<T>, kBlock>(weights, s);
      }
      if constexpr (kTransposed<T>)
        queries.wait(position_of_query(position, true));  // the other warpgroup waits for what it reads itself
      products_fence();
      multiply_weights<Factor<T>, D, kBlock>(sum, weights, queries.address(position_of_query(position, true)),
                                             kSummedPanel<T, D>, false);
      products_commit();
      products_wait<0>();
      settled(sum);
      queries.free(position_of_query(position, true));
      ++position;
    }
    reader.end(item, sum, dk, p.dim, p.scale / shrink);
  });
}

template <class T, int D>
__global__ void __launch_bounds__(kProgram, 1)
    asa_dkv_kernel(Problem<T> p, Lists lists, RowGradients rows, PartialSums parts, T* dk, T* dv) {
#if ASA_OPS_SM90A
  {
    const Memory<T, D> memory;
    if (threadIdx.x == 0) {
      const int readers = kTransposed<T> ? 4 : kReaders * 4;
      memory.queries.init(readers), memory.gradients.init(readers);
      barrier_init(memory.own_full, 1), barrier_init(memory.own_empty, kReaders * 4);
      for (int i = 0; i < kExchanges; ++i)
        barrier_init(memory.given + i, kGroup), barrier_init(memory.taken + i, kGroup);
      barrier_init_done();
    }
    Work<T>(p, lists, false, memory.stretches).cut();  // all threads meet there
  }
  const int group = group_of_thread();
  if (group == kReaders) {
    fewer_registers<kCopierRegisters>();
    if (threadIdx.x == kReaders * kGroup) copy_tiles<T, D>(p, lists);
  } else {
    more_registers<kReaderRegisters>();
    if (group == 0)
      sum_dv<T, D>(p, lists, rows, parts, dv);
    else
      sum_dk<T, D>(p, lists, rows, parts, dk);
  }
#endif
}

template <class T, int D>
void run(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
         T* dk, T* dv, cudaStream_t stream) {
  launch("asa_dkv_kernel", &asa_dkv_kernel<T, D>, dim3(programs), kProgram, Memory<T, D>::kBytes, stream, p, lists, row,
         parts, dk, dv);
}

}  // namespace

template <class T>
void find_dkv(const Problem<T>& p, const Lists& lists, const RowGradients& row, const PartialSums& parts, int programs,
              T* dk, T* dv, cudaStream_t stream) {
  with_width<T>(p.width, [&](auto width) { run<T, width>(p, lists, row, parts, programs, dk, dv, stream); });
}

template void find_dkv(const Problem<Half>&, const Lists&, const RowGradients&, const PartialSums&, int, Half*, Half*,
                       cudaStream_t);
template void find_dkv(const Problem<BFloat16>&, const Lists&, const RowGradients&, const PartialSums&, int, BFloat16*,
                       BFloat16*, cudaStream_t);
template void find_dkv(const Problem<float>&, const Lists&, const RowGradients&, const PartialSums&, int, float*,
                       float*, cudaStream_t);

}  // namespace asa_ops::cuda::hopper
