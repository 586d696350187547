// SPDX-License-Identifier: Apache-2.0
// One block of the injected noise, and of its transpose's needs.
#pragma once
#include "ops.h"

namespace gs {

template <class T>
struct NoiseBlocks {
  const Noise& noise;
  const Loops<T>& loops;
  int64_t size;  // elements of a sample, for the roll
  Wave<T> wave;

  NoiseBlocks(const Noise& noise_, const Loops<T>& loops_, int64_t size_)
      : noise(noise_), loops(loops_), size(size_),
        wave(make_wave<T>(noise_.weight, noise_.gain, noise_.rate, noise_.amplitude, noise_.phase)) {}

  // n of elements from .. from+count-1 of a sample whose flat index starts at base.
  void value(int64_t sample, int64_t base, int64_t from, int64_t count, T* out, T* buffer) const {
    bool filled = true;
    if (noise.kind == kSinCos) {
      loops.wave(out, load(loops, noise.source, base + from, count, buffer), wave, count);
    } else if (noise.kind == kSignedRoll) {
      const T* z = load_rolled(loops, noise.source, base, size, from + size - noise.offset, count, buffer);
      loops.signs(out, z, from, uint32_t(sample), uint32_t(noise.step), noise.seed, T(noise.weight),
                  false, count);
    } else if (noise.kind == kGiven) {
      loops.scale(out, load(loops, noise.source, base + from, count, buffer), T(noise.weight), count);
    } else {
      filled = false;
    }
    if (noise.normal != 0)
      loops.normals(out, base + from, uint32_t(noise.step), noise.normal_seed, T(noise.normal), filled,
                    count);
    else if (!filled)
      std::fill(out, out + count, T(0));
  }

  // d += coef * f'(z0)^T g where element i of f reads element i of its source.
  void pull(T* d, const T* z, const T* g, int64_t count) const {
    if (noise.kind == kSinCos)
      loops.wave_pull(d, z, g, wave, T(noise.coef), count);
    else
      loops.add_scaled(d, g, T(noise.coef * noise.weight), count);
  }

  // The same for sincos where d, z0 and g are all bfloat16, else false.
  bool pull_bf16(const Operand& d, const Operand& g, int64_t begin, int64_t count) const {
    if (sizeof(T) == 8 || noise.kind != kSinCos) return false;
    char* to = in_place(d, begin, count, kBFloat16);
    const char* from = to ? in_place(g, begin, count, kBFloat16) : nullptr;
    const char* z = from ? in_place(noise.source, begin, count, kBFloat16) : nullptr;
    if (z) loops.wave_pull_bf16(to, z, from, wave, T(noise.coef), count);
    return z != nullptr;
  }

  // The same for the signed roll: g is given at the indices (from + offset) mod size.
  void pull_rolled(T* d, const T* g, int64_t sample, int64_t from, int64_t count) const {
    int64_t at = (from + noise.offset) % size;
    for (int64_t done = 0; done < count; at = 0) {
      const int64_t part = std::min(count - done, size - at);
      loops.signs(d + done, g + done, at, uint32_t(sample), uint32_t(noise.step), noise.seed,
                  T(noise.coef * noise.weight), true, part);
      done += part;
    }
  }
};

// Samples matter to the roll and to coefficients per sample; all else is one row of everything.
inline bool by_sample(const Noise& noise) { return noise.kind == kSignedRoll; }

inline int64_t traffic(std::initializer_list<const Operand*> list, int64_t elements) {
  int64_t bytes = 0;
  for (const Operand* x : list)
    if (*x) bytes += elements * bytes_of(x->dtype);
  return bytes;
}

}  // namespace gs
