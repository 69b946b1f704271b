// Every C++ schema of asa_ops. Kernels live in cpu/ and cuda/ and register their implementations there.
//
// Stable ABI only (torch/csrc/stable): one binary serves every torch from 2.10 on. No Python headers: the library is
// loaded with torch.ops.load_library, so one binary serves every Python too.

#include "asa.h"

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

STABLE_TORCH_LIBRARY(ASA_OPS_NAMESPACE, m) {
  m.def("extension_version() -> int");
  m.def("cpu_isa() -> int");
  m.def("cuda_architectures() -> str");
  m.def("cuda_versions() -> (int, int)");
  m.def((std::string("asa_fwd") + asa_ops::kForwardSchema).c_str());
  m.def((std::string("asa_bwd") + asa_ops::kBackwardSchema).c_str());
  m.def((std::string("asa_list_survivors") + asa_ops::kListSurvivorsSchema).c_str());
  m.def("criss_cross_cpu_fwd(Tensor q, Tensor k, Tensor v, float scale, Tensor(a!) out, Tensor(b!) stats) -> ()");
  m.def(
      "criss_cross_cpu_bwd(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor stats, float scale, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ASA_OPS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("extension_version", TORCH_BOX(&extension_version));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}
