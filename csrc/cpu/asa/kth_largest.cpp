// What scan() calls for topk. Not beside it: <algorithm> must not be compiled inside the namespace of an instruction set,
// or its functions could be linked into code for machines that lack the instructions.

#include "problem.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace asa_ops::cpu {

template <class T>
T kth_largest(const T* x, int64_t n, int64_t k, T* scratch) {
  constexpr int64_t kGroup = 16;
  const T lowest = -std::numeric_limits<T>::infinity();
  const auto number = [&](T y) { return std::isnan(y) ? lowest : y; };
  // The k-th largest of the group maxima is no more than the k-th largest of all: only what reaches it is sorted.
  T bound = lowest;
  const int64_t groups = n / kGroup;
  if (k <= groups) {
    for (int64_t g = 0; g < groups; ++g) {
      T largest = lowest;
      for (int64_t j = g * kGroup; j < (g + 1) * kGroup; ++j) largest = x[j] > largest ? x[j] : largest;
      scratch[g] = largest;
    }
    std::nth_element(scratch, scratch + k - 1, scratch + groups, std::greater<T>());
    bound = scratch[k - 1];
  }
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j)
    if (const T y = number(x[j]); y >= bound) scratch[count++] = y;
  std::nth_element(scratch, scratch + k - 1, scratch + count, std::greater<T>());
  return scratch[k - 1];
}
template float kth_largest(const float*, int64_t, int64_t, float*);
template double kth_largest(const double*, int64_t, int64_t, double*);

}  // namespace asa_ops::cpu
