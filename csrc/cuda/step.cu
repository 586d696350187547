// SPDX-License-Identifier: Apache-2.0
#include "noise.cuh"

namespace gs {
namespace cuda {
namespace {

template <class T>
__device__ __forceinline__ Vector<T> combination(const StepCall& c, const Span& s) {
  Vector<T> sum;
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= c.terms) break;
    const T w = coef_of<T>(c.coefs, s.row, k);
    const Vector<T> x = load<T>(c.term[k], s.begin, s.count);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) sum.v[i] = k ? mul_add(w, x.v[i], sum.v[i]) : w * x.v[i];
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) step_fwd_kernel(const __grid_constant__ StepCall c) {
  const Span s = span_of<T>(c.rows);
  if (s.count == 0) return;
  Vector<T> out = combination<T>(c, s);
  if (c.clamped)
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) out.v[i] = clamp_value(out.v[i], T(c.lo), T(c.hi));
  if (c.noise.kind != kOff || c.noise.normal != 0) {
    const T scale = noise_coef<T>(c.noise);
    const Vector<T> n = noise_value<T>(c.noise, c.rows, s);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) out.v[i] = mul_add(scale, n.v[i], out.v[i]);
  }
  store(c.out, s.begin, s.count, out);
  if (c.model.data) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) out.v[i] *= T(c.model_scale);
    store(c.model, s.begin, s.count, out);
  }
}

template <class T>
__device__ __forceinline__ double dot(const Vector<T>& x, const Vector<T>& y) {
  T sum = T(0);
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) sum = mul_add(x.v[i], y.v[i], sum);
  return double(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) step_bwd_kernel(const __grid_constant__ StepCall c) {
  const Span s = span_of<T>(c.rows);  // no early return: sums meet at barriers
  const Vector<T> g = load<T>(c.g, s.begin, s.count);
  Vector<T> through = g;
  if (c.clamped) {
    const Vector<T> sum = combination<T>(c, s);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i)
      through.v[i] = clamp_pull(g.v[i], sum.v[i], T(c.lo), T(c.hi));
  }
  const int columns = (c.sum_terms ? c.terms : 0) + (c.sum_noise ? 1 : 0);
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= c.terms) break;
    if (c.dterm[k].data) {
      const T w = coef_of<T>(c.coefs, s.row, k);
      Vector<T> d;
#pragma unroll
      for (int i = 0; i < Vector<T>::kSize; ++i) d.v[i] = w * through.v[i];
      store(c.dterm[k], s.begin, s.count, d);
    }
    if (c.sum_terms) {
      const double sum = block_sum(dot(load<T>(c.term[k], s.begin, s.count), through));
      if (threadIdx.x == 0) c.partial[int64_t(blockIdx.x) * columns + k] = sum;
    }
  }
  if (c.sum_noise) {
    // Lanes beyond the end hold a zero g, whatever their noise.
    const double sum = block_sum(dot(noise_value<T>(c.noise, c.rows, s), g));
    if (threadIdx.x == 0) c.partial[int64_t(blockIdx.x) * columns + columns - 1] = sum;
  }
  if (c.dz0.data && s.count) {
    Vector<T> d = load<T>(c.dz0, s.begin, s.count);
    noise_pull<T>(c.noise, c.rows, s, g, d, [&](int64_t i) { return read_one<T>(c.g.data, c.g.dtype, i); });
    store(c.dz0, s.begin, s.count, d);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) adjoint_kernel(const __grid_constant__ AdjointCall c) {
  const Span s = span_of<T>(c.rows);
  if (s.count == 0) return;
  Vector<T> lam, mu;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) lam.v[i] = mu.v[i] = T(0);
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= c.slots) break;
    const Vector<T> x = load<T>(c.lam_in[k], s.begin, s.count);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      lam.v[i] = mul_add(T(c.a[k]), x.v[i], lam.v[i]);
      if (k < c.own) mu.v[i] = mul_add(T(c.b[k]), x.v[i], mu.v[i]);
    }
  }
  store(c.lam, s.begin, s.count, lam);
  if (c.mu.data) {
    const T last = T(c.b[kMaxTerms]);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) mu.v[i] = mul_add(last, lam.v[i], mu.v[i]);
    store(c.mu, s.begin, s.count, mu);
  }
  if (c.dz0.data) {
    Vector<T> d = load<T>(c.dz0, s.begin, s.count);
    noise_pull<T>(c.noise, c.rows, s, lam, d, [&](int64_t i) {
      T sum = T(0);
#pragma unroll
      for (int k = 0; k < kMaxTerms; ++k) {
        if (k >= c.slots) break;
        sum = mul_add(T(c.a[k]), read_one<T>(c.lam_in[k].data, c.lam_in[k].dtype, i), sum);
      }
      return sum;
    });
    store(c.dz0, s.begin, s.count, d);
  }
}

// A row of threads for each sum: the order of addition depends on the shape alone.
__global__ void __launch_bounds__(kThreads, 2)
    sum_kernel(const double* partial, int64_t blocks_per_row, int columns, int stride, int first, Slot to) {
  const int64_t row = blockIdx.x / columns;
  const int k = int(blockIdx.x % columns);
  double sum = 0;
  for (int64_t b = threadIdx.x; b < blocks_per_row; b += kThreads)
    sum += partial[(row * blocks_per_row + b) * stride + first + k];
  sum = block_sum(sum);
  if (threadIdx.x == 0) write_one<double>(to, row * columns + k, sum);
}

}  // namespace

int64_t blocks_of(const Rows& rows, bool wide) { return wide ? grid_of<double>(rows) : grid_of<float>(rows); }

int step_fwd(const StepCall& call, bool wide, void* stream) {
  return wide ? launch<double>(step_fwd_kernel<double>, call, stream)
              : launch<float>(step_fwd_kernel<float>, call, stream);
}
int step_bwd(const StepCall& call, bool wide, void* stream) {
  return wide ? launch<double>(step_bwd_kernel<double>, call, stream)
              : launch<float>(step_bwd_kernel<float>, call, stream);
}
int adjoint_step(const AdjointCall& call, bool wide, void* stream) {
  return wide ? launch<double>(adjoint_kernel<double>, call, stream)
              : launch<float>(adjoint_kernel<float>, call, stream);
}
int sum_partials(const double* partial, int64_t rows, int64_t blocks_per_row, int columns, int stride,
                 int first, void* to, int dtype, void* stream) {
  if (rows * columns == 0) return 0;
  Slot slot;
  slot.data = to;
  slot.dtype = dtype;
  sum_kernel<<<unsigned(rows * columns), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      partial, blocks_per_row, columns, stride, first, slot);
  return int(cudaGetLastError());
}

}  // namespace cuda
}  // namespace gs
