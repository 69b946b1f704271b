// Sums over the survivors in listed tiles: the forward's values, the backward's dq, dk and dv.
//
// A program owns a block of tokens, queries or keys, and takes the listed blocks of the other side: it forms a tile of
// scores, in the backward also <do, v>, turns it into weights and multiplies them with the tokens that are summed. Only
// bits are transposed, and no atomics add numbers: every sum has a fixed order. Operands pass through shared memory
// chunk by chunk, whatever their width; halves that the program owns stay there. The sum itself, as wide as what is
// summed, stays in registers; where it leaves few of them, a tile is taken in two halves.

#include "lists.h"
#include "tiles.h"

namespace asa_ops::cuda {
namespace {

// How tiles are cut and shared memory is laid out.
template <class T, int WIDTH>
struct Layout {
  static constexpr bool kResident = sizeof(T) == 2;  // whether what the program owns stays
  static constexpr int kColumns = WIDTH == 256 ? kBlock / 2 : kBlock;  // of a tile at a time
  static constexpr int kParts = kBlock / kColumns;
  static constexpr int kStageBytes = kColumns * 128 + (kResident ? 0 : kChunkBytes);
  using Packed = Weights<T, kColumns / 8>;
  static int bytes(int chunks) {
    return (kResident ? chunks * kChunkBytes : 0) + kStages * kStageBytes + Packed::kBytes;
  }
};

// Weights of a tile: exponentials on a base that grows; p; p (<do, v> - delta); the same, summed up to a number a row.
enum class Form { kGrowing, kWeight, kGradient, kDelta };

template <class T>
struct Operands {
  bool rows_are_queries;
  int n_heads, padded, other_padded;  // tokens of the own side, of the other one
  int width, width_v;
  float scale2;
  const T *own, *other;  // q and k, or k and q
  const T *own_v, *other_v;  // do and v, or v and do
  const T* summed;  // [.., WIDTH] of the other side
  PairBits survivors;  // no words: dense attention
  const int32_t *counts, *other_counts;  // real tokens of the own side and of the other one, of images
  int heads, per_image;
  const uint32_t* not_finite;  // for growing weights
  const float *top, *share, *delta;  // of queries, for the others
  const uint32_t* bounds;  // of Problem, for gradients of scores
  Lists lists;
  Parts parts;
  Totals totals;  // for growing weights
};

template <class T, int WIDTH, Form FORM>
__global__ void __launch_bounds__(kThreads, 2) asa_sums_kernel(Operands<T> g) {
  constexpr bool kGradients = FORM == Form::kGradient || FORM == Form::kDelta;
  constexpr int kSummed = FORM == Form::kDelta ? 0 : WIDTH / kColumns<T>;  // chunks
  using Shape = Layout<T, WIDTH>;
  constexpr int N = Shape::kColumns / 8;
  const int z = blockIdx.x / g.lists.tiles, block = g.lists.first + blockIdx.x % g.lists.tiles;
  const int split = blockIdx.y, splits = gridDim.y;
  const int image = image_of(z, g.heads, g.per_image), n = g.counts[image], n_other = g.other_counts[image];
  const Entries list(g.lists, blockIdx.x);
  const int length = length_of(g.lists, blockIdx.x, n, n_other);
  const int64_t others = row_at(z, g.other_padded, 0);
  const int64_t own = row_at(z, g.padded, block * kBlock);
  const int chunks = chunks_of<T>(g.width), chunks_v = kGradients ? chunks_of<T>(g.width_v) : 0;
  const int steps = chunks + chunks_v + kSummed;  // of a tile, or half of one
  char* const own_v = shared_memory() + chunks * kChunkBytes;
  char* const buffer = shared_memory() + (Shape::kResident ? (chunks + chunks_v) * kChunkBytes : 0);
  if (Shape::kResident) {
    copy_block(shared_memory(), g.own + own * g.width, g.width);
    if (kGradients) copy_block(own_v, g.own_v + own * g.width_v, g.width_v);
    copy_commit();
  }
  const auto load = [&](int step, char* chunk) {
    const int turn = split + step / (steps * Shape::kParts) * splits;
    if (turn >= length) return;
    const int64_t other = others + int64_t(list.block(turn)) * kBlock;
    const int first = step / steps % Shape::kParts * Shape::kColumns;
    int index = step % steps;
    const auto copy_pair = [&](const T* left, const T* right, int width) {
      if (!Shape::kResident) copy_chunk(chunk, left + own * width, index);
      copy_chunk<T, Shape::kColumns>(chunk + (Shape::kResident ? 0 : kChunkBytes), right + other * width, index, first);
    };
    if (index < chunks)
      copy_pair(g.own, g.other, g.width);
    else if ((index -= chunks) < chunks_v)
      copy_pair(g.own_v, g.other_v, g.width_v);
    else
      copy_chunk<T, Shape::kColumns>(chunk, g.summed + other * WIDTH, index - chunks_v, first);
  };
  Ring<kStages, Shape::kStageBytes, decltype(load)> ring(buffer, load);
  const Fragment at;
  const float shrink = FORM == Form::kGradient && std::is_same_v<T, Half> ? shrink_of(g.bounds, g.n_heads, z) : 1;

  float sum[WIDTH / 8][4];
#pragma unroll
  for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] = 0;
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // total: of the thread's columns
  int count[2] = {0, 0};
  uint32_t nan_row = 0;

