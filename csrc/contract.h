// SPDX-License-Identifier: Apache-2.0
// What every backend must agree on, as gradsampler/contract.py has it; tests/test_contract.py holds
// the two together. Host and device.
#pragma once
#include <stdint.h>

namespace gs {

constexpr int kMaxTerms = 12;  // of a step; of an adjoint step with the model's gradient counted in

// f of an injection n = normal * N(normal_seed, step) + weight * f(source).
enum Kind : int { kOff, kSinCos, kSignedRoll, kGiven };

// Where the integers and the floats of an injection lie in an op's lists, and how many there are.
enum Word : int { kKind, kStep, kSeed, kOffset, kNormalSeed, kWords };
enum Number : int { kWeight, kGain, kRate, kAmplitude, kPhase, kNormal, kNumbers };

// The last word of a Philox counter.
enum Use : uint32_t { kNormals, kSigns, kOffsets };

// The coefficients of an ancestral step.
enum Coefficient : int { kR1, kR2, kC1, kC2, kLogMax, kLogMin, kAncestral };

}  // namespace gs
