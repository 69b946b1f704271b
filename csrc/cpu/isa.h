// The choice of an instruction set.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>
#include <type_traits>

namespace asa_ops::cpu {

// Those of the processor's architecture; of two that it has, the later one is faster.
#if defined(__x86_64__) && defined(__GNUC__)
enum class Isa { portable, avx2, avx512, amx };  // amx: the kernels of avx512, with AMX for half precisions
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "amx"};
constexpr const char* kIsaChoice = "portable, avx2, avx512 or amx";
#elif defined(__aarch64__) && defined(__GNUC__)
enum class Isa { portable, neon };
constexpr const char* kIsaNames[] = {"portable", "neon"};
constexpr const char* kIsaChoice = "portable or neon";
#else
enum class Isa { portable };
constexpr const char* kIsaNames[] = {"portable"};
constexpr const char* kIsaChoice = "portable";
#endif

bool has_amx();  // asks the system for permission

inline Isa best_isa() {
#if defined(ASA_AVX512_EMULATED)
  return has_amx() ? Isa::amx : Isa::avx512;
#elif defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return has_amx() ? Isa::amx : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#elif defined(__aarch64__) && defined(__GNUC__)
  return Isa::neon;
#endif
  return Isa::portable;
}

// ASA_OPS_CPU_ISA, for tests, names one that this machine has.
inline Isa isa() {
  static const Isa best = best_isa();
  const char* wanted = std::getenv("ASA_OPS_CPU_ISA");
  if (wanted == nullptr) return best;
  const auto* const name = std::find(std::begin(kIsaNames), std::end(kIsaNames), std::string(wanted));
  STD_TORCH_CHECK(name != std::end(kIsaNames), "ASA_OPS_CPU_ISA must be ", kIsaChoice, ", got ", wanted);
  const Isa chosen = static_cast<Isa>(name - kIsaNames);
  STD_TORCH_CHECK(chosen <= best, "ASA_OPS_CPU_ISA=", wanted, ": this machine has ", kIsaNames[static_cast<int>(best)],
                  " at best");
  return chosen;
}

// Whether half precisions are multiplied on AMX.
inline bool uses_amx() {
#if defined(__x86_64__) && defined(__GNUC__)
  return isa() == Isa::amx;
#else
  return false;
#endif
}

template <class T, class F, class D>
const auto& of_type(const F& of_float, const D& of_double) {
  if constexpr (std::is_same_v<T, float>)
    return of_float;
  else
    return of_double;
}

// The table for the chosen instruction set: `of_float` and `of_double` are its variables in every set's namespace.
#if defined(__x86_64__) && defined(__GNUC__)
#define ASA_TABLE(T, of_float, of_double)                                 \
  (isa() >= Isa::avx512 ? of_type<T>(avx512::of_float, avx512::of_double) \
   : isa() == Isa::avx2 ? of_type<T>(avx2::of_float, avx2::of_double)     \
                        : of_type<T>(portable::of_float, portable::of_double))
#elif defined(__aarch64__) && defined(__GNUC__)
#define ASA_TABLE(T, of_float, of_double)                           \
  (isa() == Isa::neon ? of_type<T>(neon::of_float, neon::of_double) \
                      : of_type<T>(portable::of_float, portable::of_double))
#else
#define ASA_TABLE(T, of_float, of_double) of_type<T>(portable::of_float, portable::of_double)
#endif

}  // namespace asa_ops::cpu
