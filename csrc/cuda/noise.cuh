// SPDX-License-Identifier: Apache-2.0
// One thread's share of the injected noise.
#pragma once
#include "vector.cuh"

namespace gs {
namespace cuda {

template <class T>
__device__ __forceinline__ Wave<T> wave_of(const Wave<double>& w) {
  const T hi = T(w.hi);
  return {T(w.gain), T(w.amplitude), T(w.slope), hi, T((w.hi - double(hi)) + w.lo), T(w.phase), T(w.quarter)};
}

// The normals of elements begin .. begin+kSize-1: whole quads, then the lanes that are ours.
template <class T>
__device__ __forceinline__ void add_normals(Vector<T>& n, int64_t begin, uint32_t step, uint64_t seed, T a) {
  constexpr int kSize = Vector<T>::kSize;
  const int shift = int(begin & 3);
  T lane[kSize + 4];
#pragma unroll
  for (int q = 0; q < kSize / 4 + 1; ++q) {
    if (q == kSize / 4 && shift == 0) break;
    const Words w = normal_words(uint64_t(begin >> 2) + q, step, seed);
    normal_pair<T>(w.w[0], w.w[1], lane[4 * q], lane[4 * q + 1]);
    normal_pair<T>(w.w[2], w.w[3], lane[4 * q + 2], lane[4 * q + 3]);
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    T x = lane[i];
    if (shift == 1) x = lane[i + 1];
    if (shift == 2) x = lane[i + 2];
    if (shift == 3) x = lane[i + 3];
    n.v[i] = mul_add(a, x, n.v[i]);
  }
}

__device__ __forceinline__ uint32_t word_of(const Words& w, int k) {
  return k < 2 ? (k ? w.w[1] : w.w[0]) : (k == 2 ? w.w[2] : w.w[3]);
}

template <class T>
__device__ __forceinline__ T signed_value(T x, uint32_t bit) { return bit ? -x : x; }

// The sign bit of one position: backward meets positions that share no block with their neighbours.
__device__ __forceinline__ uint32_t sign_bit(int64_t j, uint32_t sample, uint32_t step, uint64_t seed) {
  const Words w = sign_words(uint32_t(j >> 7), sample, step, seed);
  return (word_of(w, int(j & 127) >> 5) >> (j & 31)) & 1u;
}

template <class T>
__device__ __forceinline__ Vector<T> noise_value(const DeviceNoise& noise, const Rows& rows, const Span& s) {
  constexpr int kSize = Vector<T>::kSize;
  Vector<T> n;
#pragma unroll
  for (int i = 0; i < kSize; ++i) n.v[i] = T(0);
  const T weight = T(noise.weight);
  if (noise.kind == kSinCos) {
    const Wave<T> w = wave_of<T>(noise.wave);
    const Vector<T> z = load<T>(noise.source, s.begin, s.count);
#pragma unroll
    for (int i = 0; i < kSize; ++i) n.v[i] = wave_value(w, z.v[i]);
  } else if (noise.kind == kSignedRoll) {
    // s.from is a multiple of kSize, which divides 32: all of this thread's signs are in one word.
    const Words words = sign_words(uint32_t(s.from >> 7), uint32_t(s.row), noise.step, noise.seed);
    const uint32_t word = word_of(words, int(s.from & 127) >> 5) >> (s.from & 31);
    int64_t at = s.from - noise.offset;
    at += at < 0 ? rows.size : 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i >= s.count) break;
      const T z = read_one<T>(noise.source.data, noise.source.dtype, s.begin - s.from + at);
      n.v[i] = weight * signed_value(z, (word >> i) & 1u);
      at = at + 1 == rows.size ? 0 : at + 1;
    }
  } else if (noise.kind == kGiven) {
    n = load<T>(noise.source, s.begin, s.count);
#pragma unroll
    for (int i = 0; i < kSize; ++i) n.v[i] *= weight;
  }
  if (noise.normal != 0) add_normals<T>(n, s.begin, noise.step, noise.normal_seed, T(noise.normal));
  return n;
}

template <class T>
__device__ __forceinline__ T noise_coef(const DeviceNoise& noise) {
  return noise.coef_at ? read_one<T>(noise.coef_at, noise.coef_dtype, 0) : T(noise.coef);
}

// d += coef f'(z0)^T g; far(i) gives g at flat index i, for the roll.
template <class T, class Far>
__device__ __forceinline__ void noise_pull(const DeviceNoise& noise, const Rows& rows, const Span& s,
                                           const Vector<T>& g, Vector<T>& d, const Far& far) {
  constexpr int kSize = Vector<T>::kSize;
  const T coef = noise_coef<T>(noise), weight = T(noise.weight);
  if (noise.kind == kSinCos) {
    const Wave<T> w = wave_of<T>(noise.wave);
    const Vector<T> z = load<T>(noise.source, s.begin, s.count);
#pragma unroll
    for (int i = 0; i < kSize; ++i) d.v[i] = mul_add(coef * wave_slope(w, z.v[i]), g.v[i], d.v[i]);
  } else if (noise.kind == kSignedRoll) {
    int64_t at = s.from + noise.offset;
    at -= at >= rows.size ? rows.size : 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i >= s.count) break;
      const uint32_t bit = sign_bit(at, uint32_t(s.row), noise.step, noise.seed);
      d.v[i] = mul_add(coef * weight, signed_value(far(s.begin - s.from + at), bit), d.v[i]);
      at = at + 1 == rows.size ? 0 : at + 1;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) d.v[i] = mul_add(coef * weight, g.v[i], d.v[i]);
  }
}

}  // namespace cuda
}  // namespace gs
