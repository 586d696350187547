// SPDX-License-Identifier: Apache-2.0
// The CPU ops under ThreadSanitizer, with threads of its own in place of torch's: `make sanitize`
// compiles this with csrc/cpu and no torch library. Each op must write the same bits from one thread
// and from several, also while a second caller runs it on the same inputs.
#include <cstdio>
#include <functional>
#include <random>
#include <thread>

#include "../cpu/blocks.h"
#include "../cpu/ops.h"

namespace {
thread_local int threads = 4;
}

// torch's contract: ranges of at least `grain`, each handed out once.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body,
                                             void* context) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, (end - begin) / grain));
  const int64_t each = (end - begin + parts - 1) / parts;
  std::vector<std::thread> workers;
  for (int64_t first = begin; first < end; first += each)
    workers.emplace_back(body, first, std::min(first + each, end), context);
  for (std::thread& worker : workers) worker.join();
  return 0;
}

namespace gs {
namespace {

// Odd, so that the blocks of a sample start at any address and its neighbour's words are near.
constexpr int64_t kSamples = 3, kSize = 20'479;
using Bytes = std::vector<char>;

struct Buffers {
  std::vector<Bytes> all;

  Operand add(int dtype, bool filled) {
    Bytes& bytes = all.emplace_back(kSamples * kSize * bytes_of(dtype));
    if (filled) {
      static std::mt19937 random(0);
      std::normal_distribution<float> normal;
      for (int64_t i = 0; i < kSamples * kSize; ++i) {
        const float value = normal(random);
        loops<float>().write(bytes.data() + i * bytes_of(dtype), dtype, 1, &value, 1, false);
      }
    }
    Operand x;
    x.data = bytes.data();
    x.dtype = dtype;
    x.size[0] = kSamples * kSize;
    return x;
  }
};

struct Case {
  int dtype;
  Buffers in;
  Operand x, d, z0, g;
  std::vector<double> row = {1.3, 0.9, 0.6, 0.35, -1.0, -3.5, 1.0};

  explicit Case(int dtype_) : dtype(dtype_) {
    in.all.reserve(4);
    for (Operand* each : {&x, &d, &z0, &g}) *each = in.add(dtype, true);
  }
  Shape shape() const { return {kSamples, kSize, dtype == kFloat64}; }
  Noise noise(int kind, double normal) const {
    Noise n;
    n.kind = kind, n.step = 5, n.offset = kSize / 3, n.seed = 3, n.normal_seed = 7, n.normal = normal;
    n.gain = n.rate = n.amplitude = 0.1, n.coef = 0.7;
    if (kind != kOff) n.source = z0;
    return n;
  }

  // Everything the ops write, from inputs that all callers share.
  std::vector<Bytes> run() const {
    Buffers out;
    out.all.reserve(64);
    auto fresh = [&] { return out.add(dtype, false); };
    const double coefs[] = {0.3, -1.2};
    std::vector<double> sums(2 + kSamples);
    for (int kind : {kOff, kSinCos, kSignedRoll, kGiven})
      for (double normal : {0.0, 0.6}) {
        Step a{shape(), {x, d}, {coefs, false}, noise(kind, normal)};
        a.out = fresh();
        step(a);
        StepPull p{a, g, {fresh(), fresh()}, fresh()};
        std::vector<double> dcoefs(2);
        p.dcoefs = &dcoefs, p.dnoise = &sums[0];
        p.forward.clamped = true, p.forward.lo = -1, p.forward.hi = 1;
        step_pull(p);
        sums[1] += dcoefs[0] + dcoefs[1];
        adjoint({shape(), {x, d, g}, {0.3, 0.4, 0.5}, {0.1, 0.2, 0.3}, a.noise, fresh(), fresh(), fresh()});
      }
    AncestralStep s{shape(), x, d, z0, g, fresh(), g, fresh(), fresh(), fresh(), fresh(),
                    {row.data(), false}, -1, 1};
    ancestral(s);
    ancestral_pull(s);
    FlowPair f{shape(), x, Operand(), {0.1, 0.5, 0.9}, 1e-5, 4, fresh(), fresh(), fresh(), g, d, fresh(), fresh()};
    std::vector<double> dt(kSamples);
    f.dt = &dt;
    flow_pair(f);
    flow_pair_pull(f);
    std::copy(dt.begin(), dt.end(), sums.begin() + 2);
    out.all.emplace_back((char*)sums.data(), (char*)(sums.data() + sums.size()));
    return out.all;
  }
};

int check(int dtype) {
  const Case inputs(dtype);
  threads = 1;
  const std::vector<Bytes> expected = inputs.run();
  threads = 4;
  int wrong = inputs.run() != expected;
  std::vector<Bytes> found[2];
  std::thread other([&] { found[1] = inputs.run(); });
  found[0] = inputs.run();
  other.join();
  for (const auto& each : found) wrong += each != expected;
  return wrong;
}

}  // namespace
}  // namespace gs

int main() {
  int wrong = 0;
  for (int k = 0; k < gs::isa_count(); ++k) {
    gs::use_isa(gs::isa_name(k));
    for (int64_t cache : {int64_t(1) << 40, int64_t(0)}) {  // results through the cache, and around it
      gs::cache_bytes() = cache;
      for (int dtype : {gs::kFloat64, gs::kFloat32, gs::kBFloat16, gs::kFloat16}) wrong += gs::check(dtype);
    }
    std::printf("%s: %d runs differ\n", gs::isa_name(k), wrong);
  }
  return wrong != 0;
}
