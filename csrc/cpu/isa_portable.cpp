// The kernels for whatever the compiler targets by default.

#define ASA_ISA portable
#include "asa/kernels.h"

#include "criss_cross/kernels.h"
