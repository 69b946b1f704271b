// What call.cpp and the kernels (kernels.h, compiled once per instruction set) share.
#pragma once

#include <cstdint>
#include <type_traits>

namespace asa_ops::cpu {

constexpr int64_t kBlock = 64;  // the bits of a word
constexpr int64_t kMostRows = 4 * kBlock;  // taken at a time, which share what the cache holds of the other side
constexpr double kLeastMultiplier = 0x1p-100;  // see asa_ops/asa/types.py
constexpr int64_t kPad = 16;  // as many numbers as a vector of any instruction set has at most

// AMX multiplies 32 rows and columns at a time, over steps of 32 terms; tiles.h describes how factors lie.
constexpr int64_t kSquare = 32, kTileNumbers = 16 * kSquare;
enum class Tiled { columns, terms, left_terms };  // what the rows of a matrix are in a right or a left factor

// bf16 numbers of a factor of n rows of `dim` numbers, each the sum of so many.
constexpr int64_t tiles_size(int64_t n, int64_t dim, int64_t parts) {
  return parts * ((n + kSquare - 1) / kSquare * kSquare) * ((dim + kSquare - 1) / kSquare * kSquare);
}

enum class Type { half, bfloat16, float32, float64 };

// How the sums over the survivors of some rows are formed: from whole rows of keys, those that do not survive masked;
// from the keys that any of the rows keeps, masked likewise; or row by row from lists.
enum class Kind : uint8_t { whole, shared, listed };

// What scan() leaves of a row's output: nothing; the sum over its adaptive neighbours, which aggregate() corrects; or the
// sum over its survivors among the keys of settled blocks, to which aggregate() adds the others. The last is put off, and
// left to scan_again(), where the bits of those blocks are not all there.
enum class Begun : uint8_t { nothing, neighbours, survivors, put_off };

// How many blocks of keys, from the first on, are settled for one of so many blocks of queries. Blocks are scanned in
// order, side by side: with few threads, the bits of those a sixteenth of all before are there. The number depends on
// nothing else, so sums do not depend on timing.
constexpr int64_t settled_blocks(int64_t block, int64_t blocks) {
  const int64_t apart = (blocks + 15) / 16;
  return block < apart ? 0 : block - apart;
}

// The rows of one head in a tensor: `dim` numbers each, the first at `numbers`.
struct Rows {
  const void* numbers;
  Type type;
  int64_t dim, stride_n, stride_d;
};

// One head of one image.
template <class T>
struct Problem {
  int64_t n_q, n_k, dim, dim_v;
  int64_t blocks_q, blocks_k;
  int64_t q_at_a_time, k_at_a_time;  // rows that a thread takes at a time: kBlock, 2 kBlock or kMostRows
  int64_t depth, height, width;  // of the grid
  int64_t window[3], positions;  // sides of the local window, and how many positions it has; 0: no local block
  int64_t extra;  // tokens before those of the grid, which keep everybody and are kept by everybody
  int64_t topk;
  bool reciprocal;
  bool keeps;  // a backward will read bits and local
  bool thresholded;  // there are adaptive neighbours; otherwise all keys are neighbours, or none if there is a beta
  int64_t n_real;  // keys
  double log_n_real;

  // Of a problem that is spread over processes, each has some of the rows, or of the columns: these queries, whose blocks
  // bits starts with, and the keys from this one on, n_k of them, which are all but for the local window.
  int64_t begin, end;  // begin is a multiple of kBlock
  int64_t first_key;

  T scale;

  // [n][dim]; padding and values that are not finite set to 0. What is written, and what belongs to a row, is there for
  // the rows from `begin` to `end` only; its pointers are those of row 0 all the same.
  const T *q, *k, *v;
  const T *alpha, *beta;  // [n_q], or null
  const bool *real_q, *real_k;  // or null: all
  const bool* not_finite;  // [n_k] keys whose value is not finite, or null: none

