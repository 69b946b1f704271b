// Tiles of tokens in shared memory, and their products.
//
// Every operand passes through shared memory in chunks of 64 rows by 128 bytes: 64 columns of a half precision, 32 of
// float32. Products of half precisions run on tensor cores (mma.m16n8k16), those of float32 as fused multiply-adds,
// four products at a time so that rounding grows with a quarter of the width. Both leave the same fragments: of a tile,
// warp w owns rows 16 w to 16 w + 15, and of 8 columns n a thread owns [n][0], [n][1] in row g, columns 2 t and 2 t +
// 1, and [n][2], [n][3] in row g + 8; g = lane / 4, t = lane % 4.

#pragma once

#include "problem.h"

namespace asa_ops::cuda {

constexpr int kStages = 3;  // of a ring

template <class T>
constexpr int kColumns = 128 / int(sizeof(T));  // of a chunk

// Chunks of a token of `width` numbers.
template <class T>
__host__ __device__ __forceinline__ int chunks_of(int width) {
  return width / kColumns<T>;
}

// Groups of 16 bytes of a row lie where no two rows of eight share memory banks.
__device__ __forceinline__ int swizzled(int row, int group) { return row * 128 + ((group ^ (row & 7)) << 4); }

// Starts copying rows `first` to `first` + ROWS of the `index`-th chunk of an arranged block.
template <class T, int ROWS = kBlock>
__device__ __forceinline__ void copy_chunk(char* to, const T* block, int index, int first = 0) {
  const char* const from = reinterpret_cast<const char*>(block) + index * kChunkBytes + first * 128;
#pragma unroll
  for (int i = 0; i < ROWS * 8 / kThreads; ++i) {
    const int at = (i * kThreads + int(threadIdx.x)) * 16;
    copy_async(to + at, from + at);
  }
}

// Chunks pass through shared memory in the order in which `load(step, buffer)` starts their copies, STAGES at a time.
template <int STAGES, int BYTES, class Load>
class Ring {
 public:
  static constexpr int kBytes = STAGES * BYTES;

  __device__ Ring(char* buffer, Load load) : buffer_(buffer), load_(load) {
    for (int step = 0; step < STAGES - 1; ++step) start(step);
  }

  // The next chunks, which stay until the next call.
  __device__ const char* next() {
    copy_wait<STAGES - 2>();
    __syncthreads();  // all copies are there, and no thread reads the chunks that the next ones replace
    start(step_ + STAGES - 1);
    return buffer_ + step_++ % STAGES * BYTES;
  }

  // All threads must call it before the buffer is used for something else.
  __device__ void finish() {
    copy_wait<0>();
    __syncthreads();
  }

 private:
  __device__ void start(int step) {
    load_(step, buffer_ + step % STAGES * BYTES);
    copy_commit();
  }

  char* buffer_;
  Load load_;
  int step_ = 0;
};

// Where a thread's numbers lie in a tile.
struct Fragment {
  int row, column;  // g + 16 warp, 2 t

  __device__ Fragment()
      : row(int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4), column(int(threadIdx.x) % 4 * 2) {}
  __device__ int row_of(int i) const { return row + i / 2 * 8; }
  __device__ int column_of(int n, int i) const { return n * 8 + column + i % 2; }
};

// A thread's numbers of a tile of 8 N columns.
template <int N>
using Columns = float[N][4];
using Tile = Columns<8>;

template <int N>
__device__ __forceinline__ void clear(Columns<N>& x) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0;
}

__device__ __forceinline__ float4 float4_at(const char* chunk, int row, int group) {
  return *reinterpret_cast<const float4*>(chunk + swizzled(row, group));
}

// c += a b^T for chunks a of 64 and b of 8 N rows.
template <class T, int N>
__device__ __forceinline__ void multiply_transposed(Columns<N>& c, const char* a, const char* b) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t left[4];
      load_matrices(left, a + swizzled(first + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t right[4];
        load_matrices(right, b + swizzled(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        multiply_add<T>(c[n], left, right[0], right[1]);
        multiply_add<T>(c[n + 1], left, right[2], right[3]);
      }
    }
  } else {
    const Fragment at;
#pragma unroll 1  // more of them would spill
    for (int k = 0; k < 8; ++k) {
      const float4 low = float4_at(a, at.row, k), high = float4_at(a, at.row + 8, k);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 right = float4_at(b, at.column_of(n, i), k);
          c[n][i] += fmaf(low.w, right.w, fmaf(low.z, right.z, fmaf(low.y, right.y, low.x * right.x)));
          c[n][2 + i] += fmaf(high.w, right.w, fmaf(high.z, right.z, fmaf(high.y, right.y, high.x * right.x)));
        }
    }
  }
}

// Starts copying all chunks of a block of tokens.
template <class T>
__device__ __forceinline__ void copy_block(char* buffer, const T* block, int width) {
  for (int c = 0; c < chunks_of<T>(width); ++c) copy_chunk(buffer + c * kChunkBytes, block, c);
}

