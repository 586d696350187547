// SPDX-License-Identifier: Apache-2.0
#include "blocks.h"
#include "noise.h"

namespace gs {
namespace {

Blocks blocks_for(const Step& a, bool need_samples) {
  if (need_samples || a.coefs.per_sample || by_sample(a.noise)) return {a.shape.samples, a.shape.size};
  return {1, a.shape.samples * a.shape.size};
}

template <class T>
void coefs_of(const Coefs& c, int64_t row, int terms, T* to) {
  const double* from = c.values + (c.per_sample ? row * terms : 0);
  for (int k = 0; k < terms; ++k) to[k] = T(from[k]);
}

bool streams(const Step& a) {
  const int64_t n = a.shape.samples * a.shape.size;
  int64_t bytes = traffic({&a.noise.source, &a.out, &a.model}, n);
  for (const Operand& x : a.terms) bytes += traffic({&x}, n);
  return bytes > cache_bytes();
}

// One block with terms, noise source and output all in bfloat16: converted in registers. The block
// of buffers that the general path needs costs twice the memory's time there.
template <class T>
bool bf16_block(const Step& a, const NoiseBlocks<T>& noise, const Block& b, const T* c, const T* n_block,
                bool wave, bool stream) {
  alignas(64) uint16_t result[kBlock];
  const void* x[kMaxTerms];
  for (size_t k = 0; k < a.terms.size(); ++k)
    if (!(x[k] = in_place(a.terms[k], b.begin, b.n, kBFloat16))) return false;
  char* to = in_place(a.out, b.begin, b.n, kBFloat16);
  const char* z = wave ? in_place(a.noise.source, b.begin, b.n, kBFloat16) : to;
  if (!to || !z) return false;
  void* out = stream ? (void*)result : to;
  const int terms = int(a.terms.size());
  if (wave)
    noise.loops.combine_wave_bf16(out, x, c, terms, z, noise.wave, T(a.noise.coef), b.n);
  else
    noise.loops.combine_bf16(out, x, c, terms, n_block, T(a.noise.coef), b.n);
  if (stream) noise.loops.copy(to, result, b.n * 2, true);
  return true;
}

template <class T>
void step_blocks(const Step& a) {
  const Loops<T>& loops = gs::loops<T>();
  const Blocks blocks = blocks_for(a, false);
  const NoiseBlocks<T> noise(a.noise, loops, blocks.size);
  const int terms = int(a.terms.size());
  const bool noisy = a.noise.present(), stream = streams(a);
  const bool wave_only = noisy && a.noise.kind == kSinCos && a.noise.normal == 0 && !a.clamped;
  const bool halves = sizeof(T) == 4 && !a.clamped && !a.model;
  const bool rounds = bytes_of(a.out.dtype) == 2 && (!a.model || bytes_of(a.model.dtype) == 2);
  auto* combine_wave = rounds ? loops.combine_wave_coarse : loops.combine_wave;
  const T s = T(a.noise.coef), lo = T(a.lo), hi = T(a.hi);

  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T term_buffer[kMaxTerms][kBlock], n_buffer[kBlock], z_buffer[kBlock], result[kBlock];
    const void* x[kMaxTerms];
    T c[kMaxTerms];
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      coefs_of(a.coefs, b.row, terms, c);
      if (noisy && !wave_only) noise.value(b.row, b.begin - b.from, b.from, b.n, n_buffer, z_buffer);
      if (halves && bf16_block(a, noise, b, c, noisy ? n_buffer : nullptr, wave_only, stream)) continue;
      for (int k = 0; k < terms; ++k) x[k] = load(loops, a.terms[k], b.begin, b.n, term_buffer[k]);
      T* direct = stream || a.model ? nullptr : target<T>(a.out, b.begin, b.n);
      T* out = direct ? direct : result;
      if (wave_only) {
        const T* z = load(loops, a.noise.source, b.begin, b.n, z_buffer);
        combine_wave(out, x, c, terms, z, noise.wave, s, b.n);
      } else {
        loops.combine(out, x, c, terms, noisy && !a.clamped ? n_buffer : nullptr, s, b.n);
        if (a.clamped) {
          loops.clamp(out, lo, hi, b.n);
          if (noisy) loops.add_scaled(out, n_buffer, s, b.n);
        }
      }
      if (!direct) store(loops, a.out, b.begin, b.n, out, stream);
      if (a.model) {
        loops.scale(n_buffer, out, T(a.model_scale), b.n);
        store(loops, a.model, b.begin, b.n, n_buffer, stream);
      }
    }
    if (stream) fence();
  });
}

