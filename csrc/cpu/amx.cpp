// Whether this process may use AMX. With ASA_AMX_TESTING, in a library for tests, every machine has it: its instructions
// run by traps or, with ASA_AMX_EMULATED, the emulation in amx.h.

#include "isa.h"

#include <cstdint>
#include <cstdlib>

#if defined(ASA_AMX_TESTING) && !defined(ASA_AMX_EMULATED)
#include "../testing/amx_traps.h"
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace asa_ops::cpu {
namespace {

#include "amx.h"

#if defined(ASA_AMX_TESTING)

// ASA_OPS_AMX_TROUBLE makes it a machine that is "absent", "refused" or "wrong".
bool has_trouble(const char* trouble) {
  const char* const wanted = std::getenv("ASA_OPS_AMX_TROUBLE");
  return wanted != nullptr && std::string(wanted) == trouble;
}
bool machine_has_it() { return !has_trouble("absent"); }
bool system_permits_it() {
#if !defined(ASA_AMX_EMULATED)
  amx_traps::install();
#endif
  return !has_trouble("refused");
}
float expected(float product) { return has_trouble("wrong") ? product + 1 : product; }

#elif defined(ASA_AMX)

bool machine_has_it() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_bf16 = edx >> 22 & 1, has_tiles = edx >> 24 & 1;
  if (!has_bf16 || !has_tiles || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  return eax >> 5 & 1;  // AVX512-BF16, which rounds to bf16
}

// Tiles are 8 KB of state of every thread, for which Linux asks a process to ask.
bool system_permits_it() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
float expected(float product) { return product; }

#endif

#if defined(ASA_AMX)
// A product of small integers, which is exact.
bool product_is_right() {
  alignas(64) uint32_t a[kTileRows][16], b[kTileRows][16];
  alignas(64) float c[kTileRows][16];
  constexpr uint32_t kBfloat16[] = {0x0000, 0x3F80, 0x4000, 0xC040};  // 0, 1, 2, -3
  constexpr int kNumber[] = {0, 1, 2, -3};
  const auto left = [](int64_t m, int64_t k) { return (3 * m + k) % 4; };
  const auto right = [](int64_t k, int64_t n) { return (k * n + k / 4 + n) % 4; };
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t x = 0; x < 16; ++x) {
      a[r][x] = kBfloat16[left(r, 2 * x)] | kBfloat16[left(r, 2 * x + 1)] << 16;
      b[r][x] = kBfloat16[right(2 * r, x)] | kBfloat16[right(2 * r + 1, x)] << 16;
    }
  tiles_configure();
  tile_zero<0>();
  tile_load<1>(a, kTileBytes);
  tile_load<2>(b, kTileBytes);
  tile_dot<0, 1, 2>();
  tile_store<0>(c, kTileBytes);
  tiles_release();
  bool right_everywhere = true;
  for (int64_t m = 0; m < kTileRows; ++m)
    for (int64_t n = 0; n < 16; ++n) {
      int sum = 0;
      for (int64_t k = 0; k < 32; ++k) sum += kNumber[left(m, k)] * kNumber[right(k, n)];
      right_everywhere &= c[m][n] == expected(static_cast<float>(sum));
    }
  return right_everywhere;
}
#endif

}  // namespace

bool has_amx() {
#if defined(ASA_AMX)
  return machine_has_it() && system_permits_it() && product_is_right();
#else
  return false;
#endif
}

}  // namespace asa_ops::cpu
