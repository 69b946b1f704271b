// What call.cpp and the kernels (kernels.h, compiled once per instruction set) share.
#pragma once

#include "../asa/problem.h"

#include <type_traits>

namespace asa_ops::cpu {

// One image. Maps are [channels][height][width].
template <class T>
struct CrissCross {
  int64_t dim, dim_v, height, width;
  T scale;
  const T *q, *k, *v;
  T* out;
  // [height][width] a pixel's largest score and its sum of exp(score - largest); before rows, those of its column.
  T *largest, *total;

  // backward
  const T* d_out;
  T* delta;  // [height][width] <do, out>; after the first pass the row's part of it
  T* products;  // of rows: dp, then ds, [height][width][width], the last two padded
  T *dq, *dk, *dv;
};

// Each pass takes rows, or groups of columns side by side in the lanes of vectors, from a queue; those of different
// numbers write different pixels. `scratch` is memory of one thread, of the size that the function named *_bytes
// returns.
template <class T>
struct CrissCrossKernels {
  int64_t (*column_blocks)(const CrissCross<T>&);
  int64_t (*column_groups)(const CrissCross<T>&);

  int64_t (*forward_bytes)(const CrissCross<T>&);
  // Takes column_blocks: the softmax of columns alone.
  void (*forward_columns)(const CrissCross<T>&, Queue&, void* scratch);
  // Then takes rows.
  void (*forward_rows)(const CrissCross<T>&, Queue&, void* scratch);

  int64_t (*products)(const CrissCross<T>&);  // how many numbers
  int64_t (*backward_bytes)(const CrissCross<T>&);
  // Takes rows: writes dv.
  void (*backward_values)(const CrissCross<T>&, Queue&, void* scratch);
  // Then takes column_groups: adds to dv, writes dq and dk.
  void (*backward_columns)(const CrissCross<T>&, Queue&, void* scratch);
  // Then takes rows: adds to dq and dk.
  void (*backward_rows)(const CrissCross<T>&, Queue&, void* scratch);
};

#define ASA_DECLARE_CRISS_CROSS(isa)                        \
  namespace isa {                                           \
  extern const CrissCrossKernels<float> kCrissCrossFloat;   \
  extern const CrissCrossKernels<double> kCrissCrossDouble; \
  }
ASA_DECLARE_CRISS_CROSS(avx512)
ASA_DECLARE_CRISS_CROSS(avx2)
ASA_DECLARE_CRISS_CROSS(neon)
ASA_DECLARE_CRISS_CROSS(portable)

}  // namespace asa_ops::cpu
