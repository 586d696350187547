// SPDX-License-Identifier: Apache-2.0
// The loops for the compiler's default instruction set: SSE2 on x86-64, NEON on ARM.
#include "isa.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define GS_LEVEL level_default
#define GS_X86_LEVEL 0
#include "loops.h"

namespace gs {
const Isa isa_default{"default", GS_LEVEL::make_loops<float, GS_LEVEL::Coarse, GS_LEVEL::BFloat16>(),
                  GS_LEVEL::make_loops<double, GS_LEVEL::Plain<double>, GS_LEVEL::Plain<double>>()};
}
