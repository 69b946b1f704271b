// The straight-through gradients of thresholds, where they learn:
//
// -dl/dt_i = sum_j d(s_ij - t_i) [s_ij >= kappa_i] A_ji [(1 - L_ij) G_ij + (1 - L_ji) G_ji], G = c (<do, v> - delta),
//
// and the like of the local threshold. Pairs outside the window, which have no L, are summed by tiles: both directions
// of a pair are laid out [i, j], four products a tile, two if neighbours need not be mutual. Tiles matter that hold a
// score in the band around a threshold and, if mutual, a neighbour the other way. Pairs in the window are taken one by
// one. The last program of a block of rows adds up what all found.

#include "lists.h"
#include "rows.h"
#include "thresholds.h"
#include "tiles.h"

namespace asa_ops::cuda {
namespace {

constexpr int kShares = 4;  // programs that share the windows of a block of rows

struct Shared {
  char chunks[kStages * 2 * kChunkBytes];
  RowThresholds rows[kBlock];
  int length;
};

// Lists the tiles of a program, every `splits`-th of a block of rows; for one warp.
template <class T>
__device__ __forceinline__ int list_band(const Problem<T>& p, int z, int block, int n_keys, int split, int splits,
                                         float band2, const RowThresholds* rows, uint32_t* entries) {
  const int lane = threadIdx.x;
  int length = 0;
  for (int start = split; start * kBlock < n_keys; start += 32 * splits) {
    const int j = start + lane * splits;
    bool here = j * kBlock < n_keys && (!p.mutual || p.offered.at(z, block, j));
    if (here) {
      const Half* const peaks = p.peaks.of(z) + int64_t(j) * p.rows.computed() + block * kBlock;
      here = false;
      for (int i = 0; i < kBlock && !here; ++i) here = is_reached(rows[i], to_float(peaks[i]), band2);
    }
    const unsigned votes = __ballot_sync(~0u, here);
    if (here) entries[length + __popc(votes & first_bits(lane))] = j;
    length += __popc(votes);
  }
  return length;
}

// Sums over the pairs outside the window in listed tiles, a number a row.
template <class T>
__device__ __forceinline__ void sum_tiles(const Problem<T>& p, const RowGradients& row, float band, int z, int block,
                                          int image, int n_keys, const uint32_t* entries, Shared& shared, float* sums) {
  const int length = shared.length;
  const int64_t own = row_at(z, p.rows.padded, block * kBlock), keys = row_at(z, p.keys.padded, 0);
  const int32_t* const row_tokens = p.rows.order + row_at(image, p.rows.padded, block * kBlock);
  const int32_t* const key_tokens = p.keys.order + row_at(image, p.keys.padded, 0);
  const int extra = p.keys.extra_counts[image];  // whoever keeps these, thresholds are not why
  const int chunks = chunks_of<T>(p.width), chunks_v = chunks_of<T>(p.width_v);
  const int one_way = chunks + chunks_v, steps = p.mutual ? 2 * one_way : one_way;  // of a tile
  const auto load = [&](int step, char* chunk) {
    const int turn = step / steps;
    if (turn >= length) return;
    const int64_t other = keys + int64_t(entries[turn]) * kBlock;
    const bool back = step % steps >= one_way;
    const int index = step % one_way;
    if (index < chunks) {
      copy_chunk(chunk, (back ? p.k : p.q) + own * p.width, index);
      copy_chunk(chunk + kChunkBytes, (back ? p.q : p.k) + other * p.width, index);
    } else {
      copy_chunk(chunk, (back ? p.v : p.d_out) + own * p.width_v, index - chunks);
      copy_chunk(chunk + kChunkBytes, (back ? p.d_out : p.v) + other * p.width_v, index - chunks);
    }
  };
  Ring<kStages, 2 * kChunkBytes, decltype(load)> ring(shared.chunks, load);
  const Fragment at;
  float sum[2] = {0, 0};

  for (int turn = 0; turn < length; ++turn) {
    const int j = int(entries[turn]);
    const int64_t other = keys + int64_t(j) * kBlock;
    const uint32_t survivors =
        p.occupied.at(z, block, j) ? bits_by_rows(p.survivors.of(z), p.survivors.rows, block, j, at) : 0;
    const uint32_t counting = p.mutual ? bits_by_columns(p.one_way.of(z), p.one_way.rows, block, j, at) : ~0u;
    Tile s, product;
    multiply_chunks<T>(s, ring, chunks);
    multiply_chunks<T>(product, ring, chunks_v);
    // s becomes the derivative of the step, 0 for pairs that do not count; product becomes G_ij.
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int64_t i_row = own + at.row + 8 * high;
      const RowThresholds own_thresholds = shared.rows[at.row + 8 * high];
      const float kept2 = row.kept2[i_row], delta = row.delta[i_row];
      const int token = row_tokens[at.row + 8 * high];
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 2 * high; i < 2 * high + 2; ++i) {
          const int column = j * kBlock + at.column_of(n, i);
          bool counts = bit_of(counting, n, i) && column < n_keys && column >= extra;
          if (counts && p.window > 0) counts = window_offset(p, token, key_tokens[column]) < 0;
          const float s2 = s[n][i] * p.scale2;
          counts = counts && s2 >= own_thresholds.kappa2;
          product[n][i] =
              admission_weight(s2 - kept2, bit_of(survivors, n, i), kept2 == -INFINITY) * (product[n][i] - delta);
          s[n][i] = counts ? step_derivative((s2 - own_thresholds.lse2 - own_thresholds.cut2) * kLn2, band) : 0;
          if (!p.mutual) sum[high] += s[n][i] > 0 ? s[n][i] * product[n][i] : 0;
        }
    }
    if (p.mutual) {
      Tile back, back_v;
      multiply_chunks<T>(back, ring, chunks);
      multiply_chunks<T>(back_v, ring, chunks_v);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t column = other + at.column_of(n, i);
          const float kept2 = row.kept2[column];
          const float weight =
              admission_weight(back[n][i] * p.scale2 - kept2, bit_of(survivors, n, i), kept2 == -INFINITY);
          const float offer = product[n][i] + weight * (back_v[n][i] - row.delta[column]);
          sum[i / 2] += s[n][i] > 0 ? s[n][i] * offer : 0;
        }
    }
  }
  ring.finish();
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const float all = sum_over_quad(sum[high]);
    if (threadIdx.x % 4 == 0) sums[int64_t(blockIdx.x) * kBlock + at.row + 8 * high] = all;
  }
}

