// The kernels for AVX-512; empty on other machines.

#include "asa.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Headers first: nothing of theirs may be compiled for this instruction set, or it could be linked in elsewhere.
#include <immintrin.h>

#pragma GCC target("avx2,fma,bmi,popcnt,avx512f,avx512vl,avx512dq,avx512bw")
#define ASA_ISA avx512
#define ASA_AVX512  // the pragma does not define the compiler's own macros
#include "asa_kernels.h"
#endif
