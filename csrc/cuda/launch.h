// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels take: raw pointers, numbers and a stream; no torch and no CUDA header.
// All tensors are contiguous; each slot has its own dtype.
#pragma once
#include "../step_math.h"

namespace gs {
namespace cuda {

struct Slot {
  void* data = nullptr;
  int dtype = kFloat32;
};

// Rows of `size` elements; a block of threads never crosses a row, so that sums are by row.
struct Rows {
  int64_t rows, size;
};

struct DeviceNoise {
  int kind = kOff;
  uint32_t step = 0;
  int64_t offset = 0;
  uint64_t seed = 0, normal_seed = 0;
  double weight = 1, normal = 0, coef = 0;
  Wave<double> wave;            // rounded to the compute type in the kernel's wrapper
  Slot source;                  // z0, or the given tensor
  const void* coef_at = nullptr;  // noise_coef on the device, of coef_dtype
  int coef_dtype = kFloat32;
};

struct DeviceCoefs {
  double values[kMaxTerms + 1] = {};
  const void* at = nullptr;  // [K], or [rows, K] with stride K
  int dtype = kFloat32;
  int64_t stride = 0;
};

struct StepCall {
  Rows rows;
  int terms = 0;
  Slot term[kMaxTerms];
  DeviceCoefs coefs;
  DeviceNoise noise;
  bool clamped = false;
  double lo = 0, hi = 0;
  Slot out, model;
  double model_scale = 1;
  // backward
  Slot g, dterm[kMaxTerms], dz0;
  double* partial = nullptr;  // [blocks, sums]: terms dot g, then n dot g
  bool sum_terms = false, sum_noise = false;
};

struct AdjointCall {
  Rows rows;
  int slots = 0, own = 0;  // own: slots that have a b; g comes after them
  Slot lam_in[kMaxTerms];
  double a[kMaxTerms] = {}, b[kMaxTerms + 1] = {};
  DeviceNoise noise;
  Slot lam, mu, dz0;
};

struct LeapCall {
  Rows rows;
  void* carried = nullptr;
  bool wide_integers = false;  // int64, else int32
  int terms = 0, sign = 1;
  Slot term[kMaxTerms];
  double coefs[kMaxTerms] = {};
  DeviceNoise noise;
  int* overflow = nullptr;
  double scale = 1, model_scale = 1;
  Slot state, model;
};

struct AncestralCall {
  Rows rows;
  // elements between the samples: eps and v are halves of one tensor, read where they lie
  int64_t eps_stride = 0, v_stride = 0, deps_stride = 0, dv_stride = 0;
  Slot x, eps, v, noise, out, g, dx, deps, dv, dnoise;
  DeviceCoefs coefs;  // kAncestral
  const void* nonzero = nullptr;  // float32, one or one a row
  int64_t nonzero_stride = 0;
  double lo, hi;
};

struct FlowCall {
  Rows rows;
  Slot x0, x1, x_t, velocity, x1_out, gx, gv, dx0, dx1;
  const void* t = nullptr;  // [rows]
  int t_dtype = kFloat32;
  double sigma_min = 0;
  uint64_t seed = 0;
  double* partial = nullptr;  // [blocks]
};

// Launchers return a cudaError_t as int. `wide` computes in double.
int64_t blocks_of(const Rows& rows, bool wide);
int step_fwd(const StepCall& call, bool wide, void* stream);
int step_bwd(const StepCall& call, bool wide, void* stream);
int adjoint_step(const AdjointCall& call, bool wide, void* stream);
int leap(const LeapCall& call, bool wide, void* stream);
int ancestral_fwd(const AncestralCall& call, bool wide, void* stream);
int ancestral_bwd(const AncestralCall& call, bool wide, void* stream);
int flow_pair_fwd(const FlowCall& call, bool wide, void* stream);
int flow_pair_bwd(const FlowCall& call, bool wide, void* stream);

// Second pass: to[row * columns + k] = sum over the row's blocks, in their order.
int sum_partials(const double* partial, int64_t rows, int64_t blocks_per_row, int columns, int stride,
                 int first, void* to, int dtype, void* stream);

}  // namespace cuda
}  // namespace gs
