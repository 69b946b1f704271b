// The kernels for AVX-512; empty on other machines.

#include "asa/problem.h"
#include "criss_cross/problem.h"

#if defined(__x86_64__) && defined(__GNUC__)
// Headers first: nothing of theirs may be compiled for this instruction set, or it could be linked in elsewhere.
#include <immintrin.h>

#if defined(ASA_AVX512_EMULATED)
namespace asa_ops::cpu::avx512 {
#include "../testing/avx512.h"
}
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,popcnt,avx512f,avx512vl,avx512dq,avx512bw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,popcnt,avx512f,avx512vl,avx512dq,avx512bw")
#endif
#define ASA_ISA avx512
#define ASA_AVX512  // the pragma does not define the compiler's own macros
#include "asa/kernels.h"

#include "criss_cross/kernels.h"
#if defined(__clang__) && !defined(ASA_AVX512_EMULATED)
#pragma clang attribute pop
#endif
#endif
