// Checks of the tensors that an entry point is given, and their data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

namespace asa_ops::cpu {

inline void check(bool ok, const char* name, const char* what) { STD_TORCH_CHECK(ok, "asa_ops: ", name, " must be ", what); }

// A contiguous CPU tensor of the given type and shape.
inline void check(const torch::stable::Tensor& x, const char* name, torch::headeronly::ScalarType type, std::vector<int64_t> shape) {
  check(x.is_cpu(), name, "on the CPU");
  check(x.scalar_type() == type, name, "of the dtype expected here");
  check(x.is_contiguous(), name, "contiguous");
  check(x.dim() == static_cast<int64_t>(shape.size()), name, "of the rank expected here");
  for (size_t i = 0; i < shape.size(); ++i) check(x.size(i) == shape[i], name, "of the shape expected here");
}

template <class U>
U* data(const torch::stable::Tensor& x, int64_t offset) {
  return static_cast<U*>(x.mutable_data_ptr()) + offset;
}

template <class U>
const U* data(const std::optional<torch::stable::Tensor>& x, int64_t offset) {
  return x ? static_cast<const U*>(x->const_data_ptr()) + offset : nullptr;
}

}  // namespace asa_ops::cpu
