// Criss-cross attention on a CPU, for one instruction set. It uses the vectors and products that asa/kernels.h
// includes.
//
// Maps stay as they are, [channels][height][width]. A row is a dense product of all its pixels with all, its scores
// laid out [key][query]. Columns are taken as many side by side as a vector has lanes: there a product of "vectors"
// multiplies lane by lane. So the softmax runs over vectors, never within one. Strips of the maps are copied into
// scratch, where they lie without gaps, padded to whole vectors by zeros.
//
// Forward: the softmax of columns first; then rows merge theirs with it. Backward: rows form dp and dv; columns form
// theirs and, knowing both parts of delta, dq and dk; then rows add their dq and dk.

#include "problem.h"

namespace asa_ops::cpu::ASA_ISA {
namespace {

#include "maps.h"

#include "lanes.h"

#include "softmax.h"

#include "columns.h"

#include "rows.h"

#include "forward.h"

#include "backward.h"

template <class T>
constexpr CrissCrossKernels<T> criss_cross_kernels() {
  return {column_blocks<T>, column_groups<T>,  forward_bytes<T>,   forward_columns<T>,  forward_rows<T>,
          products<T>,      backward_bytes<T>, backward_values<T>, backward_columns<T>, backward_rows<T>};
}

}  // namespace

const CrissCrossKernels<float> kCrissCrossFloat = criss_cross_kernels<float>();
const CrissCrossKernels<double> kCrissCrossDouble = criss_cross_kernels<double>();

}  // namespace asa_ops::cpu::ASA_ISA
