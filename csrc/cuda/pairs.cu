// SPDX-License-Identifier: Apache-2.0
// ancestral_step and flow_pair.
#include "noise.cuh"

namespace gs {
namespace cuda {
namespace {

template <class T>
__device__ __forceinline__ Ancestral<T> numbers(const AncestralCall& c, int64_t row) {
  Ancestral<T> a;
  a.r1 = coef_of<T>(c.coefs, row, kR1);
  a.r2 = coef_of<T>(c.coefs, row, kR2);
  a.c1 = coef_of<T>(c.coefs, row, kC1);
  a.c2 = coef_of<T>(c.coefs, row, kC2);
  a.log_max = coef_of<T>(c.coefs, row, kLogMax);
  a.log_min = coef_of<T>(c.coefs, row, kLogMin);
  a.lo = T(c.lo);
  a.hi = T(c.hi);
  a.nonzero = c.nonzero ? T(static_cast<const float*>(c.nonzero)[row * c.nonzero_stride]) : T(1);
  a.learned = c.v.data != nullptr;
  return a;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) ancestral_fwd_kernel(const __grid_constant__ AncestralCall c) {
  const Span s = span_of<T>(c.rows);
  if (s.count == 0) return;
  const Ancestral<T> a = numbers<T>(c, s.row);
  const Vector<T> x = load<T>(c.x, s.begin, s.count), noise = load<T>(c.noise, s.begin, s.count);
  const Vector<T> eps = load<T>(c.eps, s.row * c.eps_stride + s.from, s.count);
  const Vector<T> v = c.v.data ? load<T>(c.v, s.row * c.v_stride + s.from, s.count) : x;
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i)
    out.v[i] = ancestral_value(a, x.v[i], eps.v[i], v.v[i], noise.v[i]);
  store(c.out, s.begin, s.count, out);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) ancestral_bwd_kernel(const __grid_constant__ AncestralCall c) {
  const Span s = span_of<T>(c.rows);
  if (s.count == 0) return;
  const Ancestral<T> a = numbers<T>(c, s.row);
  const Vector<T> x = load<T>(c.x, s.begin, s.count), noise = load<T>(c.noise, s.begin, s.count);
  const Vector<T> eps = load<T>(c.eps, s.row * c.eps_stride + s.from, s.count), g = load<T>(c.g, s.begin, s.count);
  const Vector<T> v = c.v.data ? load<T>(c.v, s.row * c.v_stride + s.from, s.count) : x;
  Vector<T> dx, deps, dv, dnoise;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i)
    ancestral_pull(a, g.v[i], x.v[i], eps.v[i], v.v[i], noise.v[i], dx.v[i], deps.v[i], dv.v[i], dnoise.v[i]);
  if (c.dx.data) store(c.dx, s.begin, s.count, dx);
  if (c.dnoise.data) store(c.dnoise, s.begin, s.count, dnoise);
  if (c.deps.data) store(c.deps, s.row * c.deps_stride + s.from, s.count, deps);
  if (c.dv.data) store(c.dv, s.row * c.dv_stride + s.from, s.count, dv);
}

template <class T>
__device__ __forceinline__ Flow<T> flow_of(const FlowCall& c, int64_t row) {
  const double r = 1.0 - read_one<double>(c.t, c.t_dtype, row), keep = 1.0 - c.sigma_min;
  return {T(r), T(1.0 - keep * r), T(keep)};
}

// The caller's x1, or float32 normals rounded to x0's dtype, as a tensor would hold them.
template <class T>
__device__ __forceinline__ Vector<T> x1_of(const FlowCall& c, const Span& s) {
  constexpr int kSize = Vector<T>::kSize;
  if (c.x1.data) return load<T>(c.x1, s.begin, s.count);
  Vector<T> x1;
#pragma unroll
  for (int half = 0; half < (kSize + 7) / 8; ++half) {
    Vector<float> n;
#pragma unroll
    for (int i = 0; i < 8; ++i) n.v[i] = 0.0f;
    add_normals<float>(n, s.begin + 8 * half, 0, c.seed, 1.0f);
#pragma unroll
    for (int i = 0; i < (kSize < 8 ? kSize : 8); ++i) {
      const bool half_type = c.x0.dtype >= kBFloat16, bf16 = c.x0.dtype == kBFloat16;
      x1.v[8 * half + i] = T(half_type ? widen_half(narrow_half(n.v[i], bf16), bf16) : n.v[i]);
    }
  }
  return x1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) flow_pair_fwd_kernel(const __grid_constant__ FlowCall c) {
  const Span s = span_of<T>(c.rows);
  if (s.count == 0) return;
  const Flow<T> f = flow_of<T>(c, s.row);
  const Vector<T> x0 = load<T>(c.x0, s.begin, s.count), x1 = x1_of<T>(c, s);
  Vector<T> x_t, velocity;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    x_t.v[i] = flow_state(f, x0.v[i], x1.v[i]);
    velocity.v[i] = flow_velocity(f, x0.v[i], x1.v[i]);
  }
  store(c.x_t, s.begin, s.count, x_t);
  store(c.velocity, s.begin, s.count, velocity);
  if (c.x1_out.data) store(c.x1_out, s.begin, s.count, x1);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) flow_pair_bwd_kernel(const __grid_constant__ FlowCall c) {
  constexpr int kSize = Vector<T>::kSize;
  const Span s = span_of<T>(c.rows);  // no early return: sums meet at barriers
  const Flow<T> f = flow_of<T>(c, s.row);
  Vector<T> gx, gv, d;
#pragma unroll
  for (int i = 0; i < kSize; ++i) gx.v[i] = gv.v[i] = T(0);
  if (c.gx.data) gx = load<T>(c.gx, s.begin, s.count);
  if (c.gv.data) gv = load<T>(c.gv, s.begin, s.count);
  if (c.dx0.data) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) d.v[i] = flow_pull_x0(f, gx.v[i], gv.v[i]);
    store(c.dx0, s.begin, s.count, d);
  }
  if (c.dx1.data) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) d.v[i] = flow_pull_x1(f, gx.v[i], gv.v[i]);
    store(c.dx1, s.begin, s.count, d);
  }
  if (c.partial) {
    const Vector<T> x0 = load<T>(c.x0, s.begin, s.count), x1 = x1_of<T>(c, s);
    T sum = T(0);  // lanes beyond the end hold a zero gx
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum = mul_add(flow_velocity(f, x0.v[i], x1.v[i]), gx.v[i], sum);
    const double total = block_sum(double(sum));
    if (threadIdx.x == 0) c.partial[blockIdx.x] = total;
  }
}

}  // namespace

int ancestral_fwd(const AncestralCall& call, bool wide, void* stream) {
  return wide ? launch<double>(ancestral_fwd_kernel<double>, call, stream)
              : launch<float>(ancestral_fwd_kernel<float>, call, stream);
}
int ancestral_bwd(const AncestralCall& call, bool wide, void* stream) {
  return wide ? launch<double>(ancestral_bwd_kernel<double>, call, stream)
              : launch<float>(ancestral_bwd_kernel<float>, call, stream);
}
int flow_pair_fwd(const FlowCall& call, bool wide, void* stream) {
  return wide ? launch<double>(flow_pair_fwd_kernel<double>, call, stream)
              : launch<float>(flow_pair_fwd_kernel<float>, call, stream);
}
int flow_pair_bwd(const FlowCall& call, bool wide, void* stream) {
  return wide ? launch<double>(flow_pair_bwd_kernel<double>, call, stream)
              : launch<float>(flow_pair_bwd_kernel<float>, call, stream);
}

}  // namespace cuda
}  // namespace gs
