// The heavy kernels for compute capability 9.0, in half precisions, and in float32 taken as TF32 up to a width of 128:
// what those of their names in problem.h do, and aggregation and gradients that end rows and columns by themselves.
// `width` and `width_v` are the same, `scale` is above 0. Tokens of float32 are rounded to TF32, and transposed too.

#pragma once

#include "../problem.h"

namespace asa_ops::cuda::hopper {

// scores.cu: how the statistics are cut; and the statistics.
Statistics cut_statistics(int row_blocks, int key_blocks, int n_heads);
template <class T>
void find_statistics(const Problem<T>& problem, const Statistics& statistics, cudaStream_t stream);

// select.cu. Lists are of two blocks of rows; `done` [n_heads] is zeroed.
template <class T>
void find_survivors(const Problem<T>& problem, const Plan& plan, const Saved<T>& saved, uint32_t* done,
                    const Lists& lists, cudaStream_t stream);

// A program leaves a part of a list that others have parts of, two at most; the last one to come adds them up.
struct PartialSums {
  float* sums;  // [2 * programs, rows of a list, width]
  float* numbers;  // the same of 2 numbers a row, for aggregation
  uint32_t* done;  // [n_heads, lists] programs; zeroed
};
// Programs that sum the survivors of lists.
int programs_of(const Lists& lists, int n_heads);

// sums.cu: the output, from lists of two blocks of rows.
template <class T>
void aggregate(const Problem<T>& problem, const Lists& lists, const Saved<T>& saved, const PartialSums& parts,
               int programs, cudaStream_t stream);

// dq.cu, from the same lists; dkv.cu, from lists of single blocks of keys: twice the sums, of dk and of dv.
template <class T>
void find_dq(const Problem<T>& problem, const Lists& lists, const RowGradients& row, const PartialSums& parts,
             int programs, T* dq, cudaStream_t stream);
template <class T>
void find_dkv(const Problem<T>& problem, const Lists& lists, const RowGradients& row, const PartialSums& parts,
              int programs, T* dk, T* dv, cudaStream_t stream);

}  // namespace asa_ops::cuda::hopper
