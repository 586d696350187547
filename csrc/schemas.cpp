// SPDX-License-Identifier: Apache-2.0
// The raw ops, registered through PyTorch's stable ABI: each writes into tensors that the caller
// made. Autograd, fakes and allocation are Python's.
#include <torch/csrc/stable/library.h>

// contract.h has the order within the two lists.
#define GS_INJECTED "Tensor? source, float amount, Tensor? noise_coef, int[] words, float[] numbers"

STABLE_TORCH_LIBRARY(gradsampler_native, m) {
  m.def(
      "step(Tensor(a!) out, Tensor(b!)? model_input, Tensor[] terms, float[] coefs, Tensor? coefs_tensor, " GS_INJECTED
      ", float[] clamp, float model_scale) -> ()");
  m.def(
      "step_bwd(Tensor g, Tensor[] terms, float[] coefs, Tensor? coefs_tensor, " GS_INJECTED
      ", float[] clamp, Tensor(a!)[] dterms, int[] slots, Tensor(b!)? dcoefs, Tensor(c!)? dnoise_coef, "
      "Tensor(d!)? dz0, Tensor(e!)? dgiven) -> ()");
  m.def(
      "adjoint_step(Tensor(a!) lam, Tensor(b!)? mu, Tensor(c!)? dz0, Tensor[] lams, bool has_g, float[] a, "
      "float[] b, " GS_INJECTED ") -> ()");
  m.def(
      "leap(Tensor(a!) carried, Tensor(b!)? state, Tensor(c!)? model_input, Tensor(d!) overflow, "
      "Tensor[] terms, float[] coefs, " GS_INJECTED
      ", int sign, float scale, float model_scale, bool wide) -> ()");
  m.def(
      "ancestral_step(Tensor(a!) out, Tensor x, Tensor eps, Tensor? v, Tensor noise, float[] coefs, "
      "Tensor? coefs_tensor, Tensor? nonzero, float[] clamp) -> ()");
  m.def(
      "ancestral_step_bwd(Tensor g, Tensor x, Tensor eps, Tensor? v, Tensor noise, float[] coefs, "
      "Tensor? coefs_tensor, Tensor? nonzero, float[] clamp, Tensor(a!)? dx, Tensor(b!)? deps, "
      "Tensor(c!)? dv, Tensor(d!)? dnoise) -> ()");
  m.def(
      "flow_pair(Tensor(a!) x_t, Tensor(b!) velocity, Tensor(c!)? x1_out, Tensor x0, Tensor? x1, Tensor t, "
      "float sigma_min, int seed) -> ()");
  m.def(
      "flow_pair_bwd(Tensor? g_x_t, Tensor? g_velocity, Tensor x0, Tensor? x1, Tensor t, float sigma_min, "
      "int seed, Tensor(a!)? dx0, Tensor(b!)? dx1, Tensor(c!)? dt) -> ()");
}