// -dl/dt and -dl/du of a row from the pairs in its window; a warp.
template <class T>
__device__ __forceinline__ float2 sum_window(const Problem<T>& p, const Saved<T>& saved, const RowGradients& row,
                                             const Learning& learning, const RowThresholds& own, int z, int image,
                                             int token, int position) {
  const int64_t index = row_at(z, p.rows.padded, position);
  const float kept2 = row.kept2[index], delta = row.delta[index], band = learning.band;
  const Vector q = vector_at(p.q, index, p.width), k = vector_at(p.k, index, p.width);
  const Vector v = vector_at(p.v, index, p.width_v), d_out = vector_at(p.d_out, index, p.width_v);
  float dt = 0, du = 0;
  visit_window(p, image, token, [&](int offset, int j) {
    if (j < 0) return;
    const int64_t key = row_at(z, p.keys.padded, j);
    const uint8_t flag = local_flag(p, saved.local, z, token, offset);
    const bool neighbour = flag != 0 ? flag == kBoth : p.has_bits && survives(p, z, position, j);
    const float s2 = dot(q, vector_at(p.k, key, p.width)) * p.scale2;
    const float gain = dot(d_out, vector_at(p.v, key, p.width_v)) - delta;
    float offer = admission_weight(s2 - kept2, flag != 0 || neighbour, kept2 == -INFINITY) * gain;
    if (learning.dbeta != nullptr && !neighbour) {
      // The forward's mean: a score that equals it there equals it here, to the last bit.
      const float mean2 = saved.log_mean2.of(z)[token];
      const float step = step_derivative((s2 - mean2 - log2f(multiplier_at(p.beta, z, p.heads, token))) * kLn2, band);
      du += step > 0 ? step * offer : 0;
    }
    if (learning.dalpha == nullptr || !(s2 >= own.kappa2)) return;
    if (p.mutual && !(p.offered.at(z, position / kBlock, j / kBlock) && bit_at(p.one_way, z, j, position))) return;
    const float step = step_derivative((s2 - own.lse2 - own.cut2) * kLn2, band);
    if (!(step > 0)) return;
    if (flag != 0) offer = 0;
    if (p.mutual && !local_flag(p, saved.local, z, window_token(p, token, offset), back_of(p, offset))) {
      const float back2 = dot(k, vector_at(p.q, key, p.width)) * p.scale2, kept_j = row.kept2[key];
      const float back_gain = dot(v, vector_at(p.d_out, key, p.width_v)) - row.delta[key];
      offer += admission_weight(back2 - kept_j, neighbour, kept_j == -INFINITY) * back_gain;
    }
    dt += step * offer;
  });
  return {dt, du};
}

