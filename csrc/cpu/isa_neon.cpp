// The kernels for NEON, which every 64-bit ARM processor has; empty on other machines.

#include "asa/problem.h"
#include "criss_cross/problem.h"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>

#define ASA_ISA neon
#define ASA_NEON
#include "asa/kernels.h"

#include "criss_cross/kernels.h"
#endif
