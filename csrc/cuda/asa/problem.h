// Adaptive sparse attention on the GPU: what its kernels share, and the steps of a call. call.cu has their order.
//
// arrange.cu arranges tokens: [n_heads * padded, width], n_heads = B * heads, the map cut into tiles of 8 x 8, padding
// left out, zeros up to whole blocks of 64 tokens and to a width of 64, 128 or 256. So no tile needs a bounds check.
// Scores are in base 2: s2 = scale * log2(e) * <q_i, k_j>. Everything runs in one stream; no size depends on the data,
// nothing is read back, and sums are formed in a fixed order: results repeat bit for bit.
//
// select.cu decides every pair once and stores it as a bit; all later steps, the backward's too, read the bits. sums.cu
// sums over neighbours by tiles. finish.cu ends rows and columns: it adds one by one the pairs that survive only in the
// window, and all pairs of rows that keep few (`few`).

#pragma once

#include "../device.h"

namespace asa_ops::cuda {

constexpr int kBlock = 64;  // tokens of a block, rows and columns of a tile
constexpr int kThreads = 128;  // of a program: four warps, each with 16 rows of a tile, or with one row
constexpr int kWarps = kThreads / 32;
constexpr int kPrograms = 8;  // on a processor at a time, short kernels: 64 registers a thread, without spills
constexpr int kFew = 32;  // up to this many neighbours a row are taken one by one
constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kRowBytes = kBlock / 8 + int(sizeof(Half));  // of a query and a block of keys: 64 bits and a peak

// In which order the tokens of every image stand.
struct Order {
  int n = 0, padded = 0;
  const int32_t* order = nullptr;  // [images, padded] token at a position, -1 where there is none
  const int32_t* place = nullptr;  // [images, n] position of a token, -1 for padding
  const int32_t* counts = nullptr;  // [images] real tokens

  __host__ __device__ int blocks() const { return padded / kBlock; }
};

// Where the numbers of a [B, heads, N, D] tensor lie.
struct Strides {
  int64_t b = 0, h = 0, n = 0, d = 0;
  int shared = 1;  // heads that share one of the tensor's
};

// The tokens of a tensor, and where and in which order they are to stand.
template <class T>
struct Tokens {
  const T* x;
  Strides strides;
  Order order;
  int dim, width;  // before and after
  T* out;
};

// A multiplier of thresholds, float32, with strides of 0 where it is the same for all; no data: there is none.
struct Multiplier {
  const float* data = nullptr;
  Strides strides;
};

// A call. T: Half, BFloat16 or float.
template <class T>
struct Problem {
  int heads, n_heads;
  int per_image;  // 1: the order differs from image to image, 0: one for all
  Order rows, keys;
  int dim, dim_v, width, width_v;  // of q and k, of v; before and after arranging
  int grid_height, grid_width;
  int window;  // side, 0: no local block
  int topk;  // 0: none
  bool mutual;  // neighbours must be each other's
  bool symmetric;  // query is key
  bool has_bits;  // there are adaptive neighbours
  bool one_way_bits;  // bits are A, and M is A and its transpose, which thresholds that learn need; otherwise M
  bool few;  // rows keep few neighbours: one by one
  float scale, scale2;
  Multiplier alpha, beta;
  const T *q, *k, *v, *d_out;  // arranged
  const uint32_t* not_finite;  // [n_heads, keys / 32] keys whose value is not finite, which is 0 in v
  // [2, n_heads] the largest |v|, the largest finite sum of |do| of a query, as bits; null but in a backward of Half
  uint32_t* bounds;
  uint32_t* words;  // pair (i, j): bit j % 32 of words[j / 32][i]; every head's `stride` further on
  int64_t words_stride;
  Half* peaks;  // [key block, row] at least the largest score of a row with the keys of a block
  int64_t peaks_stride;
};

// Numbers of every head, `stride` of them after those of the head before; no data: there are none.
template <class U>
struct PerHead {
  U* data = nullptr;
  int64_t stride = 0;

  __device__ __forceinline__ U* of(int z) const { return data + z * stride; }
};

// What a forward pass returns, in raster order, [n_heads, n] and more, and what it keeps of every head.
template <class T>
struct Saved {
  T* out;  // [.., dim_v]
  float *lse, *lse_kept;
  int32_t* survivors;
  PerHead<float> kappa2, log_mean2;  // [n]
  PerHead<uint8_t> local;  // [n, window^2]
  PerHead<T> residual;  // [n, dim_v] what rounding took from out
  PerHead<float> base2;  // [3, n] in base 2: lse, the largest score of a survivor, the sum of exponentials below it
};

// Thresholds in arranged order, [n_heads, padded]: j is a neighbour of i if s2 - lse2 > cut2 and s2 >= kappa2.
struct Thresholds {
  float *lse2, *cut2, *kappa2;  // kappa2 null: no topk
  uint8_t* flags;  // [n_heads, row blocks, key blocks] tiles that reach a threshold of their rows
};

// For every block of tokens the blocks of the other side to visit, ascending.
struct Lists {
  int32_t* lists;  // [n_heads, blocks, others]
  int32_t* lengths;  // [n_heads, blocks]
  int others;
};

// A sum over neighbours in parts, [splits, n_heads * padded, width]; no parts: there is nothing to sum.
struct Parts {
  float* sums = nullptr;
  int splits = 0;
};

// The softmax of rows over their neighbours, in the same parts, [splits, n_heads * padded].
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
  const float largest = bits_as<float>(bounds[z]) * bits_as<float>(bounds[n_heads + z]);
  return exp2f(-fminf(fmaxf(ceilf(log2f(largest)) + (1 - 15), 0), 27));  // 27: what a Half can reach at head dim 256
}

