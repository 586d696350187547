// SPDX-License-Identifier: Apache-2.0
// One thread's elements: 32 bytes of the compute type, loaded and stored 16 bytes at a time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace gs {
namespace cuda {

constexpr int kThreads = 256;

template <class T>
struct Vector {
  static constexpr int kSize = 32 / sizeof(T);
  T v[kSize];
};

struct Span {
  int64_t row, from;   // position within the row
  int64_t begin;       // flat index of the first element
  int count;           // of this thread; 0 beyond the end
};

template <class T>
__device__ __forceinline__ Span span_of(const Rows& rows) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t per_block = int64_t(kThreads) * kSize;
  const int64_t per_row = (rows.size + per_block - 1) / per_block;
  const int64_t row = blockIdx.x / per_row;
  const int64_t from = (blockIdx.x % per_row) * per_block + int64_t(threadIdx.x) * kSize;
  const int64_t left = rows.size - from;
  return {row, from, row * rows.size + from, left <= 0 ? 0 : left < kSize ? int(left) : kSize};
}

template <class T>
__device__ __forceinline__ T read_one(const void* data, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat64: return T(static_cast<const double*>(data)[i]);
    case kFloat32: return T(static_cast<const float*>(data)[i]);
    case kBFloat16: return T(from_bits(uint32_t(static_cast<const unsigned short*>(data)[i]) << 16));
    default: return T(__half2float(static_cast<const __half*>(data)[i]));
  }
}

template <class T>
__device__ __forceinline__ void write_one(const Slot& x, int64_t i, T value) {
  switch (x.dtype) {
    case kFloat64: static_cast<double*>(x.data)[i] = double(value); break;
    case kFloat32: static_cast<float*>(x.data)[i] = float(value); break;
    case kBFloat16: static_cast<__nv_bfloat16*>(x.data)[i] = __float2bfloat16_rn(float(value)); break;
    default: static_cast<__half*>(x.data)[i] = __float2half_rn(float(value));
  }
}

__device__ __forceinline__ float widen_half(unsigned short h, bool bf16) {
  return bf16 ? from_bits(uint32_t(h) << 16) : __half2float(__ushort_as_half(h));
}
__device__ __forceinline__ unsigned short narrow_half(float x, bool bf16) {
  return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ int width_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

template <class T>
__device__ __forceinline__ Vector<T> load(const Slot& x, int64_t begin, int count) {
  constexpr int kSize = Vector<T>::kSize;
  Vector<T> r;
  const char* at = static_cast<const char*>(x.data) + begin * width_of(x.dtype);
  if (count == kSize && (reinterpret_cast<uintptr_t>(at) & 15) == 0) {
    const uint4* from = reinterpret_cast<const uint4*>(at);
    if (x.dtype == kFloat32) {
#pragma unroll
      for (int q = 0; q < kSize / 4; ++q) {
        const uint4 p = from[q];
        r.v[4 * q] = T(from_bits(p.x)), r.v[4 * q + 1] = T(from_bits(p.y));
        r.v[4 * q + 2] = T(from_bits(p.z)), r.v[4 * q + 3] = T(from_bits(p.w));
      }
    } else if (x.dtype == kFloat64) {
#pragma unroll
      for (int q = 0; q < kSize / 2; ++q) {
        const uint4 p = from[q];
        r.v[2 * q] = T(from_bits(uint64_t(p.y) << 32 | p.x));
        r.v[2 * q + 1] = T(from_bits(uint64_t(p.w) << 32 | p.z));
      }
    } else {
      uint4 p = make_uint4(0, 0, 0, 0);
      if (kSize == 8) {
        p = from[0];
      } else {
        const uint2 first = *reinterpret_cast<const uint2*>(at);
        p.x = first.x, p.y = first.y;
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const uint32_t word = i < 2 ? p.x : i < 4 ? p.y : i < 6 ? p.z : p.w;
        r.v[i] = T(widen_half((unsigned short)(i & 1 ? word >> 16 : word), x.dtype == kBFloat16));
      }
    }
    return r;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) r.v[i] = i < count ? read_one<T>(x.data, x.dtype, begin + i) : T(0);
  return r;
}

template <class T>
__device__ __forceinline__ void store(const Slot& x, int64_t begin, int count, const Vector<T>& r) {
  constexpr int kSize = Vector<T>::kSize;
  char* at = static_cast<char*>(x.data) + begin * width_of(x.dtype);
  if (count == kSize && (reinterpret_cast<uintptr_t>(at) & 15) == 0) {
    uint4* to = reinterpret_cast<uint4*>(at);
    if (x.dtype == kFloat32) {
#pragma unroll
      for (int q = 0; q < kSize / 4; ++q)
        to[q] = make_uint4(bits_of(float(r.v[4 * q])), bits_of(float(r.v[4 * q + 1])),
                           bits_of(float(r.v[4 * q + 2])), bits_of(float(r.v[4 * q + 3])));
    } else if (x.dtype == kFloat64) {
#pragma unroll
      for (int q = 0; q < kSize / 2; ++q) {
        const uint64_t a = bits_of(double(r.v[2 * q])), b = bits_of(double(r.v[2 * q + 1]));
        to[q] = make_uint4(uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32));
      }
    } else {
      uint32_t word[kSize / 2];
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i)
        word[i] = uint32_t(narrow_half(float(r.v[2 * i + 1]), x.dtype == kBFloat16)) << 16 |
                  narrow_half(float(r.v[2 * i]), x.dtype == kBFloat16);
      if (kSize == 8)
        to[0] = make_uint4(word[0], word[1], word[kSize / 2 - 2], word[kSize / 2 - 1]);
      else
        *reinterpret_cast<uint2*>(at) = make_uint2(word[0], word[1]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i)
    if (i < count) write_one(x, begin + i, r.v[i]);
}

template <class T>
__device__ __forceinline__ T coef_of(const DeviceCoefs& c, int64_t row, int k) {
  return c.at ? read_one<T>(c.at, c.dtype, row * c.stride + k) : T(c.values[k]);
}

// The block's sum, in thread 0: shuffles within warps, then the warps in order.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warp_sum[kThreads / 32];
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) x += __shfl_down_sync(0xffffffffu, x, d);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) warp_sum[threadIdx.x >> 5] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) total += warp_sum[w];
  return total;
}

template <class T>
inline int64_t grid_of(const Rows& rows) {
  const int64_t per_block = int64_t(kThreads) * Vector<T>::kSize;
  return rows.rows * ((rows.size + per_block - 1) / per_block);
}

template <class T, class Call>
int launch(void (*kernel)(Call), const Call& call, void* stream) {
  const int64_t grid = grid_of<T>(call.rows);
  if (grid == 0) return 0;
  if (grid > 0x7fffffff) return int(cudaErrorInvalidConfiguration);
  kernel<<<unsigned(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  return int(cudaGetLastError());
}

}  // namespace cuda
}  // namespace gs