  for (int turn = split; turn < length; turn += splits) {
    const int j = list.block(turn);
    const uint32_t survivors = g.survivors.words == nullptr ? bits_of_all(n - block * kBlock, n_other - j * kBlock, at)
                               : g.rows_are_queries
                                   ? bits_by_rows(g.survivors.of(z), g.survivors.rows, block, j, at)
                                   : bits_by_columns(g.survivors.of(z), g.survivors.rows, block, j, at);
    uint32_t not_finite = 0;
    if (FORM == Form::kGrowing) {
      const uint32_t* const keys = g.not_finite + (others / kBlock + j) * 2;
      not_finite = bits_of_row(keys[0], keys[1], at, 0) | bits_of_row(keys[0], keys[1], at, 1);
    }
    for (int part = 0; part < Shape::kParts; ++part) {
      const int64_t other = others + int64_t(j) * kBlock + part * Shape::kColumns;
      const uint32_t kept = Shape::kParts == 1 ? survivors : survivors >> part * 4 * N & ((1u << 4 * N % 32) - 1);
      Columns<N> p;
      multiply_chunks<T>(p, ring, chunks, Shape::kResident ? shared_memory() : nullptr);
      if constexpr (FORM == Form::kGrowing) {
        nan_row |= kept & not_finite >> part * 4 * N;
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          float base = largest[high];
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 2 * high; i < 2 * high + 2; ++i) {
              p[n][i] = bit_of(kept, n, i) ? p[n][i] * g.scale2 : -INFINITY;
              base = fmaxf(base, p[n][i]);
            }
          base = max_over_quad(base);
          const float finite = base == -INFINITY ? 0 : base, shrink = exp2f(largest[high] - finite);
          largest[high] = base;
          total[high] *= shrink;
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 2 * high; i < 2 * high + 2; ++i) {
              p[n][i] = exp2f(p[n][i] - finite);
              total[high] += p[n][i];
            }
#pragma unroll
          for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
            for (int i = 2 * high; i < 2 * high + 2; ++i) sum[n][i] *= shrink;
          count[high] += __popc(kept & kRowBits << 2 * high);
        }
      } else {
        // Where a query's numbers lie, for a thread's number of the tile.
        const auto query = [&](int n, int i) {
          return g.rows_are_queries ? own + at.row_of(i) : other + at.column_of(n, i);
        };
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            p[n][i] =
                bit_of(kept, n, i) ? softmax_weight(p[n][i] * g.scale2 - g.top[query(n, i)], g.share[query(n, i)]) : 0;
        if constexpr (kGradients) {
          Columns<N> dp;
          multiply_chunks<T>(dp, ring, chunks_v, Shape::kResident ? own_v : nullptr);
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              p[n][i] = bit_of(kept, n, i) ? p[n][i] * (dp[n][i] - g.delta[query(n, i)]) * shrink : 0;
        }
      }
      if constexpr (kSummed > 0) {
        const typename Shape::Packed weights(p, buffer + kStages * Shape::kStageBytes);
#pragma unroll
        for (int c = 0; c < kSummed; ++c) weights.multiply(sum + c * (kColumns<T> / 8), ring.next());
      } else {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[i / 2] += p[n][i];
      }
    }
  }
  ring.finish();

  nan_row |= __shfl_xor_sync(~0u, nan_row, 1);
  nan_row |= __shfl_xor_sync(~0u, nan_row, 2);
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int64_t row = (int64_t(split) * gridDim.x + blockIdx.x) * kBlock + at.row + 8 * high;  // of the parts
    const float all = sum_over_quad(total[high]);
    int kept = count[high] + __shfl_xor_sync(~0u, count[high], 1);
    kept += __shfl_xor_sync(~0u, kept, 2);
    if (threadIdx.x % 4 == 0) {
      if constexpr (FORM == Form::kGrowing)
        g.totals.largest[row] = largest[high], g.totals.total[row] = all, g.totals.count[row] = kept;
      if constexpr (FORM == Form::kDelta) g.parts.sums[row] = all;
    }
    if constexpr (kSummed > 0) {
      const bool is_nan = (nan_row & kRowBits << 2 * high) != 0;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n)
        *reinterpret_cast<float2*>(g.parts.sums + row * WIDTH + 8 * n + at.column) =
            is_nan ? float2{NAN, NAN} : float2{sum[n][2 * high], sum[n][2 * high + 1]};
    }
  }
}