// The product of a tile whose right operand comes as the next `chunks` chunks; the left one lies at `own`, or without
// that before every chunk of the right.
template <class T, int N, class R>
__device__ __forceinline__ void multiply_chunks(Columns<N>& s, R& ring, int chunks, const char* own = nullptr) {
  clear(s);
  for (int c = 0; c < chunks; ++c) {
    const char* const chunk = ring.next();
    multiply_transposed<T>(s, own != nullptr ? own + c * kChunkBytes : chunk,
                           own != nullptr ? chunk : chunk + kChunkBytes);
  }
}

// The weights of a tile as the left operand of a product with the rows of a chunk: halves in registers, where the
// product of tokens left them; float32 in shared memory, where every warp reads its own rows only.
template <class T, int N>
struct Weights {
  static constexpr int kBytes = 0;
  uint32_t pairs[N / 2][4];

  __device__ Weights(const Columns<N>& p, char*) {
#pragma unroll
    for (int k = 0; k < N / 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[k][i] = pack<T>(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
  }

  // c += p x for a chunk x of 8 N rows; c: kColumns<T> / 8 parts of a fragment.
  __device__ void multiply(float (*c)[4], const char* x) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 2; ++k)
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t right[4];
        load_matrices_transposed(right, x + swizzled(16 * k + lane % 16, n + lane / 16));
        multiply_add<T>(c[n], pairs[k], right[0], right[1]);
        multiply_add<T>(c[n + 1], pairs[k], right[2], right[3]);
      }
  }
};
template <int N>
struct Weights<float, N> {
  static constexpr int kStride = 8 * N + 4;  // rows of a warp start in different banks
  static constexpr int kBytes = kBlock * kStride * int(sizeof(float));
  const float* rows;

  __device__ Weights(const Columns<N>& p, char* buffer) : rows(reinterpret_cast<const float*>(buffer)) {
    const Fragment at;
    __syncwarp();  // no lane reads the weights before these
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        reinterpret_cast<float*>(buffer)[at.row_of(i) * kStride + at.column_of(n, i)] = p[n][i];
    __syncwarp();
  }

  __device__ void multiply(float (*c)[4], const char* x) const {
    const Fragment at;
#pragma unroll 2
    for (int j = 0; j < 8 * N; ++j) {
      const float low = rows[at.row * kStride + j], high = rows[(at.row + 8) * kStride + j];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 right =
            *reinterpret_cast<const float2*>(x + swizzled(j, 2 * n + at.column / 4) + at.column % 4 * 4);
        c[n][0] = fmaf(low, right.x, c[n][0]);
        c[n][1] = fmaf(low, right.y, c[n][1]);
        c[n][2] = fmaf(high, right.x, c[n][2]);
        c[n][3] = fmaf(high, right.y, c[n][3]);
      }
    }
  }
};

// A bit for each of a thread's numbers of a tile: bit 4 n + i for [n][i].

constexpr uint32_t kRowBits = 0x33333333;  // those of the thread's lower row

__device__ __forceinline__ bool bit_of(uint32_t bits, int n, int i) { return bits >> (4 * n + i) & 1; }

// From one word of 32 columns for each half of a row, `high`: the thread's lower row or the one 8 rows further on.
__device__ __forceinline__ uint32_t bits_of_row(uint32_t left, uint32_t right, const Fragment& at, int high) {
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) bits |= ((n < 4 ? left : right) >> (8 * (n % 4) + at.column) & 3) << (4 * n + 2 * high);
  return bits;
}

// The bits of a tile whose rows are queries of the block `row` and whose columns are keys of the block `column`; `words`
// of a head with `padded` queries.
__device__ __forceinline__ uint32_t bits_by_rows(const uint32_t* words, int padded, int row, int column,
                                                 const Fragment& at) {
  const uint32_t* const left = words + int64_t(2 * column) * padded + row * kBlock + at.row;
  return bits_of_row(left[0], left[padded], at, 0) | bits_of_row(left[8], left[padded + 8], at, 1);
}

// The same where rows are keys and columns are queries.
__device__ __forceinline__ uint32_t bits_by_columns(const uint32_t* words, int padded, int row, int column,
                                                    const Fragment& at) {
  const uint32_t* const from = words + int64_t(2 * row + at.row / 32) * padded + column * kBlock + at.column;
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const uint2 two = *reinterpret_cast<const uint2*>(from + 8 * n);
    const uint32_t x = two.x >> at.row % 32, y = two.y >> at.row % 32;
    bits |= ((x & 1) | (y & 1) << 1 | (x >> 8 & 1) << 2 | (y >> 8 & 1) << 3) << (4 * n);
  }
  return bits;
}

// The bits of dense attention: all but columns, and rows, from a number on.
__device__ __forceinline__ uint32_t bits_of_all(int rows, int columns, const Fragment& at) {
  const uint32_t left = first_bits(columns), right = first_bits(columns - 32);
  return (at.row < rows ? bits_of_row(left, right, at, 0) : 0) |
         (at.row + 8 < rows ? bits_of_row(left, right, at, 1) : 0);
}

}  // namespace asa_ops::cuda
