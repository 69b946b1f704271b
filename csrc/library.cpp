// Every C++ schema of asa_ops, one line each. Kernels live in cpu/ and cuda/ and register their implementations there.
//
// Stable ABI only (torch/csrc/stable): one binary serves every torch from 2.10 on. No Python headers: the library is
// loaded with torch.ops.load_library, so one binary serves every Python too.

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace {

// 10000 * major + 100 * minor + patch of the asa_ops that this library was built from.
int64_t extension_version() { return ASA_OPS_VERSION; }

}  // namespace

STABLE_TORCH_LIBRARY(asa_ops, m) { m.def("extension_version() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(asa_ops, CompositeExplicitAutograd, m) {
  m.impl("extension_version", TORCH_BOX(&extension_version));
}
