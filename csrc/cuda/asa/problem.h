// Adaptive sparse attention on the GPU: what its kernels share, and the steps of a call. call.h has their order.
//
// arrange.cu arranges tokens: n_heads = B * heads heads of `padded` tokens each, the map cut into tiles of 8 x 8,
// padding left out, zeros up to whole blocks of 64 tokens and to a width of 64, 128 or 256. So no tile needs a bounds
// check. Scores are in base 2: s2 = scale * log2(e) * <q_i, k_j>. Everything runs in one stream; no size depends on the
// data, nothing is read back, and sums are formed in a fixed order: results repeat bit for bit.
//
// select.cu decides every pair once and stores it as a bit: who survives, in the window or as a neighbour. All later
// steps, the backward's too, read the bits. sums.cu sums over survivors by tiles, dt.cu finds the gradients of
// thresholds. finish.cu ends rows and columns; where survivors are few it takes them one by one.

#pragma once

#include "../device.h"

namespace asa_ops::cuda {

constexpr int kBlock = 64;  // tokens of a block, rows and columns of a tile
constexpr int kThreads = 128;  // of a program: four warps, each with 16 rows of a tile, or with one row
constexpr int kWarps = kThreads / 32;
constexpr int kPrograms = 3;  // of long kernels on a processor at a time: left to the compiler, some spill
constexpr int kFew = 32;  // up to this many neighbours a row are taken one by one
constexpr int kChunkBytes = kBlock * 128;
constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLeastMultiplier = 0x1p-100f;  // see asa_ops/asa/types.py

// In which order the tokens of every image stand: arrange.cu finds it.
//
// A process that shares a map with others computes some blocks of its rows and of its columns. Arrays of rows, or of
// keys, have all of them; arrays of pairs or tiles, and sums in parts, have those of these blocks only. Pointers to
// what has fewer blocks are set back, so that the blocks of the map are counted there too.
struct Order {
  int n = 0, padded = 0;
  int first = 0, count = 0;  // blocks that a call computes, all or those of a process: the first one, and how many
  int depth = 1, height = 1, width = 0;  // of the grid
  int extra = 0;  // tokens before those of the grid, which keep everybody and are kept by everybody
  const bool* real = nullptr;  // [images, n] false at padding; null: all are real
  int32_t* order = nullptr;  // [images, padded] token at a position, -1 where there is none
  int32_t* place = nullptr;  // [images, n] position of a token, -1 for padding
  int32_t* counts = nullptr;  // [images] real tokens
  int32_t* extra_counts = nullptr;  // [images] how many of them, the first ones, are extra tokens

  __host__ __device__ int blocks() const { return padded / kBlock; }
  __host__ __device__ int computed() const { return count * kBlock; }  // positions
  __device__ __forceinline__ bool computes(int block) const { return block >= first && block < first + count; }
};

// Where the numbers of a [B, heads, N, D] tensor lie.
struct Strides {
  int64_t b = 0, h = 0, n = 0, d = 0;
  int shared = 1;  // heads that share one of the tensor's
};

// The tokens of a tensor, and where they are to stand, arranged.
template <class T>
struct Tokens {
  const T* x = nullptr;
  Strides strides;
  Order order;
  int dim = 0, width = 0;  // before and after
  bool by_groups = false;  // whether 16 bytes of a token are read at a time
  T* out = nullptr;
  T* transposed = nullptr;  // the same as transposed_at has it; null: not asked for
};

// A multiplier of thresholds, float32, with strides of 0 where it is the same for all; no data: there is none.
struct Multiplier {
  const float* data = nullptr;
  Strides strides;
};

// Numbers of every head, `stride` of them after those of the head before; no data: there are none.
template <class U>
struct PerHead {
  U* data = nullptr;
  int64_t stride = 0;

  __device__ __forceinline__ U* of(int z) const { return data + z * stride; }
};

// A bit for every pair of a head: that of query i and key j is bit j % 32 of [j / 32][i], `rows` queries after another.
// Tiles that the bits of tiles leave out were never written.
struct PairBits {
  uint32_t* words = nullptr;
  int64_t stride = 0;  // words of a head
  int rows = 0;

