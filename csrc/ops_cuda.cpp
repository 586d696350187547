// SPDX-License-Identifier: Apache-2.0
// The raw ops on CUDA tensors, on the tensors' device and its current stream. No value of a tensor
// is read by the host.
#include "session.h"

namespace gs {
namespace {

cuda::StepCall step_of(Session& s, const std::vector<Tensor>& terms, const Floats& coefs,
                       const Maybe& coefs_tensor, const Injected& injected, const Floats& clamp) {
  cuda::StepCall c;
  c.terms = int(terms.size());
  for (int k = 0; k < c.terms; ++k) c.term[k] = s.input(terms[k], "terms", k);
  c.coefs = coefs_of(s, coefs, coefs_tensor, c.terms);
  c.noise = noise_of(s, injected);
  c.clamped = !clamp.empty();
  clamp_of(s, clamp, c.lo, c.hi);
  c.rows = s.rows(c.coefs.stride != 0 || c.noise.kind == kSignedRoll);
  return c;
}

void check_terms(const char* op, const std::vector<Tensor>& terms) {
  STD_TORCH_CHECK(!terms.empty() && terms.size() <= size_t(kMaxTerms), op, ": terms must hold 1 to ",
                  kMaxTerms, " tensors, got ", terms.size());
}

void step_cuda(Tensor out, Maybe model, std::vector<Tensor> terms, Floats coefs, Maybe coefs_tensor,
               Maybe source, double amount, Maybe noise_coef, Ints words, Floats numbers, Floats clamp,
               double model_scale) {
  check_terms("step", terms);
  Session s("step", terms[0]);
  cuda::StepCall c = step_of(s, terms, coefs, coefs_tensor, {source, amount, noise_coef, words, numbers}, clamp);
  c.out = s.result(out, "out", true);
  c.model = s.result(model, "model_input");
  c.model_scale = model_scale;
  STD_TORCH_CHECK(c.noise.kind != kSignedRoll || c.out.data != c.noise.source.data,
                  "step: out must not share memory with z0 under a signed roll, got the same tensor");
  s.finish(cuda::step_fwd(c, s.wide, s.stream()));
}

void step_bwd_cuda(Tensor g, std::vector<Tensor> terms, Floats coefs, Maybe coefs_tensor, Maybe source,
                   double amount, Maybe noise_coef, Ints words, Floats numbers, Floats clamp,
                   std::vector<Tensor> dterms, Ints slots, Maybe dcoefs, Maybe dnoise_coef, Maybe dz0, Maybe dgiven) {
  check_terms("step_bwd", terms);
  Session s("step_bwd", terms[0]);
  cuda::StepCall c = step_of(s, terms, coefs, coefs_tensor, {source, amount, noise_coef, words, numbers}, clamp);
  c.g = s.input(g, "g");
  STD_TORCH_CHECK(slots.size() == dterms.size(), "step_bwd: slots must hold ", dterms.size(), " numbers, got ",
                  slots.size());
  for (size_t k = 0; k < slots.size(); ++k) {
    STD_TORCH_CHECK(slots[k] >= 0 && slots[k] < c.terms, "step_bwd: slots[", k, "] must be in 0 to ",
                    c.terms - 1, ", got ", slots[k]);
    c.dterm[slots[k]] = s.result(dterms[k], "dterms", false, slots[k]);
  }
  const Maybe& pulled = dz0 ? dz0 : dgiven;
  STD_TORCH_CHECK(!(dz0 && dgiven), "step_bwd: one of dz0 and dgiven must be None, got both");
  if (c.noise.kind != kOff) c.dz0 = s.result(pulled, "dz0", true);
  c.sum_terms = dcoefs.has_value();
  c.sum_noise = dnoise_coef.has_value();
  const int columns = (c.sum_terms ? c.terms : 0) + (c.sum_noise ? 1 : 0);
  const int64_t blocks = cuda::blocks_of(c.rows, s.wide);
  if (columns) c.partial = s.workspace(blocks * columns);
  int error = cuda::step_bwd(c, s.wide, s.stream());
  if (!error && c.sum_terms) {
    const int64_t rows = c.coefs.stride ? c.rows.rows : 1;
    const int64_t per_row = rows ? blocks / rows : 0;
    const Slot to = s.numbers(*dcoefs, "dcoefs");
    error = cuda::sum_partials(c.partial, rows, per_row, c.terms, columns, 0, to.data, to.dtype, s.stream());
  }
  if (!error && c.sum_noise) {
    const Slot to = s.numbers(*dnoise_coef, "dnoise_coef");
    error = cuda::sum_partials(c.partial, 1, blocks, 1, columns, columns - 1, to.data, to.dtype, s.stream());
  }
  s.finish(error);
}

void adjoint_cuda(Tensor lam, Maybe mu, Maybe dz0, std::vector<Tensor> lams, bool has_g, Floats a, Floats b,
                  Maybe source, double amount, Maybe noise_coef, Ints words, Floats numbers) {
  Session s("adjoint_step", lam);
  cuda::AdjointCall c;
  STD_TORCH_CHECK(lams.size() <= size_t(kMaxTerms), s.op, ": lams must hold at most ", kMaxTerms - 1,
                  " tensors, got ", lams.size() - has_g);
  c.slots = int(lams.size());
  c.own = c.slots - int(has_g);
  STD_TORCH_CHECK(a.size() == lams.size() && (!mu || int(b.size()) == c.own + 1), s.op, ": a and b must hold ",
                  c.slots, " and ", c.own + 1, " numbers, got ", a.size(), " and ", b.size());
  for (int k = 0; k < c.slots; ++k) {
    c.lam_in[k] = s.input(lams[k], "lams", k);
    c.a[k] = a[k];
  }
  if (mu) {
    std::copy(b.begin(), b.end() - 1, c.b);
    c.b[kMaxTerms] = b.back();
  }
  c.noise = noise_of(s, {source, amount, noise_coef, words, numbers});
  c.lam = s.result(lam, "lam", true);
  c.mu = s.result(mu, "mu");
  if (c.noise.kind != kOff) c.dz0 = s.result(dz0, "dz0", true);
  c.rows = s.rows(c.noise.kind == kSignedRoll);
  s.finish(cuda::adjoint_step(c, s.wide, s.stream()));
}

void leap_cuda(Tensor carried, Maybe state, Maybe model, Tensor overflow, std::vector<Tensor> terms, Floats coefs,
               Maybe source, double amount, Maybe noise_coef, Ints words, Floats numbers, int64_t sign, double scale,
               double model_scale, bool wide) {
  check_terms("leap", terms);
  Session s("leap", terms[0]);
  cuda::LeapCall c;
  c.terms = int(terms.size());
  STD_TORCH_CHECK(coefs.size() == terms.size(), "leap: coefs must hold ", terms.size(), " numbers, got ",
                  coefs.size());
  for (int k = 0; k < c.terms; ++k) c.term[k] = s.input(terms[k], "terms", k);
  std::copy(coefs.begin(), coefs.end(), c.coefs);
  c.noise = noise_of(s, {source, amount, noise_coef, words, numbers});
  c.wide_integers = s.integral(carried, "carried", c.carried);
  c.sign = int(sign);
  c.scale = scale;
  c.model_scale = model_scale;
  c.state = s.result(state, "state");
  c.model = s.result(model, "model_input");
  c.overflow = flag(overflow, s.like, {"leap", "overflow"});
  c.rows = s.rows(c.noise.kind == kSignedRoll);
  s.finish(cuda::leap(c, wide, s.stream()));
}

cuda::AncestralCall ancestral_of(Session& s, const Tensor& x, const Tensor& eps, const Maybe& v,
                                 const Tensor& noise, const Floats& coefs, const Maybe& coefs_tensor,
                                 const Maybe& nonzero, const Floats& clamp) {
  cuda::AncestralCall c;
  c.rows = s.rows(true);
  c.x = s.input(x, "x");
  c.eps = s.half_input(eps, "model_output", c.eps_stride);
  c.v = s.half_input(v, "model_output (variance)", c.v_stride);
  c.noise = s.input(noise, "noise");
  c.coefs = coefs_of(s, coefs, coefs_tensor, kAncestral);
  c.lo = -INFINITY, c.hi = INFINITY;
  clamp_of(s, clamp, c.lo, c.hi);
  if (nonzero) {
    const Slot at = s.numbers(*nonzero, "nonzero");
    STD_TORCH_CHECK(at.dtype == kFloat32 && (nonzero->numel() == 1 || nonzero->numel() == s.like.samples()),
                    s.op, ": nonzero must hold 1 or ", s.like.samples(), " float32 elements, got ",
                    nonzero->numel());
    c.nonzero = at.data;
    c.nonzero_stride = nonzero->numel() == 1 ? 0 : 1;
  }
  return c;
}

void ancestral_cuda(Tensor out, Tensor x, Tensor eps, Maybe v, Tensor noise, Floats coefs, Maybe coefs_tensor,
                    Maybe nonzero, Floats clamp) {
  Session s("ancestral_step", x);
  cuda::AncestralCall c = ancestral_of(s, x, eps, v, noise, coefs, coefs_tensor, nonzero, clamp);
  c.out = s.result(out, "out", true);
  s.finish(cuda::ancestral_fwd(c, s.wide, s.stream()));
}

void ancestral_bwd_cuda(Tensor g, Tensor x, Tensor eps, Maybe v, Tensor noise, Floats coefs, Maybe coefs_tensor,
                        Maybe nonzero, Floats clamp, Maybe dx, Maybe deps, Maybe dv, Maybe dnoise) {
  Session s("ancestral_step_bwd", x);
  cuda::AncestralCall c = ancestral_of(s, x, eps, v, noise, coefs, coefs_tensor, nonzero, clamp);
  c.g = s.input(g, "g");
  c.dx = s.result(dx, "dx");
  c.deps = s.half_result(deps, "deps", c.deps_stride);
  c.dv = s.half_result(dv, "dv", c.dv_stride);
  c.dnoise = s.result(dnoise, "dnoise");
  s.finish(cuda::ancestral_bwd(c, s.wide, s.stream()));
}

cuda::FlowCall flow_of(Session& s, const Tensor& x0, const Maybe& x1, const Tensor& t, double sigma_min,
                       int64_t seed) {
  cuda::FlowCall c;
  c.rows = s.rows(true);
  c.x0 = s.input(x0, "x0");
  c.x1 = s.input(x1, "x1");
  STD_TORCH_CHECK(t.dim() == 1 && t.numel() == s.like.samples(), s.op, ": t must have shape [",
                  s.like.samples(), "], got ", shape_text(t.sizes().data(), t.dim()));
  const Slot at = s.numbers(t, "t");
  c.t = at.data;
  c.t_dtype = at.dtype;
  c.sigma_min = sigma_min;
  c.seed = uint64_t(seed);
  return c;
}

void flow_pair_cuda(Tensor x_t, Tensor velocity, Maybe x1_out, Tensor x0, Maybe x1, Tensor t, double sigma_min,
                    int64_t seed) {
  Session s("flow_pair", x0);
  cuda::FlowCall c = flow_of(s, x0, x1, t, sigma_min, seed);
  c.x_t = s.result(x_t, "x_t", true);
  c.velocity = s.result(velocity, "velocity", true);
  c.x1_out = s.result(x1_out, "x1_out");
  s.finish(cuda::flow_pair_fwd(c, s.wide, s.stream()));
}

void flow_pair_bwd_cuda(Maybe gx, Maybe gv, Tensor x0, Maybe x1, Tensor t, double sigma_min, int64_t seed,
                        Maybe dx0, Maybe dx1, Maybe dt) {
  Session s("flow_pair_bwd", x0);
  cuda::FlowCall c = flow_of(s, x0, x1, t, sigma_min, seed);
  c.gx = s.input(gx, "g_x_t");
  c.gv = s.input(gv, "g_velocity");
  c.dx0 = s.result(dx0, "dx0");
  c.dx1 = s.result(dx1, "dx1");
  const int64_t blocks = cuda::blocks_of(c.rows, s.wide);
  if (dt) c.partial = s.workspace(blocks);
  int error = cuda::flow_pair_bwd(c, s.wide, s.stream());
  if (!error && dt) {
    const Slot to = s.numbers(*dt, "dt");
    error = cuda::sum_partials(c.partial, c.rows.rows, c.rows.rows ? blocks / c.rows.rows : 0, 1, 1, 0, to.data,
                               to.dtype, s.stream());
  }
  s.finish(error);
}

}  // namespace
}  // namespace gs

STABLE_TORCH_LIBRARY_IMPL(gradsampler_native, CUDA, m) {
  m.impl("step", TORCH_BOX(&gs::step_cuda));
  m.impl("step_bwd", TORCH_BOX(&gs::step_bwd_cuda));
  m.impl("adjoint_step", TORCH_BOX(&gs::adjoint_cuda));
  m.impl("leap", TORCH_BOX(&gs::leap_cuda));
  m.impl("ancestral_step", TORCH_BOX(&gs::ancestral_cuda));
  m.impl("ancestral_step_bwd", TORCH_BOX(&gs::ancestral_bwd_cuda));
  m.impl("flow_pair", TORCH_BOX(&gs::flow_pair_cuda));
  m.impl("flow_pair_bwd", TORCH_BOX(&gs::flow_pair_bwd_cuda));
}
