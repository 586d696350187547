// SPDX-License-Identifier: Apache-2.0
#include "blocks.h"
#include "noise.h"

namespace gs {
namespace {

Blocks blocks_for(const AncestralStep& a) {
  // One sample's coefficients a block; shared ones leave samples unseen.
  if (a.coefs.per_sample) return {a.shape.samples, a.shape.size};
  return {1, a.shape.samples * a.shape.size};
}

template <class T>
Ancestral<T> numbers(const AncestralStep& a, int64_t row) {
  const double* c = a.coefs.values + (a.coefs.per_sample ? row * (kAncestral + 1) : 0);
  return {T(c[kR1]), T(c[kR2]), T(c[kC1]), T(c[kC2]), T(c[kLogMax]), T(c[kLogMin]),
          T(a.lo), T(a.hi), T(c[kAncestral]), bool(a.v)};
}

template <class T>
void forward(const AncestralStep& a) {
  const Loops<T>& loops = gs::loops<T>();
  const Blocks blocks = blocks_for(a);
  const int64_t n = a.shape.samples * a.shape.size;
  const bool stream = traffic({&a.x, &a.eps, &a.v, &a.noise, &a.out}, n) > cache_bytes();
  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T buffer[4][kBlock], result[kBlock];
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      const T* x = load(loops, a.x, b.begin, b.n, buffer[0]);
      const T* eps = load(loops, a.eps, b.begin, b.n, buffer[1]);
      const T* v = a.v ? load(loops, a.v, b.begin, b.n, buffer[2]) : x;
      const T* noise = load(loops, a.noise, b.begin, b.n, buffer[3]);
      T* direct = stream ? nullptr : target<T>(a.out, b.begin, b.n);
      loops.ancestral(direct ? direct : result, x, eps, v, noise, numbers<T>(a, b.row), b.n);
      if (!direct) store(loops, a.out, b.begin, b.n, result, stream);
    }
    if (stream) fence();
  });
}

template <class T>
void backward(const AncestralStep& a) {
  const Loops<T>& loops = gs::loops<T>();
  const Blocks blocks = blocks_for(a);
  const int64_t n = a.shape.samples * a.shape.size;
  const Operand* to[4] = {&a.dx, &a.deps, &a.dv, &a.dnoise};
  const bool stream = traffic({&a.x, &a.eps, &a.v, &a.noise, &a.g, to[0], to[1], to[2], to[3]}, n) > cache_bytes();
  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T buffer[5][kBlock], result[4][kBlock];
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      const T* g = load(loops, a.g, b.begin, b.n, buffer[4]);
      const T* x = load(loops, a.x, b.begin, b.n, buffer[0]);
      const T* eps = load(loops, a.eps, b.begin, b.n, buffer[1]);
      const T* v = a.v ? load(loops, a.v, b.begin, b.n, buffer[2]) : x;
      const T* noise = load(loops, a.noise, b.begin, b.n, buffer[3]);
      loops.ancestral_pull(result[0], result[1], result[2], result[3], g, x, eps, v, noise,
                           numbers<T>(a, b.row), b.n);
      for (int k = 0; k < 4; ++k)
        if (*to[k]) store(loops, *to[k], b.begin, b.n, result[k], stream);
    }
    if (stream) fence();
  });
}

}  // namespace

void ancestral(const AncestralStep& a) { a.shape.wide ? forward<double>(a) : forward<float>(a); }
void ancestral_pull(const AncestralStep& a) { a.shape.wide ? backward<double>(a) : backward<float>(a); }

}  // namespace gs
