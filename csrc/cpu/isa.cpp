// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>

namespace gs {
namespace {

struct Available {
  const Isa* list[3];
  int count = 0;

  Available() {
#if defined(GS_X86_LEVELS)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) list[count++] = &isa_v4;
    if (v3) list[count++] = &isa_v3;
#endif
    list[count++] = &isa_default;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa& isa() {
  const Isa* now = chosen.load(std::memory_order_relaxed);
  return now ? *now : *available().list[0];
}

int isa_count() { return available().count; }
const char* isa_name(int index) { return available().list[index]->name; }

bool use_isa(const char* name) {
  for (int k = 0; k < available().count; ++k)
    if (strcmp(available().list[k]->name, name) == 0) {
      chosen.store(available().list[k], std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace gs
