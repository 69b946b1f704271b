// Adaptive sparse attention on a CPU, for one instruction set (the including file's namespace ASA_ISA).
//
//   simd         vectors
//   memory       scratch, caches
//   gemm         products of whole rows
//   amx, tiles   the same for half precisions, on AMX
//   gather       products with a list of rows
//   bits         who survives: M = A and A^T from bits alone, lists
//   arrange      tokens of any type and strides to contiguous, padded ones, and back
//   scores       scores of some rows against all keys, while they are in the cache
//   beginning    what is summed of the output meanwhile
//   scan         the first pass: lse, thresholds, neighbour bits
//   aggregate    scores of the pairs that survive; softmax; times v
//   backward     rows give dq, columns dk and dv, no atomics
//   thresholds   straight-through gradients of thresholds: those of beta, row by row
//   alpha        and of alpha, block by block
//
// Where few pairs survive, a row visits them by a list; where many do, a strip of rows visits all keys and masks.

#include "problem.h"

namespace asa_ops::cpu::ASA_ISA {
namespace {

#include "../simd.h"

#include "../memory.h"

#include "../gemm.h"

#include "../amx.h"

#include "../tiles.h"

#include "../gather.h"

#include "bits.h"

#include "arrange.h"

#include "scores.h"

#include "beginning.h"

#include "scan.h"

#include "aggregate.h"

#include "backward.h"

#include "thresholds.h"

#include "alpha.h"

template <class T>
constexpr Kernels<T> kernels() {
  return {kLanes<float>,
          panels_of<T>,
          panel_size<T>,
          pack_panels<T>,
          pack_slices<T>,
          pack_blocks<T>,
          pack_tiles<T>,
          read_rows<T>,
          write_rows<T>,
          all_finite<T>,
          find_sizes<T>,
          find_nan<T>,
          score_stride<T>,
          scan_bytes<T>,
          scan<T>,
          scan_again<T>,
          aggregate_bytes<T>,
          aggregate<T>,
          forward_block_bytes<T>,
          forward_block<T>,
          list_survivors_bytes<T>,
          list_survivors<T>,
          keep_mutual<T>,
          count_bits,
          find_groups_bytes<T>,
          find_groups<T>,
          lay_out<T>,
          backward_rows_bytes<T>,
          backward_rows<T>,
          backward_columns_bytes<T>,
          backward_columns<T>,
          backward_alpha_bytes<T>,
          backward_alpha<T>,
          backward_beta_bytes<T>,
          backward_beta<T>};
}

}  // namespace

const Kernels<float> kFloat = kernels<float>();
const Kernels<double> kDouble = kernels<double>();

}  // namespace asa_ops::cpu::ASA_ISA
