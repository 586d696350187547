// SPDX-License-Identifier: Apache-2.0
#include "blocks.h"
#include "noise.h"

namespace gs {
namespace {

template <class T>
void adjoint_blocks(const Adjoint& a) {
  const Loops<T>& loops = gs::loops<T>();
  const int64_t n = a.shape.samples * a.shape.size;
  const Blocks blocks = by_sample(a.noise) ? Blocks(a.shape.samples, a.shape.size) : Blocks(1, n);
  const NoiseBlocks<T> noise(a.noise, loops, blocks.size);
  const int slots = int(a.lams.size());
  const bool pulls = a.dz0 && a.noise.coef != 0 && a.noise.kind != kOff;
  T ca[kMaxTerms + 1], cb[kMaxTerms + 1];
  for (int k = 0; k < slots; ++k) ca[k] = T(a.a[k]);
  for (size_t k = 0; k < a.b.size(); ++k) cb[k] = T(a.b[k]);
  int64_t bytes = traffic({&a.lam, &a.mu, &a.dz0, &a.noise.source}, n);
  for (const Operand& x : a.lams) bytes += traffic({&x}, n);
  const bool stream = bytes > cache_bytes();

  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T buffer[kMaxTerms][kBlock], lam_buffer[kBlock], mu[kBlock], z_buffer[kBlock];
    const void* x[kMaxTerms];
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      for (int k = 0; k < slots; ++k) x[k] = load(loops, a.lams[k], b.begin, b.n, buffer[k]);
      T* lam = lam_buffer;
      loops.combine(lam, x, ca, slots, nullptr, T(0), b.n);
      if (a.mu) {
        // b's terms but g's, whose place holds no coefficient
        const int own = int(a.b.size()) - 1;
        if (own == 0)
          loops.scale(mu, lam, cb[0], b.n);
        else
          loops.combine(mu, x, cb, own, lam, cb[own], b.n);
        store(loops, a.mu, b.begin, b.n, mu, stream);
      }
      if (a.lam) store(loops, a.lam, b.begin, b.n, lam, stream);
      if (!pulls) continue;
      T* now = accumulator(loops, a.dz0, b.begin, b.n, mu);
      if (a.noise.kind == kSignedRoll) {
        for (int k = 0; k < slots; ++k)
          x[k] = load_rolled(loops, a.lams[k], b.begin - b.from, blocks.size, b.from + a.noise.offset,
                             b.n, buffer[k]);
        loops.combine(lam, x, ca, slots, nullptr, T(0), b.n);
        noise.pull_rolled(now, lam, b.row, b.from, b.n);
      } else {
        const T* z = a.noise.kind == kSinCos ? load(loops, a.noise.source, b.begin, b.n, z_buffer) : lam;
        noise.pull(now, z, lam, b.n);
      }
      if (now == mu) store(loops, a.dz0, b.begin, b.n, mu, false);
    }
    if (stream) fence();
  });
}

}  // namespace

void adjoint(const Adjoint& a) { a.shape.wide ? adjoint_blocks<double>(a) : adjoint_blocks<float>(a); }

}  // namespace gs
