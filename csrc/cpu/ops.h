// SPDX-License-Identifier: Apache-2.0
// The ops on raw operands: what ops.cpp asks of the CPU.
#pragma once
#include <vector>

#include "operand.h"

namespace gs {

// An injection: gradsampler.contract.Draw.
struct Noise {
  int kind = kOff;
  int64_t step = 0, offset = 0;
  uint64_t seed = 0, normal_seed = 0;
  double weight = 1, gain = 0, rate = 0, amplitude = 0, phase = 0, normal = 0;
  Operand source;  // z0, or the given tensor
  double coef = 0; // in front of n

  bool present() const { return coef != 0 && (kind != kOff || normal != 0); }
};

// [K] shared, or [B, K] in double.
struct Coefs {
  const double* values = nullptr;
  bool per_sample = false;
};

struct Shape {
  int64_t samples, size;
  bool wide;  // compute in double
};

struct Step {
  Shape shape;
  std::vector<Operand> terms;
  Coefs coefs;
  Noise noise;
  bool clamped = false;
  double lo = 0, hi = 0;
  Operand out, model;  // model input: model_scale * out, or absent
  double model_scale = 1;
};
void step(const Step& a);

struct StepPull {
  Step forward;  // out and model unused
  Operand g;
  std::vector<Operand> dterms;  // one each, absent where not needed
  Operand dz0;                  // accumulated in place, or absent
  Operand dgiven;
  std::vector<double>* dcoefs = nullptr;  // [K] or [B, K]
  double* dnoise = nullptr;
};
void step_pull(const StepPull& a);

struct Adjoint {
  Shape shape;
  std::vector<Operand> lams;  // g last, if there is one
  std::vector<double> a, b;   // b: one more than lams, or empty
  Noise noise;
  Operand lam, mu, dz0;
};
void adjoint(const Adjoint& a);

struct Leap {
  Shape shape;
  Operand carried;  // int32 or int64, under the dtype of the float of that width
  std::vector<Operand> terms;
  std::vector<double> coefs;
  Noise noise;
  int sign = 1;
  double scale = 1, model_scale = 1;
  Operand state, model;  // each may be absent
  int32_t* overflow = nullptr;
};
void leap(const Leap& a);

struct AncestralStep {
  Shape shape;
  Operand x, eps, v, noise, out;
  Operand g, dx, deps, dv, dnoise;
  Coefs coefs;  // kAncestral each, and nonzero
  double lo, hi;
};
void ancestral(const AncestralStep& a);
void ancestral_pull(const AncestralStep& a);

struct FlowPair {
  Shape shape;
  Operand x0, x1;     // x1 absent: normals of `seed`
  std::vector<double> t;
  double sigma_min;
  uint64_t seed;
  Operand x_t, velocity, x1_out;
  Operand gx, gv, dx0, dx1;
  std::vector<double>* dt = nullptr;
};
void flow_pair(const FlowPair& a);
void flow_pair_pull(const FlowPair& a);

}  // namespace gs