  T *out, *lse, *lse_kept, *kappa, *log_mean;
  int32_t* survivors;
  // What scan() leaves in `out` is the sum of w v, w = exp(s - shift) * factor, and here the sums of w and of the squares
  // of w times the size of v, its largest number; null, all of them: it leaves nothing. Of rows that are put off it leaves
  // shift and factor. Sizes are relative to the largest. In the backward, shift and factor are those of the survivors'
  // probabilities, exp(s - shift) * factor; null: nobody asks.
  Begun* begun;  // [n_q]
  T *shift, *factor, *mass, *squares;
  T* sizes;  // [n_k]
  uint8_t* complete;  // [blocks_q] whether a block has been scanned; null: other processes scan some, at any time
  // Whether scan() keeps scores for aggregate(), those of the rows from `begin` on, rows as far apart as
  // Kernels::score_stride says. Else aggregate() forms scores again.
  bool keeps_scores;
  T* scores;
  // If thresholded, [blocks of rows][blocks_k][64]: bit c of word [I][J][r] says whether query 64 I + r has key 64 J + c
  // as adaptive neighbour.
  uint64_t* bits;
  // The same the other way round, for neighbours that must be mutual: of query block J the words of key block I, the first
  // of these being that of the rows, are at back + J * back_stride + I * 64. In one process these are bits.
  // Where only these are there, they are M, which is symmetric.
  const uint64_t* back;
  int64_t back_stride;
  bool* local;  // [n_q][positions], with a beta
  // Packed for products of whole rows (gemm.h), where there are any: keys and values by panels; and by slices values, or
  // in the backward keys, queries and gradients.
  T *k_panels, *v_panels, *v_slices, *k_slices, *q_slices, *d_out_slices;
  // The same for AMX (tiles.h), if q, k and v are sums of so many bf16 numbers: 1 or 2; 0: without AMX.
  int64_t parts;
  const uint16_t *k_tiles, *v_tiles;  // as columns, as terms; in the backward both as columns
  const uint16_t *k_terms, *q_left, *d_out_left;  // backward: keys as terms; queries and gradients of whole rows

  // backward
  // [n_q] how the process that has all keys of a row treats it; then shift, factor and delta of the row are from there too,
  // and dq is null. Null: all keys are here.
  const Kind* kinds;
  const T* d_out;
  T *dq, *dk, *dv, *dalpha, *dbeta;
  T band;
  T* delta;  // [n_q] <do_i, out_i>, from the sum of p_ij <do_i, v_j>

  uint64_t* words(int64_t block, int64_t j) const { return bits + ((block - begin / kBlock) * blocks_k + j) * kBlock; }
  const uint64_t* words_back(int64_t block, int64_t j) const {
    return back + j * back_stride + (block - begin / kBlock) * kBlock;
  }
  bool has_block(int64_t block) const { return begin <= block * kBlock && block * kBlock < end; }  // of queries
  bool scanned() const { return thresholded || positions > 0; }
  bool is_one_block() const { return blocks_q == 1 && blocks_k == 1; }
};

// What the backward knows of every row before its first pass.
struct Groups {
  Kind* kind;  // [n_q]
  int32_t* keys;  // [n_q] how many keys the row and those that share with it keep together
  int32_t* listed;  // [n_q] how many the row keeps
  int64_t *numbers, *columns;  // [n_q + 1] where its entries start
};

// The pairs of some consecutive query blocks between the two passes of the backward: the first writes probabilities
// p_ij and gradients ds_ij, the second sums them by column. Row i has numbers from groups.numbers[i] -
// groups.numbers[begin] on: those of all keys, of its survivors in ascending order, or, at the first of the rows that
// share keys, of these, for each key those of all rows. Keys lie from groups.columns[i] - groups.columns[begin] on.
template <class T>
struct Slab {
  int64_t begin, end;  // rows; begin is a multiple of kMostRows
  Groups groups;
  T *p, *ds;
  int32_t* columns;
  int32_t* starts;  // [blocks_k + 1][end - begin]: where the keys of a column block start in a row's list, else 0
};

// What the gradient of alpha takes beside a problem. Where neighbours must be mutual, every two blocks of tokens are one
// pair, at their distance, blocks in a circle: what it adds to alpha of the first block is `ahead`, of the second `behind`.
// Otherwise the distance is the number of a block of keys, and there is nothing behind.
template <class T>
struct AlphaPairs {
  const T *q, *k, *v, *d_out;  // packed by blocks
  const uint64_t* learns;  // bit r of word I: whether alpha of row 64 I + r has a gradient
  int64_t first, last;  // distances
  T *ahead, *behind;  // [last - first][blocks of rows][kBlock], 0 at first
};

// Hands out the blocks of one pass to threads. Results do not depend on which thread takes a block.
struct Queue {
  int64_t next, end;
  bool failed = false;  // the numbers of survivors are not those of the bits
  bool take(int64_t& block) {
    block = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    return block < end;
  }
};

// Each pass takes blocks from a queue and writes nothing outside them. `scratch` is memory of one thread, of the size
// that the function named *_bytes returns.
template <class T>
struct Kernels {
  int64_t pad;  // head dims are multiples of this, padded with zeros
  int64_t (*panels)(int64_t n);  // how many panels n keys make
  int64_t (*panel_size)(int64_t dim);  // numbers in one
  void (*pack_panels)(const T* x, int64_t n, int64_t dim, T* panels, Queue&);  // one at a time
  void (*pack_slices)(const T* x, int64_t n, int64_t dim, T* slices, Queue&);  // as many rows as a panel has
  void (*pack_blocks)(const T* x, int64_t n, int64_t dim, T* blocks, Queue&);
  void (*pack_tiles)(const T* x, int64_t n, int64_t dim, int64_t parts, Tiled, const Kind*, uint16_t* tiles, Queue&);