  __device__ __forceinline__ uint32_t* of(int z) const { return words + z * stride; }
};

// A bit for every tile of a head: that of blocks I and J is bit J % 32 of [I][J / 32].
struct TileBits {
  uint32_t* words = nullptr;
  int64_t stride = 0;  // words of a head
  int groups = 0;  // words of a row of tiles

  __device__ __forceinline__ uint32_t* word(int z, int i, int group) const {
    return words + z * stride + int64_t(i) * groups + group;
  }
  __device__ __forceinline__ bool at(int z, int i, int j) const { return *word(z, i, j / 32) >> j % 32 & 1; }
  __device__ __forceinline__ void set(int z, int i, int j) const { atomicOr(word(z, i, j / 32), 1u << j % 32); }
};

// A call. T: Half, BFloat16 or float.
template <class T>
struct Problem {
  int heads, n_heads;
  int per_image;  // 1: the order differs from image to image, 0: one for all
  Order rows, keys;
  int dim, dim_v, width, width_v;  // of q and k, of v; before and after arranging
  int window;  // positions of the local window, 0: no local block
  int sides[3];  // of the window
  int topk;  // 0: none
  bool mutual;  // neighbours must be each other's
  bool symmetric;  // query is key
  bool has_bits;  // there are adaptive neighbours; otherwise a window, or all keys
  bool few;  // rows keep few neighbours: one by one
  float scale, scale2;
  Multiplier alpha, beta;
  const T *q, *k, *v, *d_out;  // arranged
  // The same transposed, of float32 whose products take TF32: v in a forward, the others in a backward.
  const T *q_transposed, *k_transposed, *v_transposed, *d_out_transposed;
  uint32_t* not_finite;  // [n_heads, keys / 32] keys whose value is not finite, which is 0 in v
  // [2, n_heads] the largest |v|, the largest finite sum of |do| of a query, as bits; null but in a backward of Half
  uint32_t* bounds;
  PairBits survivors;  // of the rows that a call computes
  PairBits columns;  // of the keys that it computes; null: survivors has them, or nobody asks
  PairBits one_way;  // A of these keys, where thresholds learn and neighbours must be mutual
  TileBits occupied, occupied_columns;  // tiles with a survivor, [row block, key block] and transposed
  TileBits offered;  // beside `one_way`: whether a key of the block J has a query of the block I as its neighbour
  PerHead<Half> peaks;  // [key block, computed row] at least the largest score of a row with the keys of a block
  // [key block, row] the smallest of these scores with its sign turned, or a little more; inf if a key is missing. They
  // may be left out.
  PerHead<Half> floors;
};

// What a forward pass returns, in raster order, [n_heads, n] and more, and what it keeps of every head.
template <class T>
struct Saved {
  T* out;  // [.., dim_v]
  float *lse, *lse_kept;
  int32_t* survivors;
  PerHead<float> kappa2, log_mean2;  // [n]
  PerHead<uint8_t> local;  // [n, window] 1: a local survivor, 2: and a neighbour
  PerHead<T> residual;  // [n, dim_v] what rounding took from out
  PerHead<float> base2;  // [3, n] in base 2: lse, the largest score of a survivor, the sum of exponentials below it
};

// Thresholds in arranged order, [n_heads, padded]: j is a neighbour of i if s2 - lse2 > cut2 and s2 >= kappa2, or if one
// of the two is an extra token.
struct Thresholds {
  float *lse2, *cut2, *kappa2;  // kappa2 null: no topk
};

// For every tile of rows, a block or two, the blocks of the other side to visit, ascending.
struct Lists {
  uint32_t* entries = nullptr;  // [n_heads, tiles, others]
  int32_t* lengths = nullptr;  // [n_heads, tiles]
  int tiles = 0, others = 0;
  int blocks = 1;  // of a tile
  int first = 0;  // block
};

// An entry: a block; whether it may hold pairs of a window; for which blocks of the tile of rows it is, the first or the
// second; and for which of them all pairs are neighbours.
constexpr uint32_t kEntryBlock = (1u << 24) - 1, kEntryLocal = 1u << 24, kEntryFirst = 1u << 30, kEntryWhole = 1u << 28;

// A sum over survivors in parts, [splits, n_heads * computed, width]; no parts: there is nothing to sum.
struct Parts {
  float* sums = nullptr;
  int splits = 0;
};

// The softmax of rows over their survivors, in the same parts, [splits, n_heads * computed].
struct Totals {
  float* largest;  // score, base 2
  float* total;  // of exp2(s2 - largest)
  int32_t* count;
};

// What the backward knows of rows, arranged, [n_heads, padded].
struct RowGradients {
  float* delta;  // <do, out>
  float* top;  // score in base 2 from which on exponentials are 1: -inf without survivors, inf at padding
  float* grad_top;  // the same for gradients of scores: inf too where a single survivor has all the weight, so none
  float* share;  // 1 over the sum of these exponentials
  float* kept2;  // log-sum-exp over survivors in base 2, with the largest instead of top
  uint32_t* not_finite_head;  // [n_heads] whether the head has a row whose output is NaN
};

__device__ __forceinline__ int image_of(int z, int heads, int per_image) { return z / heads * per_image; }

// Index of a head's row in an array of rows.
__device__ __forceinline__ int64_t row_at(int z, int padded, int row) { return int64_t(z) * padded + row; }

__device__ __forceinline__ float multiplier_at(const Multiplier& x, int z, int heads, int token) {
  return x.data[z / heads * x.strides.b + z % heads * x.strides.h + token * x.strides.n];
}

// The bits of the first n of 32 columns.
__device__ __forceinline__ uint32_t first_bits(int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// How much a score of that size may differ where another kernel forms it again: kernels round in different ways. Either
// score may be off by eight units in the last place.
__device__ __forceinline__ float last_bits(float score) { return fabsf(score) * 0x1p-19f; }

// Where the exponentials of a row begin, given its largest survivor: scores from here on weigh as much as that one. It
// is the largest itself, unless scores are so large that their last bits decide between everything and nothing.
__device__ __forceinline__ float top_of(float largest) { return largest - fmaxf(2 * last_bits(largest) - 1, 0); }

// p_ij of a survivor from s_ij - top_i in base 2.
__device__ __forceinline__ float softmax_weight(float gap2, float share) { return exp2f(fminf(gap2, 0)) * share; }

// c_ij of asa_ops.asa from s_ij - lse_kept_i in base 2: to first order the weight that a pair has or would have.
__device__ __forceinline__ float admission_weight(float gap2, bool kept, bool empty) {
  if (empty) return 1;
  const float below = exp2f(-fabsf(gap2)), weight = gap2 > 0 ? 1 : below;
  return kept ? weight : weight / (1 + below);
}

// A power of two by which gradients of a head's scores fit into 16 bits of a Half, 1 without `bounds`: they are at most
// twice the product of these.
__device__ __forceinline__ float shrink_of(const uint32_t* bounds, int n_heads, int z) {
  if (bounds == nullptr) return 1;
  const uint32_t largest = bits_as<uint32_t>(bits_as<float>(bounds[z]) * bits_as<float>(bounds[n_heads + z]));
  const int log2 = int(largest >> 23) - 127 + ((largest & 0x7fffff) != 0);  // rounded up
  return bits_as<float>(uint32_t(127 - min(max(log2 + 1 - 15, 0), 27))
                        << 23);  // 27: what a Half can reach at head dim 256
}

// d(z): a triangle of half width `band` and area 1.
__device__ __forceinline__ float step_derivative(float z, float band) { return fmaxf(1 - fabsf(z) / band, 0) / band; }

// Where number `d` of a token lies among arranged ones, `row` of all heads. Chunks of 64 tokens by 128 bytes follow one
// another, as they lie in shared memory too: groups of 16 bytes where no two tokens of eight share memory banks.
template <class T>
__host__ __device__ __forceinline__ int64_t arranged_at(int64_t row, int d, int width) {
  constexpr int kGroup = 16 / int(sizeof(T)), kColumns = 8 * kGroup;
  const int within = int(row % kBlock);
  return (row - within) * width + (d / kColumns * kBlock + within) * kColumns +
         ((d % kColumns / kGroup) ^ (within & 7)) * kGroup + d % kGroup;
}

// Where it lies among transposed ones, of float32: a block has two panels of `width` rows by 32 tokens, swizzled alike.
// Every eight tokens stand in the order 0, 2, 4, 6, 1, 3, 5, 7, in which weights are multiplied with them.
__host__ __device__ __forceinline__ int64_t transposed_at(int64_t row, int d, int width) {
  const int within = int(row % kBlock), group = within % 32 / 8 * 2 + within % 2;
  return (row - within) * width + (within / 32 * width + d) * 32 + (group ^ (d & 7)) * 4 + within % 8 / 2;
}

// Launchers, in the order of a call.

// arrange.cu: the orders, and tokens in them; of value it is noted what is not finite, and the bounds. Key may be left
// out where it is query. `cleared` words are set to 0.
template <class T>
struct Arranging {
  Tokens<T> value, query, key, gradient;  // no out: left out
  bool to_tf32;  // rounded to what products take
  uint32_t* cleared;
  int64_t cleared_words;
};
template <class T>
void arrange(const Problem<T>& problem, const Arranging<T>& tokens, cudaStream_t stream);
// The same with the gradient of the output, and the lists of tiles with survivors, by rows and by columns. Not finite
// heads and bounds are zeroed before.
template <class T>
void arrange_backward(const Problem<T>& problem, const Arranging<T>& tokens, const Saved<T>& saved,
                      const RowGradients& row, const Lists& by_rows, const Lists& by_columns, cudaStream_t stream);

// Maximum and sum of exponentials of rows in parts, [splits, n_heads * computed]: a row has parts of its keys.
struct Statistics {
  float *largest, *total;
  int splits;  // at most, or of every row
  // Tiles of two blocks of rows by `key_tiles` of keys, laid end to end, may be cut into stretches of equal length, one
  // for each program; a stretch leaves a part for each two blocks of rows. 0 programs: they are not.
  int programs = 0, row_tiles = 0, key_tiles = 0;

  // The program that has a tile, of so many.
  __host__ __device__ __forceinline__ static int program_of(int64_t tile, int64_t tiles, int programs) {
    return int(((tile + 1) * programs - 1) / tiles);
  }
  // The programs that have the tiles of two blocks of rows, the `pair`-th of all `pairs`: the first one, and how many.
  __device__ __forceinline__ int first_program(int pair, int pairs) const {
    return program_of(int64_t(pair) * key_tiles, int64_t(pairs) * key_tiles, programs);
  }
  __device__ __forceinline__ int count(int z, int n_heads, int block) const {
    if (programs == 0) return splits;
    const int pair = z * row_tiles + block / 2, pairs = n_heads * row_tiles;
    const int last = program_of(int64_t(pair + 1) * key_tiles - 1, int64_t(pairs) * key_tiles, programs);
    return last - first_program(pair, pairs) + 1;
  }
};

// scores.cu: the statistics, and the peaks.
template <class T>
void find_statistics(const Problem<T>& problem, const Statistics& statistics, cudaStream_t stream);

// A threshold in base 2 for every row, [n_heads, n] in raster order, at or just below its k-th largest score.
template <class T>
void find_kth(const Problem<T>& problem, const PerHead<float>& kappa2, cudaStream_t stream);

// select.cu. What the plan needs beside a problem. Of some rows alone there are no lists yet: they need what other
// processes find.
struct Plan {
  Statistics statistics;
  Thresholds thresholds;
  float band2;  // tiles within it of a threshold are visited too
  TileBits reached;  // tiles whose peaks exceed a threshold of their rows
  TileBits reached_back;  // the same transposed, if neighbours must be mutual; zeroed
  TileBits whole, whole_back;  // the same of tiles whose floors exceed all thresholds; none where floors are left out
  TileBits local;  // tiles with a local survivor, either way round if neighbours must be mutual; zeroed
  uint32_t* done;  // [n_heads] programs; zeroed
  Lists lists;  // tiles that may hold a survivor, J >= I only if neighbours must be mutual
  uint32_t* entries;  // [n_heads] of these lists, an empty list counted as one; zeroed
};
// Log-sum-exps, thresholds, local survivors, lists.
template <class T>
void make_plan(const Problem<T>& problem, const Plan& plan, const Saved<T>& saved, cudaStream_t stream);

// exchange.cu: what processes that share a map tell each other of the rows that they scan. `numbers` [n_heads, rows,
// numbers_of(window)]: lse2, cut2, kappa2, the k-th score, log_mean2, and four local flags each. `flags` [n_heads, row
// blocks, key blocks], where there are thresholds: whether a tile reaches one of its rows.
__host__ __device__ __forceinline__ int numbers_of(int window) { return 5 + (window + 3) / 4; }
// Of the rows that a call computes, after their plan.
template <class T>
void tell_rows(const Problem<T>& problem, const Plan& plan, const Saved<T>& saved, float* numbers, uint8_t* flags,
               cudaStream_t stream);
// Of all rows: their thresholds, local flags and tiles, the statistics of those that a call computes, and the lists of
// these; `of_keys`, if it has room: of all rows with the keys that it computes. Clears bits of tiles.
template <class T>
void take_rows(const Problem<T>& problem, const Plan& plan, const Lists& of_keys, const Saved<T>& saved,
               const float* numbers, const uint8_t* flags, cudaStream_t stream);

// Decides the pairs of all listed tiles, and of their transposes if mutual; lists those that hold survivors.
template <class T>
void find_survivors(const Problem<T>& problem, const Plan& plan, const Saved<T>& saved, uint32_t* done,
                    const Lists& lists, cudaStream_t stream);

// sums.cu: sums over the survivors in listed blocks: of values, with totals; the error of delta, a number a row; of
// dq / scale, dk / scale, dv.
enum class Sum { kValues, kDelta, kDq, kDk, kDv };
template <class T>
void sum_survivors(Sum what, const Problem<T>& problem, const Lists& lists, const RowGradients& row, const Parts& parts,
                   const Totals& totals, cudaStream_t stream);

// finish.cu: rows and columns in raster order, summed from their parts, or over survivors that no tile sums.
template <class T>
void finish_out(const Problem<T>& problem, const Parts& values, const Totals& totals, const Saved<T>& saved,
                cudaStream_t stream);
// Adds its error to delta, so that sum_j p_ij (<do_i, v_j> - delta_i) is 0.
void correct_delta(const Problem<float>& problem, const Saved<float>& saved, const RowGradients& row,
                   const Parts& errors, cudaStream_t stream);
template <class T>
void finish_dq(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row, const Parts& sums, T* dq,
               cudaStream_t stream);
template <class T>
void finish_dkv(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row, const Parts& sums_k,
                const Parts& sums_v, T* dk, T* dv, cudaStream_t stream);

// dt.cu: gradients of thresholds, of every row in raster order; null where they are not asked for.
struct Learning {
  float band;
  float *dalpha, *dbeta;  // [n_heads, n]
  uint32_t* entries;  // [n_heads, row blocks, key blocks] room for lists
  float* parts;  // [splits + 1, n_heads * computed] room for sums
  int splits;
  uint32_t* done;  // [n_heads, row blocks] programs; zeroed
};
template <class T>
void find_threshold_gradients(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row,
                              const Learning& learning, cudaStream_t stream);

// window.cu: the columns of all survivors, ascending, of every row from its offset on.
template <class T>
void write_columns(const Problem<T>& problem, const Saved<T>& saved, const int64_t* row_offsets, int32_t* col_indices,
                   int64_t columns, cudaStream_t stream);

}  // namespace asa_ops::cuda
