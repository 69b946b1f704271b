// The kernels for AVX2 and FMA; empty on other machines.

#include "asa.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Headers first: nothing of theirs may be compiled for this instruction set, or it could be linked in elsewhere.
#include <immintrin.h>

#pragma GCC target("avx2,fma,bmi,popcnt")
#define ASA_ISA avx2
#define ASA_AVX2  // the pragma does not define the compiler's own macros
#include "asa_kernels.h"
#endif
