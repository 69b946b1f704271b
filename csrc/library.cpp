// Every C++ schema of asa_ops. Kernels live in cpu/ and cuda/ and register their implementations there.
//
// Stable ABI only (torch/csrc/stable): one binary serves every torch from 2.10 on. No Python headers: the library is
// loaded with torch.ops.load_library, so one binary serves every Python too.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <tuple>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

// 10000 * major + 100 * minor + patch of the asa_ops that this library was built from.
int64_t extension_version() { return ASA_OPS_VERSION; }

// The GPUs that the CUDA kernels are compiled for, 10 * compute capability, ascending, "80;90"; the last also as PTX.
// Empty: this build holds no CUDA kernels.
std::string cuda_architectures() { return ASA_OPS_CUDA_ARCHS; }

// The newest CUDA that the driver here runs (0: no driver) and the CUDA of the kernels, 1000 * major + 10 * minor.
std::tuple<int64_t, int64_t> cuda_versions() {
#ifdef USE_CUDA
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {driver, CUDART_VERSION};
#else
  return {0, 0};
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(asa_ops, m) {
  m.def("extension_version() -> int");
  m.def("cpu_isa() -> int");
  m.def("cuda_architectures() -> str");
  m.def("cuda_versions() -> (int, int)");
  // asa_ops.asa.ops describes the arguments; Triton's and the blocked ops, which are Python, have the same schemas.
  m.def(
      "asa_fwd(Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? beta, Tensor? key_padding_mask, "
      "SymInt[] grid, SymInt[] window, SymInt topk, bool reciprocal, float scale, float band, bool keep, "
      "SymInt row_start=0, SymInt? row_stop=None, Tensor? rows_statistics=None) "
      "-> (Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kept)");
  m.def(
      "asa_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? beta, "
      "Tensor? key_padding_mask, Tensor out, Tensor lse, Tensor lse_kept, Tensor survivors, Tensor kept, "
      "SymInt[] grid, SymInt[] window, SymInt topk, bool reciprocal, float scale, float band, "
      "SymInt row_start=0, SymInt? row_stop=None, Tensor? rows_statistics=None) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha, Tensor dbeta)");
  m.def(
      "asa_list_survivors(Tensor query, Tensor key, Tensor? alpha, Tensor? beta, Tensor? key_padding_mask, Tensor lse, "
      "Tensor survivors, Tensor kept, SymInt[] grid, SymInt[] window, SymInt topk, bool reciprocal, float scale, "
      "Tensor row_offsets, Tensor(a!) col_indices) -> ()");
  m.def("criss_cross_cpu_fwd(Tensor q, Tensor k, Tensor v, float scale, Tensor(a!) out, Tensor(b!) stats) -> ()");
  m.def(
      "criss_cross_cpu_bwd(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor stats, float scale, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CompositeExplicitAutograd, m) {
  m.impl("extension_version", TORCH_BOX(&extension_version));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}
