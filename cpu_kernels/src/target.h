// MLSPECQD_X86: whether the forms for x86-64 are compiled; MLSPECQD_PORTABLE leaves the portable ones alone.

#pragma once

#if defined(__x86_64__) && !defined(MLSPECQD_PORTABLE)
#define MLSPECQD_X86
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own header's registers of undefined content, wherever they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif
