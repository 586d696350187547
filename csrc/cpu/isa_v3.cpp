// SPDX-License-Identifier: Apache-2.0
#include "isa.h"
#if defined(GS_X86_LEVELS)
#include <immintrin.h>

// No standard header may follow: its inline functions would be compiled for this level and could
// be the copies that the linker keeps for everyone.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define GS_LEVEL level_v3
#define GS_X86_LEVEL 3
#include "loops.h"

namespace gs {
const Isa isa_v3{"x86-64-v3", GS_LEVEL::make_loops<float, GS_LEVEL::Coarse, GS_LEVEL::BFloat16>(),
                  GS_LEVEL::make_loops<double, GS_LEVEL::Plain<double>, GS_LEVEL::Plain<double>>()};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
