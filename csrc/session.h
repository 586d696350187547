// SPDX-License-Identifier: Apache-2.0
// One call on CUDA tensors: their checks, copies, workspace, device and stream.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "cuda/launch.h"
#include "tensors.h"

namespace gs {
using cuda::Slot;

// Kernels read and write contiguous memory: others go through a copy, outputs there and back.
struct Session {
  const char* op;
  Like like;
  torch::stable::accelerator::DeviceGuard guard;
  std::vector<Tensor> kept;
  std::vector<std::pair<Tensor, Tensor>> to_copy;
  bool wide = false;

  Session(const char* op_, const Tensor& x) : op(op_), like(x), guard(like.device_index) {}

  Slot plain(const Tensor& x, int dtype) {
    kept.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
    Slot slot;
    slot.data = kept.back().data_ptr();
    slot.dtype = dtype;
    return slot;
  }
  Slot input(const Tensor& x, const char* name, int64_t index = -1) {
    const Operand checked = operand(x, like, {op, name, index});
    wide |= checked.dtype == kFloat64;
    return plain(x, checked.dtype);
  }
  Slot input(const Maybe& x, const char* name) { return x ? input(*x, name) : Slot(); }
  Slot result(const Tensor& x, const char* name, bool widens = false, int64_t index = -1) {
    const Operand checked = output(x, like, {op, name, index});
    wide |= widens && checked.dtype == kFloat64;
    const Slot slot = plain(x, checked.dtype);
    if (!x.is_contiguous()) to_copy.emplace_back(x, kept.back());
    return slot;
  }
  Slot result(const Maybe& x, const char* name, bool widens = false) {
    return x ? result(*x, name, widens) : Slot();
  }
  // Contiguous within each sample at least: where that holds, no copy.
  bool by_samples(const Maybe& x, const char* name, Slot& slot, int64_t& stride) const {
    const int64_t size = like.samples() ? like.numel / like.samples() : 0;
    stride = size;
    if (!x) return true;
    const Operand found = operand(*x, like, {op, name});
    if (found.dims != 2 || found.stride[1] != 1 || found.size[1] != size || found.stride[0] < size) return false;
    slot.data = x->data_ptr();
    slot.dtype = found.dtype;
    stride = found.stride[0];
    return true;
  }
  Slot half_input(const Maybe& x, const char* name, int64_t& stride) {
    Slot slot;
    if (!by_samples(x, name, slot, stride)) return input(x, name);
    wide |= x && slot.dtype == kFloat64;
    return slot;
  }
  Slot half_result(const Maybe& x, const char* name, int64_t& stride) {
    Slot slot;
    return by_samples(x, name, slot, stride) ? slot : result(x, name);
  }
  // Integers that are changed; true if they are 64 bits wide.
  bool integral(const Tensor& x, const char* name, void*& data) {
    const Operand checked = integers(x, like, {op, name});
    data = plain(x, checked.dtype).data;
    if (!x.is_contiguous()) to_copy.emplace_back(x, kept.back());
    return checked.dtype == kFloat64;
  }
  // A small tensor of numbers that the kernel reads itself.
  Slot numbers(const Tensor& x, const char* name) {
    check_device(x, like, {op, name});
    return plain(x, dtype_of(x, {op, name}));
  }
  double* workspace(int64_t count) {
    kept.push_back(torch::stable::new_empty(kept.front(), std::vector<int64_t>{count},
                                            torch::headeronly::ScalarType::Double));
    return static_cast<double*>(kept.back().data_ptr());
  }
  void* stream() const {
    void* found = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.device_index, &found));
    return found;
  }
  void finish(int error) {
    STD_TORCH_CHECK(error == 0, op, ": the CUDA launch failed with error ", error);
    for (auto& [to, from] : to_copy) torch::stable::copy_(to, from);
  }
  cuda::Rows rows(bool by_sample) const {
    if (!by_sample) return {1, like.numel};
    return {like.samples(), like.samples() ? like.numel / like.samples() : 0};
  }
};

inline cuda::DeviceNoise noise_of(Session& s, const Injected& in) {
  cuda::DeviceNoise n;
  if (!injects(s.op, in, s.like)) return n;
  const Ints& w = in.words;
  const Floats& x = in.numbers;
  n.kind = int(w[kKind]), n.step = uint32_t(w[kStep]), n.offset = w[kOffset];
  n.seed = uint64_t(w[kSeed]), n.normal_seed = uint64_t(w[kNormalSeed]);
  n.weight = x[kWeight], n.normal = x[kNormal], n.coef = in.amount;
  n.wave = make_wave<double>(x[kWeight], x[kGain], x[kRate], x[kAmplitude], x[kPhase]);
  if (n.kind != kOff) n.source = s.input(*in.source, source_name(n.kind));
  if (in.amount_tensor) {
    const Slot at = s.numbers(*in.amount_tensor, "noise_coef");
    n.coef_at = at.data;
    n.coef_dtype = at.dtype;
  }
  return n;
}

inline cuda::DeviceCoefs coefs_of(Session& s, const Floats& numbers, const Maybe& tensor, int64_t terms) {
  cuda::DeviceCoefs c;
  if (!tensor) {
    STD_TORCH_CHECK(int64_t(numbers.size()) == terms, s.op, ": coefs must hold ", terms, " numbers, got ",
                    numbers.size());
    std::copy(numbers.begin(), numbers.end(), c.values);
    return c;
  }
  const auto got = tensor->sizes();
  const bool per_sample = got.size() == 2;
  STD_TORCH_CHECK((per_sample || got.size() == 1) && got[got.size() - 1] == terms &&
                      (!per_sample || got[0] == s.like.samples()),
                  s.op, ": coefs must have shape [", terms, "] or [", s.like.samples(), ", ", terms, "], got ",
                  shape_text(got.data(), int64_t(got.size())));
  const Slot at = s.numbers(*tensor, "coefs");
  c.at = at.data;
  c.dtype = at.dtype;
  c.stride = per_sample ? terms : 0;
  return c;
}

inline void clamp_of(const Session& s, const Floats& clamp, double& lo, double& hi) {
  STD_TORCH_CHECK(clamp.empty() || clamp.size() == 2, s.op, ": clamp must hold 2 numbers, got ", clamp.size());
  if (clamp.size() == 2) lo = clamp[0], hi = clamp[1];
}

}  // namespace gs
