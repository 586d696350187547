// SPDX-License-Identifier: Apache-2.0
// What differs between a host compiler and nvcc, and nothing else.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define GS_FN __host__ __device__ __forceinline__
#define GS_UNROLL _Pragma("unroll")
#else
// Always inlined, so that each instruction set's loops get their own copy.
#define GS_FN inline __attribute__((always_inline))
#define GS_INLINE __attribute__((always_inline))  // for a lambda
#if defined(__clang__)
#define GS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GS_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace gs {

enum DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

#if defined(__CUDA_ARCH__)
GS_FN uint32_t bits_of(float x) { return __float_as_uint(x); }
GS_FN uint64_t bits_of(double x) { return uint64_t(__double_as_longlong(x)); }
GS_FN float from_bits(uint32_t b) { return __uint_as_float(b); }
GS_FN double from_bits(uint64_t b) { return __longlong_as_double((long long)b); }
#else
GS_FN uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
GS_FN uint64_t bits_of(double x) { uint64_t b; memcpy(&b, &x, 8); return b; }
GS_FN float from_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
GS_FN double from_bits(uint64_t b) { double x; memcpy(&x, &b, 8); return x; }
#endif

// One rounding where the machine has the instruction, two where a call would be needed.
#if defined(__CUDA_ARCH__)
GS_FN float mul_add(float a, float b, float c) { return fmaf(a, b, c); }
GS_FN double mul_add(double a, double b, double c) { return fma(a, b, c); }
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
GS_FN float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GS_FN double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
GS_FN float mul_add(float a, float b, float c) { return a * b + c; }
GS_FN double mul_add(double a, double b, double c) { return a * b + c; }
#endif

}  // namespace gs
