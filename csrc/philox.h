// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011) as gradsampler/noise/philox.py defines its use, host and device.
#pragma once
#include <stdint.h>

#include "contract.h"
#include "portable.h"

namespace gs {

enum : uint32_t {
  kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u
};

struct Words {
  uint32_t w[4];
};

GS_FN Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  GS_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The normals of elements 4*block .. 4*block+3 come from this block.
GS_FN Words normal_words(uint64_t block, uint32_t step, uint64_t seed) {
  return philox4x32(uint32_t(block), uint32_t(block >> 32), step, kNormals, seed);
}

// The signs of elements 128*block .. 128*block+127 of one sample; a set bit means -1.
GS_FN Words sign_words(uint32_t block, uint32_t sample, uint32_t step, uint64_t seed) {
  return philox4x32(block, sample, step, kSigns, seed);
}

// Half of a Box-Muller pair each: the float32 roundings here are part of the definition.
GS_FN float open_uniform(uint32_t word) { return float(word) * 0x1p-32f + 0x1p-33f; }
GS_FN float uniform(uint32_t word) { return float(word) * 0x1p-32f; }

}  // namespace gs
