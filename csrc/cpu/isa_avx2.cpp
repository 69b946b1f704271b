// The kernels for AVX2 and FMA; empty on other machines.

#include "asa/problem.h"
#include "criss_cross/problem.h"

#if defined(__x86_64__) && defined(__GNUC__)
// Headers first: nothing of theirs may be compiled for this instruction set, or it could be linked in elsewhere.
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,popcnt")
#endif
#define ASA_ISA avx2
#define ASA_AVX2  // the pragma does not define the compiler's own macros
#include "asa/kernels.h"

#include "criss_cross/kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
