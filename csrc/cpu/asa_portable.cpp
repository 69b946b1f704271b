// The kernels for whatever the compiler targets by default.

#define ASA_ISA portable
#include "asa_kernels.h"

#include "criss_cross_kernels.h"