  void (*read_rows)(const Rows&, int64_t begin, int64_t end, int64_t padded, const bool* real, T* to);
  void (*write_rows)(const T* from, int64_t begin, int64_t end, int64_t padded, const Rows&);
  bool (*all_finite)(const T* x, int64_t count);
  void (*find_sizes)(const T* x, int64_t n, int64_t dim, T* sizes);  // of begun rows, above
  bool (*find_nan)(const Rows&, int64_t begin, int64_t end, bool* nan_rows);

  int64_t (*score_stride)(const Problem<T>&);
  int64_t (*scan_bytes)(const Problem<T>&);
  void (*scan)(const Problem<T>&, Queue&, void* scratch);
  // In the same scratch, where scan() ran elsewhere or put something off: scores to keep, and outputs.
  void (*scan_again)(const Problem<T>&, Queue&, void* scratch);
  int64_t (*aggregate_bytes)(const Problem<T>&);
  void (*aggregate)(const Problem<T>&, Queue&, void* scratch);
  int64_t (*forward_block_bytes)(const Problem<T>&);
  void (*forward_block)(const Problem<T>&, void* scratch);  // both of these at once, of one block
  int64_t (*list_survivors_bytes)(const Problem<T>&);
  void (*list_survivors)(const Problem<T>&, const int64_t* offsets, int32_t* columns, Queue&, void* scratch);
  void (*keep_mutual)(const Problem<T>&, Queue&);
  int64_t (*count_bits)(const uint64_t* words, int64_t size);

  int64_t (*find_groups_bytes)(const Problem<T>&);
  void (*find_groups)(const Problem<T>&, const Groups&, Queue&, void* scratch);
  void (*lay_out)(const Problem<T>&, const Groups&);  // for slabs
  int64_t (*backward_rows_bytes)(const Problem<T>&);
  void (*backward_rows)(const Problem<T>&, const Slab<T>&, Queue&, void* scratch);
  int64_t (*backward_columns_bytes)(const Problem<T>&);
  void (*backward_columns)(const Problem<T>&, const Slab<T>&, Queue&, void* scratch);
  int64_t (*backward_alpha_bytes)(const Problem<T>&);
  void (*backward_alpha)(const Problem<T>&, const AlphaPairs<T>&, Queue&, void* scratch);
  int64_t (*backward_beta_bytes)(const Problem<T>&);
  void (*backward_beta)(const Problem<T>&, Queue&, void* scratch);
};

// The k-th largest of n numbers (NaN counts as -inf); reorders `scratch` [n].
template <class T>
T kth_largest(const T* x, int64_t n, int64_t k, T* scratch);

#define ASA_DECLARE(isa)                \
  namespace isa {                       \
  extern const Kernels<float> kFloat;   \
  extern const Kernels<double> kDouble; \
  }
ASA_DECLARE(avx512)
ASA_DECLARE(avx2)
ASA_DECLARE(neon)
ASA_DECLARE(portable)

}  // namespace asa_ops::cpu