// Axis 1 of the grid: `splits` programs that sum tiles, then kShares that sum windows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    asa_dt_kernel(Problem<T> p, Saved<T> saved, RowGradients row, Learning learning) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int splits = learning.splits, share = int(blockIdx.y) - splits;
  const int z = blockIdx.x / p.rows.count, block = p.rows.first + blockIdx.x % p.rows.count;
  const int image = image_of(z, p.heads, p.per_image);
  const int n_keys = p.keys.counts[image];
  const int32_t* const tokens = p.rows.order + row_at(image, p.rows.padded, block * kBlock);
  const int64_t rows = int64_t(gridDim.x) * kBlock, own = int64_t(blockIdx.x) * kBlock;  // of the parts
  if (threadIdx.x < kBlock) {
    const int token = tokens[threadIdx.x];
    RowThresholds found = thresholds_of(p, saved, z, token, n_keys, token < 0 ? 0 : saved.base2.of(z)[token]);
    found.kappa2 -= 2 * last_bits(found.kappa2);  // scores are formed again: no neighbour may miss it
    if (token < p.rows.extra) found.cut2 = INFINITY;  // which reaches nobody: no threshold decides of its neighbours
    shared.rows[threadIdx.x] = found;
  }
  __syncthreads();
  // The gradient of a multiplier from that of the logarithm of its threshold.
  const auto store = [&](float* gradient, const Multiplier& multiplier, int token, float negative) {
    const float x = multiplier_at(multiplier, z, p.heads, token);
    gradient[row_at(z, p.rows.n, token)] = row.not_finite_head[z] != 0 ? NAN : x < kLeastMultiplier ? 0 : -negative / x;
  };
  if (share < 0) {
    const int room = (p.keys.blocks() + splits - 1) / splits;
    uint32_t* const entries = learning.entries + (int64_t(blockIdx.x) * splits + blockIdx.y) * room;
    if (threadIdx.x < 32) {
      const float band2 = learning.band * float(kLog2E);
      const int length = list_band(p, z, block, n_keys, blockIdx.y, splits, band2, shared.rows, entries);
      if (threadIdx.x == 0) shared.length = length;
    }
    __syncthreads();
    sum_tiles(p, row, learning.band, z, block, image, n_keys, entries, shared, learning.parts + blockIdx.y * rows);
  } else {
    for (int i = share * kWarps + int(threadIdx.x) / 32; i < kBlock; i += kShares * kWarps) {
      const int token = tokens[i];
      if (token < 0) continue;
      const float2 found = sum_window(p, saved, row, learning, shared.rows[i], z, image, token, block * kBlock + i);
      if (threadIdx.x % 32 != 0) continue;
      learning.parts[splits * rows + own + i] = found.x;
      if (learning.dbeta != nullptr) store(learning.dbeta, p.beta, token, found.y);
    }
  }
  if (learning.dalpha == nullptr || !arrive_last(learning.done + blockIdx.x, 1, gridDim.y)) return;
  if (threadIdx.x >= kBlock || tokens[threadIdx.x] < 0) return;
  float sum = 0;
  const int parts = p.window > 0 ? splits + 1 : splits;
  for (int part = 0; part < parts; ++part) sum += load_fresh(learning.parts + part * rows + own + threadIdx.x);
  store(learning.dalpha, p.alpha, tokens[threadIdx.x], sum);
}

}  // namespace

template <class T>
void find_threshold_gradients(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row,
                              const Learning& learning, cudaStream_t stream) {
  const int programs = learning.splits + (problem.window > 0 ? kShares : 0);
  launch("asa_dt_kernel", &asa_dt_kernel<T>, dim3(problem.n_heads * problem.rows.count, programs), kThreads,
         sizeof(Shared), stream, problem, saved, row, learning);
}

#define INSTANTIATE(T)                                                                                             \
  template void find_threshold_gradients(const Problem<T>&, const Saved<T>&, const RowGradients&, const Learning&, \
                                         cudaStream_t);
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
INSTANTIATE(float)

}  // namespace asa_ops::cuda
