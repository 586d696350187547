// SPDX-License-Identifier: Apache-2.0
// gradsampler._C: facts about the build, and the choice of instruction set for tests.
// This file does without the stable ABI: pybind11's headers of torch 2.11 are empty under it.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/blocks.h"

#if defined(__clang__)
#define GS_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define GS_COMPILER "gcc " __VERSION__
#else
#define GS_COMPILER "unknown"
#endif
#ifndef GS_CUDA_ARCHS
#define GS_CUDA_ARCHS ""
#endif
#ifndef GS_BUILD_TORCH
#define GS_BUILD_TORCH "unknown"
#endif

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int k = 0; k < gs::isa_count(); ++k) names.emplace_back(gs::isa_name(k));
  return names;
}

std::map<std::string, std::string> facts() {
  uint32_t threads = 0;
  torch_get_num_threads(&threads);
  return {{"compiler", GS_COMPILER},
          {"torch", GS_BUILD_TORCH},
          {"isa", gs::isa().name},
          {"threads", std::to_string(threads)},
          {"cache_bytes", std::to_string(gs::cache_bytes())},
          {"cuda_archs", GS_CUDA_ARCHS}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of gradsampler; the ops are in torch.ops.gradsampler_native.";
  m.def("facts", &facts, "What was built, and what this machine runs.");
  m.def("isas", &isas, "Names of the instruction sets that this machine runs, best first.");
  m.def(
      "use_isa",
      [](const std::string& name) {
        if (!gs::use_isa(name.c_str())) throw std::invalid_argument("isa must be one of _C.isas(), got " + name);
      },
      "Forces the loops of one instruction set, for tests.");
  m.def(
      "set_cache_bytes", [](int64_t bytes) { gs::cache_bytes() = bytes; },
      "Results of calls that touch more than this go around the cache.");
}
