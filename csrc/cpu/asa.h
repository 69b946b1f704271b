// What the driver (asa.cpp) and the kernels (asa_kernels.h, compiled once per instruction set) agree on.
#pragma once

#include <cstdint>

namespace asa_ops::cpu {

// One head of one image. Bits are kept by strips: byte [strip][j] says for the eight rows of a strip, the first in the
// lowest bit, whether j is an adaptive neighbour: [ceil(n_q / 8)][stride_k], columns from n_k on 0.
template <class T>
struct Problem {
  int64_t n_q, n_k, dim, dim_v;
  int64_t stride_q, stride_k;  // n_q and n_k rounded up to 64
  int64_t height, width, window, topk;
  bool reciprocal;
  bool thresholded;  // there are adaptive neighbours; otherwise M is everybody, or nobody if there is a beta
  int64_t n_real;

  const T *q, *k, *v;  // [n][dim]: q times the scale, padding and values that are not finite set to 0
  const T *alpha, *beta;  // [n_q], or null
  const bool *real_q, *real_k;  // or null: all
  const bool* broken;  // [n_k] keys with a value that was not finite, or null: none

  T *out, *lse, *lse_kept, *kappa, *log_mean;
  int32_t* survivors;
  uint8_t* bits;
  bool* local;  // [n_q][window^2], with a beta

  // backward
  const T* d_out;
  T *dq, *dk, *dv, *dalpha, *dbeta;
  T scale, band;
  T *row_max, *row_factor, *delta;  // [n_q]: p_ij = exp(s_ij - row_max_i) * row_factor_i; <do_i, out_i>
};

constexpr int64_t kScanRows = 16;  // rows that scan() takes at a time
constexpr int64_t kBlockRows = 64;  // rows or columns that the others take at a time

// Each kernel works on blocks [begin, end) of rows (or columns) and writes nothing outside them, so results do not depend
// on how blocks are shared among threads. `scratch` is memory of one thread, scratch_bytes() of it.
template <class T>
struct Kernels {
  int64_t (*scratch_bytes)(const Problem<T>&);
  int64_t (*panel_bytes)(const Problem<T>&);
  void (*pack_panels)(const Problem<T>&, T* panels);
  void (*scan)(const Problem<T>&, const T* panels, int64_t begin, int64_t end, void* scratch);
  void (*aggregate)(const Problem<T>&, int64_t begin, int64_t end, void* scratch);
  void (*list_survivors)(const Problem<T>&, const int64_t* offsets, int32_t* columns, int64_t begin, int64_t end, void* scratch);
  void (*backward_rows)(const Problem<T>&, int64_t begin, int64_t end, void* scratch);
  void (*backward_columns)(const Problem<T>&, int64_t begin, int64_t end, void* scratch);
  void (*backward_thresholds)(const Problem<T>&, int64_t begin, int64_t end, void* scratch);
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
ASA_DECLARE(portable)

}  // namespace asa_ops::cpu
