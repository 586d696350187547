// SPDX-License-Identifier: Apache-2.0
// The raw ops on CPU tensors.
#include "tensors.h"

namespace gs {
namespace {

void check_count(const char* op, const char* argument, size_t got, size_t expected) {
  STD_TORCH_CHECK(got == expected, Name{op, argument}.text(), " must hold ", expected, " numbers, got ", got);
}

Noise noise_of(const char* op, const Injected& in, const Like& like) {
  Noise n;
  if (!injects(op, in, like)) return n;
  const Ints& w = in.words;
  const Floats& x = in.numbers;
  n.kind = int(w[kKind]), n.step = w[kStep], n.offset = w[kOffset];
  n.seed = uint64_t(w[kSeed]), n.normal_seed = uint64_t(w[kNormalSeed]);
  n.weight = x[kWeight], n.gain = x[kGain], n.rate = x[kRate];
  n.amplitude = x[kAmplitude], n.phase = x[kPhase], n.normal = x[kNormal];
  n.coef = in.amount_tensor ? values_of(*in.amount_tensor, {op, "noise_coef"})[0] : in.amount;
  if (n.kind != kOff) n.source = operand(*in.source, like, {op, source_name(n.kind)});
  return n;
}

// Reads the coefficients into `storage`, which must outlive the result.
Coefs coefs_of(const char* op, const Floats& numbers, const Maybe& tensor, const Like& like, size_t terms,
               Floats& storage) {
  if (!tensor) {
    check_count(op, "coefs", numbers.size(), terms);
    return {numbers.data(), false};
  }
  const bool per_sample = tensor->dim() == 2;
  const int64_t k = int64_t(terms), sizes[2] = {like.samples(), k};
  const int64_t *expected = per_sample ? sizes : sizes + 1, dims = per_sample ? 2 : 1;
  const auto got = tensor->sizes();
  STD_TORCH_CHECK(int64_t(got.size()) == dims && std::equal(got.begin(), got.end(), expected), op,
                  ": coefs must have shape [", k, "] or [", sizes[0], ", ", k, "], got ",
                  shape_text(got.data(), int64_t(got.size())));
  check_device(*tensor, like, {op, "coefs"});
  storage = values_of(*tensor, {op, "coefs"});
  return {storage.data(), per_sample};
}

void clamp_of(const char* op, const Floats& clamp, double& lo, double& hi) {
  if (clamp.empty()) return;
  check_count(op, "clamp", clamp.size(), 2);
  lo = clamp[0], hi = clamp[1];
}

Like like_terms(const char* op, const std::vector<Tensor>& terms, size_t least) {
  STD_TORCH_CHECK(terms.size() >= least && terms.size() <= size_t(kMaxTerms), op, ": terms must hold ", least,
                  " to ", kMaxTerms, " tensors, got ", terms.size());
  return Like(terms[0]);
}

// A roll reads elsewhere than it writes.
void check_apart(const char* op, const Noise& noise, const Operand& out) {
  STD_TORCH_CHECK(noise.kind != kSignedRoll || !out || out.data != noise.source.data, op,
                  ": out must not share memory with z0 under a signed roll, got the same tensor");
}

Step step_of(const char* op, const std::vector<Tensor>& terms, const Like& like) {
  Step a;
  for (size_t k = 0; k < terms.size(); ++k) a.terms.push_back(operand(terms[k], like, {op, "terms", int64_t(k)}));
  return a;
}

bool any_wide(const std::vector<Operand>& list) {
  for (const Operand& x : list)
    if (wide({&x})) return true;
  return false;
}

void step_cpu(Tensor out, Maybe model, std::vector<Tensor> terms, Floats coefs, Maybe coefs_tensor,
              Maybe source, double amount, Maybe noise_coef, Ints words, Floats numbers, Floats clamp,
              double model_scale) {
  const Like like = like_terms("step", terms, 1);
  Step a = step_of("step", terms, like);
  Floats storage;
  a.coefs = coefs_of("step", coefs, coefs_tensor, like, terms.size(), storage);
  a.noise = noise_of("step", {source, amount, noise_coef, words, numbers}, like);
  a.clamped = !clamp.empty();
  clamp_of("step", clamp, a.lo, a.hi);
  a.out = output(out, like, {"step", "out"});
  a.model = output(model, like, {"step", "model_input"});
  a.model_scale = model_scale;
  a.shape = like.shape(any_wide(a.terms) || wide({&a.noise.source, &a.out}));
  check_apart("step", a.noise, a.out);
  if (like.numel) step(a);
}

void step_bwd_cpu(Tensor g, std::vector<Tensor> terms, Floats coefs, Maybe coefs_tensor, Maybe source,
                  double amount, Maybe noise_coef, Ints words, Floats numbers, Floats clamp,
                  std::vector<Tensor> dterms, Ints slots, Maybe dcoefs, Maybe dnoise_coef, Maybe dz0, Maybe dgiven) {
  const Like like = like_terms("step_bwd", terms, 1);
  StepPull p;
  Step& a = p.forward = step_of("step_bwd", terms, like);
  Floats storage;
  a.coefs = coefs_of("step_bwd", coefs, coefs_tensor, like, terms.size(), storage);
  a.noise = noise_of("step_bwd", {source, amount, noise_coef, words, numbers}, like);
  a.clamped = !clamp.empty();
  clamp_of("step_bwd", clamp, a.lo, a.hi);
  p.g = operand(g, like, {"step_bwd", "g"});
  p.dterms.resize(terms.size());
  check_count("step_bwd", "slots", slots.size(), dterms.size());
  for (size_t k = 0; k < slots.size(); ++k) {
    STD_TORCH_CHECK(slots[k] >= 0 && slots[k] < int64_t(terms.size()), "step_bwd: slots[", k,
                    "] must be in 0 to ", terms.size() - 1, ", got ", slots[k]);
    p.dterms[slots[k]] = output(dterms[k], like, {"step_bwd", "dterms", slots[k]});
  }
  p.dz0 = a.noise.kind == kOff ? Operand() : output(dz0, like, {"step_bwd", "dz0"});
  p.dgiven = a.noise.kind == kGiven ? output(dgiven, like, {"step_bwd", "dgiven"}) : Operand();
  a.shape = like.shape(any_wide(a.terms) || wide({&a.noise.source, &p.g, &p.dz0}));
  Floats sums(dcoefs ? (a.coefs.per_sample ? like.samples() : 1) * terms.size() : 0);
  double noise_sum = 0;
  if (dcoefs) p.dcoefs = &sums;
  if (dnoise_coef) p.dnoise = &noise_sum;
  if (like.numel) step_pull(p);
  if (dcoefs) put_values(*dcoefs, sums, {"step_bwd", "dcoefs"});
  if (dnoise_coef) put_values(*dnoise_coef, {noise_sum}, {"step_bwd", "dnoise_coef"});
}

void adjoint_cpu(Tensor lam, Maybe mu, Maybe dz0, std::vector<Tensor> lams, bool has_g, Floats a, Floats b,
                 Maybe source, double amount, Maybe noise_coef, Ints words, Floats numbers) {
  const char* op = "adjoint_step";
  const Like like(lam);
  STD_TORCH_CHECK(lams.size() <= size_t(kMaxTerms), op, ": lams must hold at most ", kMaxTerms - 1,
                  " tensors, got ", lams.size() - has_g);
  check_count(op, "a", a.size(), lams.size());
  Adjoint w;
  for (size_t k = 0; k < lams.size(); ++k) {
    const bool is_g = has_g && k + 1 == lams.size();
    w.lams.push_back(operand(lams[k], like, {op, is_g ? "g" : "lams", is_g ? -1 : int64_t(k)}));
  }
  w.a = a;
  w.lam = output(lam, like, {op, "lam"});
  w.mu = output(mu, like, {op, "mu"});
  if (mu) {
    check_count(op, "b", b.size(), lams.size() - has_g + 1);
    w.b = b;
  }
  w.noise = noise_of(op, {source, amount, noise_coef, words, numbers}, like);
  w.dz0 = w.noise.kind == kOff ? Operand() : output(dz0, like, {op, "dz0"});
  w.shape = like.shape(any_wide(w.lams) || wide({&w.noise.source, &w.lam, &w.dz0}));
  if (like.numel) adjoint(w);
}

void leap_cpu(Tensor carried, Maybe state, Maybe model, Tensor overflow, std::vector<Tensor> terms, Floats coefs,
              Maybe source, double amount, Maybe noise_coef, Ints words, Floats numbers, int64_t sign, double scale,
              double model_scale, bool wide) {
  const char* op = "leap";
  const Like like = like_terms(op, terms, 1);
  Leap a;
  a.carried = integers(carried, like, {op, "carried"});
  for (size_t k = 0; k < terms.size(); ++k) a.terms.push_back(operand(terms[k], like, {op, "terms", int64_t(k)}));
  check_count(op, "coefs", coefs.size(), terms.size());
  a.coefs = coefs;
  a.noise = noise_of(op, {source, amount, noise_coef, words, numbers}, like);
  a.sign = int(sign);
  a.scale = scale;
  a.model_scale = model_scale;
  a.state = output(state, like, {op, "state"});
  a.model = output(model, like, {op, "model_input"});
  a.overflow = flag(overflow, like, {op, "overflow"});
  a.shape = like.shape(wide);
  if (like.numel) leap(a);
}

// coefs and nonzero: one row for all samples, or one a sample.
AncestralStep ancestral_of(const char* op, const Tensor& x, const Tensor& eps, const Maybe& v,
                           const Tensor& noise, const Floats& coefs, const Maybe& coefs_tensor,
                           const Maybe& nonzero, const Floats& clamp, const Like& like, Floats& storage) {
  AncestralStep a;
  a.x = operand(x, like, {op, "x"});
  a.eps = operand(eps, like, {op, "model_output"});
  a.v = operand(v, like, {op, "model_output (variance)"});
  a.noise = operand(noise, like, {op, "noise"});
  a.lo = -INFINITY, a.hi = INFINITY;
  clamp_of(op, clamp, a.lo, a.hi);
  Floats read;
  const Coefs c = coefs_of(op, coefs, coefs_tensor, like, kAncestral, read);
  Floats kept = nonzero ? values_of(*nonzero, {op, "nonzero"}) : Floats{1.0};
  STD_TORCH_CHECK(kept.size() == 1 || int64_t(kept.size()) == like.samples(), op,
                  ": nonzero must hold 1 or ", like.samples(), " elements, got ", kept.size());
  const bool per_sample = c.per_sample || kept.size() > 1;
  const int64_t rows = per_sample ? like.samples() : 1;
  storage.clear();
  for (int64_t row = 0; row < rows; ++row) {
    const double* from = c.values + (c.per_sample ? row * kAncestral : 0);
    storage.insert(storage.end(), from, from + kAncestral);
    storage.push_back(kept[kept.size() > 1 ? row : 0]);
  }
  a.coefs = {storage.data(), per_sample};
  return a;
}

void ancestral_cpu(Tensor out, Tensor x, Tensor eps, Maybe v, Tensor noise, Floats coefs, Maybe coefs_tensor,
                   Maybe nonzero, Floats clamp) {
  const char* op = "ancestral_step";
  const Like like(x);
  Floats storage;
  AncestralStep a = ancestral_of(op, x, eps, v, noise, coefs, coefs_tensor, nonzero, clamp, like, storage);
  a.out = output(out, like, {op, "out"});
  a.shape = like.shape(wide({&a.x, &a.eps, &a.v, &a.noise, &a.out}));
  if (like.numel) ancestral(a);
}

void ancestral_bwd_cpu(Tensor g, Tensor x, Tensor eps, Maybe v, Tensor noise, Floats coefs, Maybe coefs_tensor,
                       Maybe nonzero, Floats clamp, Maybe dx, Maybe deps, Maybe dv, Maybe dnoise) {
  const char* op = "ancestral_step_bwd";
  const Like like(x);
  Floats storage;
  AncestralStep a = ancestral_of(op, x, eps, v, noise, coefs, coefs_tensor, nonzero, clamp, like, storage);
  a.g = operand(g, like, {op, "g"});
  a.dx = output(dx, like, {op, "dx"});
  a.deps = output(deps, like, {op, "deps"});
  a.dv = v ? output(dv, like, {op, "dv"}) : Operand();
  a.dnoise = output(dnoise, like, {op, "dnoise"});
  a.shape = like.shape(wide({&a.x, &a.eps, &a.v, &a.noise, &a.g}));
  if (like.numel) ancestral_pull(a);
}

FlowPair flow_of(const char* op, const Tensor& x0, const Maybe& x1, const Tensor& t, double sigma_min,
                 int64_t seed, const Like& like) {
  FlowPair a;
  a.x0 = operand(x0, like, {op, "x0"});
  a.x1 = operand(x1, like, {op, "x1"});
  a.t = values_of(t, {op, "t"});
  STD_TORCH_CHECK(t.dim() == 1 && int64_t(a.t.size()) == like.samples(), op, ": t must have shape [",
                  like.samples(), "], got ", shape_text(t.sizes().data(), t.dim()));
  a.sigma_min = sigma_min;
  a.seed = uint64_t(seed);
  return a;
}

void flow_pair_cpu(Tensor x_t, Tensor velocity, Maybe x1_out, Tensor x0, Maybe x1, Tensor t, double sigma_min,
                   int64_t seed) {
  const char* op = "flow_pair";
  const Like like(x0);
  FlowPair a = flow_of(op, x0, x1, t, sigma_min, seed, like);
  a.x_t = output(x_t, like, {op, "x_t"});
  a.velocity = output(velocity, like, {op, "velocity"});
  a.x1_out = output(x1_out, like, {op, "x1_out"});
  a.shape = like.shape(wide({&a.x0, &a.x1, &a.x_t, &a.velocity}));
  if (like.numel) flow_pair(a);
}

void flow_pair_bwd_cpu(Maybe gx, Maybe gv, Tensor x0, Maybe x1, Tensor t, double sigma_min, int64_t seed,
                       Maybe dx0, Maybe dx1, Maybe dt) {
  const char* op = "flow_pair_bwd";
  const Like like(x0);
  FlowPair a = flow_of(op, x0, x1, t, sigma_min, seed, like);
  a.gx = operand(gx, like, {op, "g_x_t"});
  a.gv = operand(gv, like, {op, "g_velocity"});
  a.dx0 = output(dx0, like, {op, "dx0"});
  a.dx1 = output(dx1, like, {op, "dx1"});
  a.shape = like.shape(wide({&a.x0, &a.x1, &a.gx, &a.gv}));
  Floats sums(dt ? like.samples() : 0);
  if (dt) a.dt = &sums;
  if (like.numel) flow_pair_pull(a);
  if (dt) put_values(*dt, sums, {op, "dt"});
}

}  // namespace
}  // namespace gs

STABLE_TORCH_LIBRARY_IMPL(gradsampler_native, CPU, m) {
  m.impl("step", TORCH_BOX(&gs::step_cpu));
  m.impl("step_bwd", TORCH_BOX(&gs::step_bwd_cpu));
  m.impl("adjoint_step", TORCH_BOX(&gs::adjoint_cpu));
  m.impl("leap", TORCH_BOX(&gs::leap_cpu));
  m.impl("ancestral_step", TORCH_BOX(&gs::ancestral_cpu));
  m.impl("ancestral_step_bwd", TORCH_BOX(&gs::ancestral_bwd_cpu));
  m.impl("flow_pair", TORCH_BOX(&gs::flow_pair_cpu));
  m.impl("flow_pair_bwd", TORCH_BOX(&gs::flow_pair_bwd_cpu));
}
