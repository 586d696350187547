// SPDX-License-Identifier: Apache-2.0
// A step on a state in integers. One kernel goes forward and back, so that what it adds it takes
// away to the bit.
#include <type_traits>

#include "noise.cuh"

namespace gs {
namespace cuda {
namespace {

template <class T>
__device__ __forceinline__ Vector<T> change_of(const LeapCall& c, const Span& s) {
  Vector<T> sum;
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= c.terms) break;
    const T w = T(c.coefs[k]);
    const Vector<T> x = load<T>(c.term[k], s.begin, s.count);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) sum.v[i] = mul_add(w, x.v[i], k ? sum.v[i] : T(0));
  }
  if (c.noise.kind != kOff || c.noise.normal != 0) {
    const T scale = T(c.noise.coef);
    const Vector<T> n = noise_value<T>(c.noise, c.rows, s);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) sum.v[i] = mul_add(scale, n.v[i], sum.v[i]);
  }
  return sum;
}

// One thread's integers: as many as it has elements of T.
template <class T, class I>
struct Integers {
  static constexpr int kSize = Vector<T>::kSize, kWords = kSize * int(sizeof(I)) / 16;
  union {
    uint4 word[kWords];
    I v[kSize];
  };
};

template <class I>
__device__ __forceinline__ bool aligned(const I* at, int count, int size) {
  return count == size && (reinterpret_cast<uintptr_t>(at) & 15) == 0;
}

template <class T, class I>
__device__ __forceinline__ Integers<T, I> load_integers(const I* at, int count) {
  Integers<T, I> r;
  if (aligned(at, count, r.kSize)) {
#pragma unroll
    for (int q = 0; q < r.kWords; ++q) r.word[q] = reinterpret_cast<const uint4*>(at)[q];
    return r;
  }
#pragma unroll
  for (int i = 0; i < r.kSize; ++i) r.v[i] = i < count ? at[i] : I(0);
  return r;
}

template <class T, class I>
__device__ __forceinline__ void store_integers(I* at, int count, const Integers<T, I>& r) {
  if (aligned(at, count, r.kSize)) {
#pragma unroll
    for (int q = 0; q < r.kWords; ++q) reinterpret_cast<uint4*>(at)[q] = r.word[q];
    return;
  }
#pragma unroll
  for (int i = 0; i < r.kSize; ++i)
    if (i < count) at[i] = r.v[i];
}

// The state rounded to its dtype, and the model's input from that; S computes both.
template <class S, class T, class I>
__device__ __forceinline__ void show(const LeapCall& c, const Span& s, const Integers<T, I>& w) {
  constexpr int kSize = Vector<T>::kSize;
  Vector<T> x;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const S state = S(w.v[i]) * S(c.scale);
    const bool half = c.state.dtype >= kBFloat16, bf16 = c.state.dtype == kBFloat16;
    x.v[i] = T(half ? S(widen_half(narrow_half(float(state), bf16), bf16)) : state);
  }
  store(c.state, s.begin, s.count, x);
  if (!c.model.data) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) x.v[i] = T(S(x.v[i]) * S(c.model_scale));
  store(c.model, s.begin, s.count, x);
}

template <class T, class I>
__global__ void __launch_bounds__(kThreads, 2) leap_kernel(const __grid_constant__ LeapCall c) {
  using Unsigned = typename std::make_unsigned<I>::type;
  constexpr I kLimit = I(1) << (8 * sizeof(I) - 2);
  const Span s = span_of<T>(c.rows);
  if (s.count == 0) return;
  const Vector<T> change = change_of<T>(c, s);
  I* at = static_cast<I*>(c.carried) + s.begin;
  Integers<T, I> w = load_integers<T, I>(at, s.count);
  bool outside = false;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    const bool inside = change.v[i] >= T(-kLimit) && change.v[i] <= T(kLimit);  // not so for NaN
    const Unsigned by = Unsigned(I(inside ? nearest(change.v[i]) : T(0)));
    w.v[i] = I(Unsigned(w.v[i]) + (c.sign < 0 ? Unsigned(0) - by : by));
    outside |= i < s.count && (!inside || w.v[i] > kLimit || w.v[i] < -kLimit);
  }
  store_integers<T, I>(at, s.count, w);
  if (outside) *c.overflow = 1;  // by whoever has one: all store the same
  if (!c.state.data) return;
  if (sizeof(T) == 8 && c.state.dtype == kFloat64)
    show<double>(c, s, w);
  else
    show<float>(c, s, w);
}

}  // namespace

int leap(const LeapCall& call, bool wide, void* stream) {
  if (call.wide_integers)
    return wide ? launch<double>(leap_kernel<double, int64_t>, call, stream)
                : launch<float>(leap_kernel<float, int64_t>, call, stream);
  return wide ? launch<double>(leap_kernel<double, int32_t>, call, stream)
              : launch<float>(leap_kernel<float, int32_t>, call, stream);
}

}  // namespace cuda
}  // namespace gs
