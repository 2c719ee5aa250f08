// MLSPECQD_X86: whether the forms for x86-64 are compiled; MLSPECQD_PORTABLE leaves the portable ones alone.

#pragma once

#if defined(__x86_64__) && !defined(MLSPECQD_PORTABLE)
#define MLSPECQD_X86
#include <immintrin.h>
#endif
