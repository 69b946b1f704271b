// Checks of what an op is given, and the data of its tensors; the same for the CPU and for CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

// The ops' namespace in torch: the name that the package is imported as, asa_ops/core/contracts.py.
#ifndef ASA_OPS_NAMESPACE
#define ASA_OPS_NAMESPACE asa_ops
#endif

namespace asa_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline void check(bool ok, const char* name, const char* what) {
  STD_TORCH_CHECK(ok, "asa_ops: ", name, " must be ", what);
}

inline void check_device(const Tensor& x, const char* name, const Tensor& like) {
  const bool same_device = x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index();
  check(same_device, name, "on the device of the other tensors");
}

// A tensor of the given type and shape on the device of `like`, with any strides.
inline void check(const Tensor& x, const char* name, const Tensor& like, ScalarType type, std::vector<int64_t> shape) {
  check_device(x, name, like);
  check(x.scalar_type() == type, name, "of the dtype expected here");
  check(x.dim() == static_cast<int64_t>(shape.size()), name, "of the rank expected here");
  for (size_t i = 0; i < shape.size(); ++i) check(x.size(i) == shape[i], name, "of the shape expected here");
}

inline void check_contiguous(const Tensor& x, const char* name, const Tensor& like, ScalarType type,
                             std::vector<int64_t> shape) {
  check(x, name, like, type, shape);
  check(x.is_contiguous(), name, "contiguous");
}

// The numbers of a tensor from an offset on; a const U says that they are only read.
template <class U>
U* data(const Tensor& x, int64_t offset = 0) {
  if constexpr (std::is_const_v<U>)
    return static_cast<U*>(x.const_data_ptr()) + offset;
  else
    return static_cast<U*>(x.mutable_data_ptr()) + offset;
}

template <class U>
U* data(const Optional& x, int64_t offset = 0) {
  return x ? data<U>(*x, offset) : nullptr;
}

}  // namespace asa_ops