// A term's cotangent c * g where both are bfloat16, else false.
template <class T>
bool scale_bf16(const Loops<T>& loops, const Operand& to, const Operand& g, const Block& b, T c, bool stream) {
  char* target = sizeof(T) == 4 ? in_place(to, b.begin, b.n, kBFloat16) : nullptr;
  const void* from = target ? in_place(g, b.begin, b.n, kBFloat16) : nullptr;
  if (!from) return false;
  alignas(64) uint16_t result[kBlock];
  loops.combine_bf16(stream ? (void*)result : target, &from, &c, 1, nullptr, T(0), b.n);
  if (stream) loops.copy(target, result, b.n * 2, true);
  return true;
}

template <class T>
void pull_blocks(const StepPull& p) {
  const Step& a = p.forward;
  const Loops<T>& loops = gs::loops<T>();
  const Blocks blocks = blocks_for(a, false);
  const NoiseBlocks<T> noise(a.noise, loops, blocks.size);
  const int terms = int(a.terms.size());
  const int sums = (p.dcoefs ? terms : 0) + (p.dnoise ? 1 : 0);
  std::vector<double> partial(size_t(blocks.count()) * sums);
  bool needs_terms = p.dcoefs != nullptr;
  for (const Operand& d : p.dterms) needs_terms |= bool(d);
  const bool rolled = a.noise.kind == kSignedRoll;
  bool stream = streams(a);

  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T term_buffer[kMaxTerms][kBlock], g_buffer[kBlock], masked[kBlock], result[kBlock],
        z_buffer[kBlock];
    const void* x[kMaxTerms];
    T c[kMaxTerms];
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      const int64_t base = b.begin - b.from;
      coefs_of(a.coefs, b.row, terms, c);
      const T* g = load(loops, p.g, b.begin, b.n, g_buffer);
      const T* through = g;  // the cotangent of the linear combination
      if (p.dcoefs || (a.clamped && needs_terms))
        for (int k = 0; k < terms; ++k) x[k] = load(loops, a.terms[k], b.begin, b.n, term_buffer[k]);
      if (a.clamped && needs_terms) {
        loops.combine(result, x, c, terms, nullptr, T(0), b.n);
        loops.clamp_pull(masked, g, result, T(a.lo), T(a.hi), b.n);
        through = masked;
      }
      double* sum = partial.data() + index * sums;
      if (p.dcoefs)
        for (int k = 0; k < terms; ++k) *sum++ = loops.dot((const T*)x[k], through, b.n);
      for (int k = 0; k < terms; ++k) {
        if (!p.dterms[k]) continue;
        if (through == g && scale_bf16(loops, p.dterms[k], p.g, b, c[k], stream)) continue;
        T* direct = stream ? nullptr : target<T>(p.dterms[k], b.begin, b.n);
        loops.scale(direct ? direct : result, through, c[k], b.n);
        if (!direct) store(loops, p.dterms[k], b.begin, b.n, result, stream);
      }
      if (p.dnoise) {
        noise.value(b.row, base, b.from, b.n, result, z_buffer);
        *sum = loops.dot(result, g, b.n);
      }
      for (const Operand* d : {&p.dz0, &p.dgiven}) {
        if (!*d || noise.pull_bf16(*d, p.g, b.begin, b.n)) continue;
        T* now = accumulator(loops, *d, b.begin, b.n, result);
        if (rolled) {
          const T* far = load_rolled(loops, p.g, base, blocks.size, b.from + a.noise.offset, b.n, masked);
          noise.pull_rolled(now, far, b.row, b.from, b.n);
        } else {
          const T* z = a.noise.kind == kSinCos ? load(loops, a.noise.source, b.begin, b.n, z_buffer) : g;
          noise.pull(now, z, g, b.n);
        }
        if (now == result) store(loops, *d, b.begin, b.n, result, false);
      }
    }
    if (stream) fence();
  });

  // Second pass, in the order of the blocks.
  for (int64_t index = 0; index < blocks.count(); ++index) {
    const double* sum = partial.data() + index * sums;
    if (p.dcoefs) {
      double* to = p.dcoefs->data() + (a.coefs.per_sample ? block_of(blocks, index).row * terms : 0);
      for (int k = 0; k < terms; ++k) to[k] += *sum++;
    }
    if (p.dnoise) *p.dnoise += *sum;
  }
}

}  // namespace

void step(const Step& a) { a.shape.wide ? step_blocks<double>(a) : step_blocks<float>(a); }
void step_pull(const StepPull& a) {
  a.forward.shape.wide ? pull_blocks<double>(a) : pull_blocks<float>(a);
}

}  // namespace gs