// d(z): a triangle of half width `band` and area 1.
__device__ __forceinline__ float step_derivative(float z, float band) { return fmaxf(1 - fabsf(z) / band, 0) / band; }

// Launchers, in the order of a call.

// arrange.cu. `not_finite` is zeroed before; so is `bounds` [2, n_heads], which may be null.
void find_order(const bool* real, int images, int n, int height, int width, int padded, int32_t* order, int32_t* place,
                int32_t* counts, cudaStream_t stream);
// The tensors are value, query and, if there are three, key: of value it is noted what is not finite, and the bounds.
template <class T>
void arrange(const Tokens<T>& value, const Tokens<T>& query, const Tokens<T>& key, int tensors, int n_heads, int heads,
             int per_image, uint32_t* not_finite, uint32_t* bounds, cudaStream_t stream);
template <class T>
void arrange_gradient(const Problem<T>& problem, const T* d_out, Strides strides, const Saved<T>& saved, T* arranged,
                      const RowGradients& row, cudaStream_t stream);

// scores.cu: maximum and sum of exponentials of every row in `splits` parts, [splits, n_heads * padded]; the peaks.
template <class T>
void find_statistics(const Problem<T>& problem, int splits, float* largest, float* total, cudaStream_t stream);

// A threshold in base 2 for every row, [n_heads, n] in raster order, at or just below its k-th largest score.
template <class T>
void find_kth(const Problem<T>& problem, const PerHead<float>& kappa2, cudaStream_t stream);

// select.cu. Thresholds, and tiles within `band2` of them: from statistics, which also give the lse of `saved`, or,
// with 0 splits, from the lse that `saved` holds.
template <class T>
void find_thresholds(const Problem<T>& problem, int splits, const float* largest, const float* total,
                     const Saved<T>& saved, float band2, const Thresholds& thresholds, cudaStream_t stream);
// flags [n_heads, row blocks, key blocks]: tiles that hold a bit.
template <class T>
void find_occupied(const Problem<T>& problem, uint8_t* flags, cudaStream_t stream);
// Lists blocks J for every I where by_rows[I, J] and by_columns[J, I], each if given, and J >= I if `upper`.
void list_blocks(const uint8_t* by_rows, const uint8_t* by_columns, bool upper, int n_heads, int blocks,
                 const Lists& lists, cudaStream_t stream);
// The bits of dense attention.
template <class T>
void keep_everybody(const Problem<T>& problem, cudaStream_t stream);

// Decides the pairs of all listed tiles, and of their transposes if mutual; `occupied`, if not null, says which tiles
// hold any. Words and these are zeroed before.
template <class T>
void find_neighbours(const Problem<T>& problem, const Thresholds& thresholds, const Lists& lists, uint8_t* occupied,
                     cudaStream_t stream);

// sums.cu: sums over the neighbours in listed blocks: of values, with totals; the error of delta, a number a row; of
// dq / scale, dk / scale, dv.
enum class Sum { kValues, kDelta, kDq, kDk, kDv };
template <class T>
void sum_neighbours(Sum what, const Problem<T>& problem, const Lists& lists, const RowGradients& row,
                    const Parts& parts, const Totals& totals, cudaStream_t stream);

// -dl/dt of pairs outside the window, a number a row.
template <class T>
void sum_thresholds(const Problem<T>& problem, const Thresholds& thresholds, const Lists& lists,
                    const RowGradients& row, float band, const Parts& parts, cudaStream_t stream);

// finish.cu: rows and columns in raster order, summed from their parts and from the pairs that no tile sums.
template <class T>
void finish_out(const Problem<T>& problem, const Parts& values, const Totals& totals, const Saved<T>& saved,
                cudaStream_t stream);
// Adds its error to delta, so that sum_j p_ij (<do_i, v_j> - delta_i) is 0.
void correct_delta(const Problem<float>& problem, const Saved<float>& saved, const RowGradients& row,
                   const Parts& errors, cudaStream_t stream);
template <class T>
void finish_dq(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row, const Thresholds& thresholds,
               float band, const Parts& sums_q, const Parts& sums_t, T* dq, float* dalpha, float* dbeta,
               cudaStream_t stream);
template <class T>
void finish_dkv(const Problem<T>& problem, const Saved<T>& saved, const RowGradients& row, const Parts& sums_k,
                const Parts& sums_v, T* dk, T* dv, cudaStream_t stream);

// window.cu: the columns of all survivors, ascending, of every row from its offset on.
template <class T>
void write_columns(const Problem<T>& problem, const Saved<T>& saved, const int64_t* row_offsets, int32_t* col_indices,
                   int64_t columns, cudaStream_t stream);

}  // namespace asa_ops::cuda
