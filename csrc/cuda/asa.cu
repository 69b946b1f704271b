// asa_ops::asa_cuda_topk, asa_cuda_window: checks, and the launches of a call.

#include "asa.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#if defined(__CUDACC__)
// Only in torch's builds with CUDA: without it, weak, the library loads everywhere.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace asa_ops::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check(bool ok, const char* name, const char* what) { STD_TORCH_CHECK(ok, "asa_ops: ", name, " must be ", what); }

void check(const Tensor& x, const char* name, ScalarType type, std::vector<int64_t> shape) {
  check(x.scalar_type() == type, name, "of the dtype expected here");
  check(x.dim() == static_cast<int64_t>(shape.size()), name, "of the rank expected here");
  for (size_t i = 0; i < shape.size(); ++i) check(x.size(i) == shape[i], name, "of the shape expected here");
}

void check_contiguous(const Tensor& x, const char* name, ScalarType type, std::vector<int64_t> shape) {
  check(x, name, type, shape);
  check(x.is_contiguous(), name, "contiguous");
}

template <class U>
U* data(const Tensor& x) {
  return static_cast<U*>(x.mutable_data_ptr());
}

cudaStream_t current_stream(const Tensor& x) {
#if defined(__CUDACC__)
  check(aoti_torch_get_current_cuda_stream != nullptr, "torch", "a build with CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#else
  return nullptr;
#endif
}

Tensor new_empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

int padded(int64_t n) { return static_cast<int>((n + kBlock - 1) / kBlock * kBlock); }

int padded_width(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.dim() > 3 ? x.stride(3) : 0}; }

// The arranged tokens of a call; tensors keep what the problem points to.
template <class T>
class Arranged {
 public:
  Problem<T> problem{};

  Arranged(const Tensor& query, const Tensor& key, const Optional& real, int64_t height, int64_t width, double scale)
      : stream_(current_stream(query)) {
    const int64_t batch = query.size(0), heads = query.size(1), dim = query.size(3);
    problem.heads = static_cast<int>(heads);
    problem.zs = static_cast<int>(batch * heads);
    problem.per_image = real ? 1 : 0;
    problem.width = padded_width(dim);
    problem.scale2 = static_cast<float>(scale * 1.4426950408889634);
    const bool same = query.size(2) == key.size(2);
    const bool map = height * width == key.size(2);
    problem.grid_height = static_cast<int>(map ? height : 1), problem.grid_width = static_cast<int>(map ? width : key.size(2));
    problem.keys = order(key, real, problem.grid_height, problem.grid_width);
    // One order an image where padding of the keys makes kernels expect that.
    problem.rows = same ? problem.keys : order(query, std::nullopt, 1, static_cast<int>(query.size(2)), real ? batch : 1);
    problem.q = tokens(query, problem.rows), problem.k = tokens(key, problem.keys);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  Order order(const Tensor& x, const Optional& real, int height, int width, int64_t images = 1) {
    if (real) images = real->size(0);
    const int n = static_cast<int>(x.size(2)), room = padded(n);
    int32_t* const order = keep<int32_t>(new_empty(x, {images, room}, ScalarType::Int));
    int32_t* const place = keep<int32_t>(new_empty(x, {images, n}, ScalarType::Int));
    int32_t* const counts = keep<int32_t>(new_empty(x, {images}, ScalarType::Int));
    find_order(real ? data<bool>(*real) : nullptr, static_cast<int>(images), n, height, width, room, order, place, counts, stream_);
    return {n, room, order, place, counts};
  }

  const T* tokens(const Tensor& x, const Order& order) {
    T* const out = keep<T>(new_empty(x, {int64_t(problem.zs) * order.padded, problem.width}, x.scalar_type()));
    arrange(data<const T>(x), strides_of(x), problem.zs, problem.heads, problem.per_image, order, static_cast<int>(x.size(3)),
            problem.width, out, stream_);
    return out;
  }

  template <class U>
  U* keep(Tensor x) {
    kept_.push_back(x);
    return data<U>(kept_.back());
  }

  cudaStream_t stream_;
  std::vector<Tensor> kept_;
};

// Calls run(T{}) for the numbers that x is made of, on its device.
template <class Run>
void for_type(const Tensor& x, Run run) {
#if defined(__CUDACC__)
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
#endif
  switch (x.scalar_type()) {
    case ScalarType::Half: return run(Half{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Float: return run(0.0f);
    default: check(false, "query", "float16, bfloat16 or float32");
  }
}

void check_tokens(const Tensor& query, const Tensor& key, const Optional& real) {
  check(query.dim() == 4, "query", "[B, heads, N, D]");
  check(query.size(3) <= 256, "D", "at most 256");
  check(query.size(2) < 1 << 28 && key.size(2) < 1 << 28, "N", "below 2^28");  // eight rows of a map in an int
  check(key, "key", query.scalar_type(), {query.size(0), query.size(1), key.size(2), query.size(3)});
  if (real) check_contiguous(*real, "real", ScalarType::Bool, {query.size(0), key.size(2)});
}

void asa_cuda_topk(Tensor query, Tensor key, Optional real, int64_t height, int64_t width, int64_t topk, double scale,
                   Tensor kappa) {
  check_tokens(query, key, real);
  check(topk >= 1 && topk <= key.size(2), "topk", "between 1 and N_k");
  check_contiguous(kappa, "kappa", ScalarType::Float, {query.size(0), query.size(1), query.size(2)});
  if (kappa.numel() == 0) return;
  for_type(query, [&](auto zero) {
    Arranged<decltype(zero)> call(query, key, real, height, width, scale);
    call.problem.topk = static_cast<int>(topk);
    find_kth(call.problem, data<float>(kappa), call.stream());
  });
}

void asa_cuda_window(Tensor query, Tensor key, Tensor beta, Optional real, int64_t height, int64_t width, int64_t window,
                     double scale, Tensor log_mean2, Tensor local) {
  check_tokens(query, key, real);
  const int64_t b = query.size(0), heads = query.size(1), n = query.size(2);
  check(height * width == n && key.size(2) == n, "height * width", "N, of query and key");
  check(window >= 1 && window % 2 == 1 && window <= 46339, "window", "odd, of less than 2^31 positions");
  check(beta.dim() == 3 && (beta.size(1) == 1 || beta.size(1) == heads), "beta", "[B, heads or 1, N]");
  check(beta, "beta", ScalarType::Float, {b, beta.size(1), n});
  check_contiguous(log_mean2, "log_mean2", ScalarType::Float, {b, heads, n});
  check_contiguous(local, "local", ScalarType::Bool, {b, heads, n, window * window});
  if (log_mean2.numel() == 0) return;
  for_type(query, [&](auto zero) {
    Arranged<decltype(zero)> call(query, key, real, height, width, scale);
    call.problem.window = static_cast<int>(window);
    call.problem.beta = {data<const float>(beta), {beta.stride(0), beta.size(1) > 1 ? beta.stride(1) : 0, beta.stride(2)}};
    find_local_survivors(call.problem, data<float>(log_mean2), data<uint8_t>(local), call.stream());
  });
}

}  // namespace
}  // namespace asa_ops::cuda

#if defined(__CUDACC__)
#define ASA_OPS_DEVICE CUDA
#else
#define ASA_OPS_DEVICE CPU
#endif

STABLE_TORCH_LIBRARY_IMPL(asa_ops, ASA_OPS_DEVICE, m) {
  m.impl("asa_cuda_topk", TORCH_BOX(&asa_ops::cuda::asa_cuda_topk));
  m.impl("asa_cuda_window", TORCH_BOX(&asa_ops::cuda::asa_cuda_window));
}
