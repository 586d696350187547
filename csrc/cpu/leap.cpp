// SPDX-License-Identifier: Apache-2.0
#include <atomic>

#include "blocks.h"
#include "noise.h"

namespace gs {
namespace {

// each(i, w) over the integers begin .. begin+n-1, wherever they lie.
template <class I, class F>
void for_integers(const Operand& x, int64_t begin, int64_t n, const F& each) {
  x.for_runs(begin, n, [&](int64_t done, char* from, int64_t count, int64_t stride) {
    I* at = reinterpret_cast<I*>(from);
    for (int64_t i = 0; i < count; ++i) each(done + i, at[i * stride]);
  });
}

// The state that the integers hold, rounded to its dtype, and the model's input from that.
template <class S, class I>
void show(const Leap& a, const Loops<S>& loops, const Block& b, const I* w, bool stream) {
  alignas(64) S x_buffer[kBlock], scaled[kBlock];
  alignas(64) uint16_t half[kBlock];
  S* direct = stream ? nullptr : target<S>(a.state, b.begin, b.n);
  S* x = direct ? direct : x_buffer;
  integers<I>(loops).scaled(x, w, S(a.scale), b.n);
  if (!direct) store(loops, a.state, b.begin, b.n, x, stream);
  if (!a.model) return;
  if (a.state.dtype != compute_dtype<S>()) {
    loops.write(half, a.state.dtype, 1, x, b.n, false);
    loops.read(x, half, a.state.dtype, 1, b.n);
  }
  loops.scale(scaled, x, S(a.model_scale), b.n);
  store(loops, a.model, b.begin, b.n, scaled, stream);
}

// T computes the increment, S the state.
template <class T, class S, class I>
void leap_blocks(const Leap& a) {
  const Loops<T>& loops = gs::loops<T>();
  const int64_t n = a.shape.samples * a.shape.size;
  const Blocks blocks = by_sample(a.noise) ? Blocks(a.shape.samples, a.shape.size) : Blocks(1, n);
  const NoiseBlocks<T> noise(a.noise, loops, blocks.size);
  const int terms = int(a.terms.size());
  const bool noisy = a.noise.present();
  const bool wave_only = noisy && a.noise.kind == kSinCos && a.noise.normal == 0;
  int64_t bytes = traffic({&a.carried, &a.noise.source, &a.state, &a.model}, n);
  for (const Operand& x : a.terms) bytes += traffic({&x}, n);
  const bool stream = bytes > cache_bytes();
  const T s = T(a.noise.coef);
  T c[kMaxTerms];
  for (int k = 0; k < terms; ++k) c[k] = T(a.coefs[k]);
  std::atomic<bool> outside{false};

  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T term_buffer[kMaxTerms][kBlock], n_buffer[kBlock], z_buffer[kBlock], change[kBlock];
    alignas(64) I w_buffer[kBlock];
    const void* x[kMaxTerms];
    bool inside = true;
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      for (int k = 0; k < terms; ++k) x[k] = load(loops, a.terms[k], b.begin, b.n, term_buffer[k]);
      if (wave_only) {
        const T* z = load(loops, a.noise.source, b.begin, b.n, z_buffer);
        loops.combine_wave(change, x, c, terms, z, noise.wave, s, b.n);
      } else {
        if (noisy) noise.value(b.row, b.begin - b.from, b.from, b.n, n_buffer, z_buffer);
        loops.combine(change, x, c, terms, noisy ? n_buffer : nullptr, s, b.n);
      }
      I* direct = reinterpret_cast<I*>(in_place(a.carried, b.begin, b.n, a.carried.dtype));
      I* w = direct ? direct : w_buffer;
      if (!direct) for_integers<I>(a.carried, b.begin, b.n, [&](int64_t i, I& each) { w[i] = each; });
      inside &= integers<I>(loops).leap(w, change, a.sign, b.n);
      if (!direct) for_integers<I>(a.carried, b.begin, b.n, [&](int64_t i, I& each) { each = w[i]; });
      if (a.state) show<S>(a, gs::loops<S>(), b, w, stream);
    }
    if (!inside) outside.store(true, std::memory_order_relaxed);
    if (stream) fence();
  });
  if (outside) *a.overflow = 1;
}

template <class T, class S>
void leap_integers(const Leap& a) {
  a.carried.dtype == kFloat64 ? leap_blocks<T, S, int64_t>(a) : leap_blocks<T, S, int32_t>(a);
}

}  // namespace

void leap(const Leap& a) {
  if (!a.shape.wide)
    leap_integers<float, float>(a);
  else if (a.state.dtype == kFloat64)
    leap_integers<double, double>(a);
  else
    leap_integers<double, float>(a);
}

}  // namespace gs