template <class T, int WIDTH, Form FORM>
void run(const Operands<T>& g, cudaStream_t stream) {
  const bool gradients = FORM == Form::kGradient || FORM == Form::kDelta;
  const int chunks = chunks_of<T>(g.width) + (gradients ? chunks_of<T>(g.width_v) : 0);
  launch("asa_sums_kernel", &asa_sums_kernel<T, WIDTH, FORM>, dim3(g.n_heads * g.lists.tiles, g.parts.splits), kThreads,
         Layout<T, WIDTH>::bytes(chunks), stream, g);
}

template <class T, Form FORM>
void run(Operands<T> g, const T* summed, int width, cudaStream_t stream) {
  g.summed = summed;
  if (width == 64) return run<T, 64, FORM>(g, stream);
  if (width == 128) return run<T, 128, FORM>(g, stream);
  run<T, 256, FORM>(g, stream);
}

}  // namespace

template <class T>
void sum_survivors(Sum what, const Problem<T>& p, const Lists& lists, const RowGradients& row, const Parts& parts,
                   const Totals& totals, cudaStream_t stream) {
  const bool by_queries = what != Sum::kDk && what != Sum::kDv;
  Operands<T> g{};
  g.rows_are_queries = by_queries;
  g.n_heads = p.n_heads;
  g.padded = by_queries ? p.rows.padded : p.keys.padded, g.other_padded = by_queries ? p.keys.padded : p.rows.padded;
  g.width = p.width, g.width_v = p.width_v, g.scale2 = p.scale2;
  g.own = by_queries ? p.q : p.k, g.other = by_queries ? p.k : p.q;
  g.own_v = by_queries ? p.d_out : p.v, g.other_v = by_queries ? p.v : p.d_out;
  g.survivors = by_queries || p.columns.words == nullptr ? p.survivors : p.columns, g.heads = p.heads,
  g.per_image = p.per_image;
  g.counts = (by_queries ? p.rows : p.keys).counts, g.other_counts = (by_queries ? p.keys : p.rows).counts;
  g.not_finite = p.not_finite;
  g.top = what == Sum::kDv ? row.top : row.grad_top, g.share = row.share, g.delta = row.delta, g.bounds = p.bounds;
  g.lists = lists, g.parts = parts, g.totals = totals;
  switch (what) {
    case Sum::kValues: return run<T, Form::kGrowing>(g, p.v, p.width_v, stream);
    case Sum::kDelta:
      if constexpr (std::is_same_v<T, float>) run<T, 64, Form::kDelta>(g, stream);  // finish.cu says why
      return;
    case Sum::kDq: return run<T, Form::kGradient>(g, p.k, p.width, stream);
    case Sum::kDk: return run<T, Form::kGradient>(g, p.q, p.width, stream);
    case Sum::kDv: return run<T, Form::kWeight>(g, p.d_out, p.width_v, stream);
  }
}

#define INSTANTIATE(T)                                                                                                \
  template void sum_survivors(Sum, const Problem<T>&, const Lists&, const RowGradients&, const Parts&, const Totals&, \
                              cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
