// asa_ops::criss_cross_cpu_fwd and criss_cross_cpu_bwd: checks, and the passes of a call.

#include "../../checks.h"
#include "../isa.h"
#include "../workspace.h"
#include "problem.h"

#include <torch/csrc/stable/library.h>

namespace asa_ops::cpu {
namespace {

template <class T>
const CrissCrossKernels<T>& table() {
  return ASA_TABLE(T, kCrissCrossFloat, kCrissCrossDouble);
}

void check_maps(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& stats) {
  check(q.dim() == 4 && v.dim() == 4, "q, v", "[B, channels, H, W]");
  const ScalarType type = q.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, "q", "float32 or float64");
  const int64_t b = q.size(0), h = q.size(2), w = q.size(3);
  check(q.size(1) > 0 && v.size(1) > 0 && h > 0 && w > 0, "q, v", "of at least one channel and pixel");
  check_contiguous(q, "q", q, type, {b, q.size(1), h, w});
  check_contiguous(k, "k", q, type, {b, q.size(1), h, w});
  check_contiguous(v, "v", q, type, {b, v.size(1), h, w});
  check_contiguous(out, "out", q, type, {b, v.size(1), h, w});
  check_contiguous(stats, "stats", q, type, {b, 2, h, w});
}

template <class T>
CrissCross<T> image(int64_t b, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& stats, double scale) {
  CrissCross<T> p{};
  p.dim = q.size(1), p.dim_v = v.size(1), p.height = q.size(2), p.width = q.size(3), p.scale = static_cast<T>(scale);
  const int64_t pixels = p.height * p.width;
  p.q = data<const T>(q, b * p.dim * pixels), p.k = data<const T>(k, b * p.dim * pixels);
  p.v = data<const T>(v, b * p.dim_v * pixels);
  p.largest = data<T>(stats, 2 * b * pixels), p.total = p.largest + pixels;
  return p;
}

template <class T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Tensor& out, const Tensor& stats) {
  const auto& kernels = table<T>();
  for_heads(q.size(0), [&](int64_t b, int64_t threads) {
    CrissCross<T> p = image<T>(b, q, k, v, stats, scale);
    p.out = data<T>(out, b * p.dim_v * p.height * p.width);
    prefer_huge_pages(p.out, p.dim_v * p.height * p.width * sizeof(T));
    Workspace workspace(threads);
    workspace.add_share(kernels.forward_bytes(p));
    workspace.allocate_all();
    run({0, kernels.column_blocks(p)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.forward_columns(p, queue, scratch); });
    run({0, p.height}, workspace, [&](Queue& queue, void* scratch) { kernels.forward_rows(p, queue, scratch); });
  });
}

template <class T>
void backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& stats, double scale,
              const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const auto& kernels = table<T>();
  for_heads(q.size(0), [&](int64_t b, int64_t threads) {
    CrissCross<T> p = image<T>(b, q, k, v, stats, scale);
    const int64_t pixels = p.height * p.width, size = p.dim * pixels, size_v = p.dim_v * pixels;
    p.d_out = data<const T>(d_out, b * size_v);
    p.dq = data<T>(dq, b * size), p.dk = data<T>(dk, b * size), p.dv = data<T>(dv, b * size_v);
    prefer_huge_pages(p.dv, size_v * sizeof(T));
    Workspace workspace(threads);
    const auto delta = workspace.add<T>(pixels), products = workspace.add<T>(kernels.products(p));
    workspace.add_share(kernels.backward_bytes(p));
    workspace.allocate_all();
    p.delta = delta.get(workspace), p.products = products.get(workspace);
    run({0, p.height}, workspace, [&](Queue& queue, void* scratch) { kernels.backward_values(p, queue, scratch); });
    run({0, kernels.column_groups(p)}, workspace,
        [&](Queue& queue, void* scratch) { kernels.backward_columns(p, queue, scratch); });
    run({0, p.height}, workspace, [&](Queue& queue, void* scratch) { kernels.backward_rows(p, queue, scratch); });
  });
}

void criss_cross_cpu_fwd(Tensor q, Tensor k, Tensor v, double scale, Tensor out, Tensor stats) {
  check_maps(q, k, v, out, stats);
  q.scalar_type() == ScalarType::Float ? forward<float>(q, k, v, scale, out, stats)
                                       : forward<double>(q, k, v, scale, out, stats);
}

void criss_cross_cpu_bwd(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor stats, double scale, Tensor dq, Tensor dk,
                         Tensor dv) {
  check_maps(q, k, v, d_out, stats);
  check_maps(dq, dk, dv, d_out, stats);
  check(dq.size(1) == q.size(1), "dq", "like q");
  q.scalar_type() == ScalarType::Float ? backward<float>(d_out, q, k, v, stats, scale, dq, dk, dv)
                                       : backward<double>(d_out, q, k, v, stats, scale, dq, dk, dv);
}

}  // namespace
}  // namespace asa_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(ASA_OPS_NAMESPACE, CPU, m) {
  m.impl("criss_cross_cpu_fwd", TORCH_BOX(&asa_ops::cpu::criss_cross_cpu_fwd));
  m.impl("criss_cross_cpu_bwd", TORCH_BOX(&asa_ops::cpu::criss_cross_cpu_bwd));
}
