// SPDX-License-Identifier: Apache-2.0
// From the stable ABI's tensors to operands, with errors that name argument, expected and got.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/ops.h"

namespace gs {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;

// The name is only put together where a check fails.
struct Name {
  const char* op;
  const char* argument;
  int64_t index = -1;

  std::string text() const {
    std::string name = std::string(op) + ": " + argument;
    return index < 0 ? name : name + "[" + std::to_string(index) + "]";
  }
};

inline const char* source_name(int64_t kind) { return kind == kGiven ? "draw.given" : "z0"; }

inline std::string shape_text(const int64_t* sizes, int64_t dims) {
  std::string text = "[";
  for (int64_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

// An injection as the schemas have it; the lists are empty where there is none.
struct Injected {
  const Maybe& source;  // z0, or the given tensor
  double amount;
  const Maybe& amount_tensor;
  const Ints& words;
  const Floats& numbers;
};

// What all tensors of one call must agree in.
struct Like {
  const int64_t* sizes;
  int64_t dims, numel;
  int32_t device_type, device_index;

  explicit Like(const Tensor& x) {
    int64_t* found;
    aoti_torch_get_sizes(x.get(), &found);
    sizes = found;
    dims = x.dim();
    numel = x.numel();
    aoti_torch_get_device_type(x.get(), &device_type);
    aoti_torch_get_device_index(x.get(), &device_index);
  }

  int64_t samples() const { return dims ? sizes[0] : 1; }
  Shape shape(bool wide) const { return {samples(), samples() ? numel / samples() : 0, wide}; }
};

inline int dtype_of(const Tensor& x, const Name& name) {
  int32_t dtype = 0;
  aoti_torch_get_dtype(x.get(), &dtype);
  if (dtype == aoti_torch_dtype_float32()) return kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return kFloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float64(), name.text(),
                  " must have dtype float64, float32, bfloat16 or float16, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return kFloat64;
}

inline void check_device(const Tensor& x, const Like& like, const Name& name) {
  int32_t type, index;
  aoti_torch_get_device_type(x.get(), &type);
  aoti_torch_get_device_index(x.get(), &index);
  STD_TORCH_CHECK(type == like.device_type && index == like.device_index, name.text(),
                  " must be on device type ", like.device_type, " index ", like.device_index,
                  ", got type ", type, " index ", index);
}

// A tensor of a known dtype.
inline Operand laid_out(const Tensor& x, int dtype, const Like& like, const Name& name) {
  int64_t *sizes, *strides;
  void* data;
  aoti_torch_get_sizes(x.get(), &sizes);
  aoti_torch_get_strides(x.get(), &strides);
  aoti_torch_get_data_ptr(x.get(), &data);
  STD_TORCH_CHECK(x.dim() == like.dims && std::equal(sizes, sizes + like.dims, like.sizes), name.text(),
                  " must have shape ", shape_text(like.sizes, like.dims), ", got ",
                  shape_text(sizes, x.dim()));
  check_device(x, like, name);
  Operand result;
  result.data = static_cast<char*>(data);
  result.dtype = dtype;
  STD_TORCH_CHECK(set_shape(result, sizes, strides, int(like.dims)), name.text(),
                  " must have at most ", kMaxDims, " axes that cannot be merged, got shape ",
                  shape_text(sizes, like.dims), "; make it contiguous");
  return result;
}

inline Operand operand(const Tensor& x, const Like& like, const Name& name) {
  return laid_out(x, dtype_of(x, name), like, name);
}

inline Operand operand(const Maybe& x, const Like& like, const Name& name) {
  return x ? operand(*x, like, name) : Operand();
}

// An output must own each of its elements.
inline Operand owning(const Operand& result, const Like& like, const Name& name) {
  for (int d = 0; d < result.dims; ++d)
    STD_TORCH_CHECK(result.stride[d] != 0 || result.size[d] == 1, name.text(),
                    " must have no stride of 0, got an expanded tensor of shape ",
                    shape_text(like.sizes, like.dims));
  return result;
}

inline Operand output(const Tensor& x, const Like& like, const Name& name) {
  return owning(operand(x, like, name), like, name);
}

// Integers that are changed, under the dtype of the float of their width.
inline Operand integers(const Tensor& x, const Like& like, const Name& name) {
  int32_t dtype = 0;
  aoti_torch_get_dtype(x.get(), &dtype);
  const bool narrow = dtype == aoti_torch_dtype_int32();
  STD_TORCH_CHECK(narrow || dtype == aoti_torch_dtype_int64(), name.text(),
                  " must have dtype int32 or int64, got ", torch::headeronly::toString(x.scalar_type()));
  return owning(laid_out(x, narrow ? kFloat32 : kFloat64, like, name), like, name);
}

// The flag of a leap: one int32 on the same device.
inline int32_t* flag(const Tensor& x, const Like& like, const Name& name) {
  int32_t dtype = 0;
  aoti_torch_get_dtype(x.get(), &dtype);
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_int32() && x.numel() == 1, name.text(),
                  " must hold 1 element of dtype int32, got ", x.numel(), " of dtype ",
                  torch::headeronly::toString(x.scalar_type()));
  check_device(x, like, name);
  return static_cast<int32_t*>(x.data_ptr());
}

inline Operand output(const Maybe& x, const Like& like, const Name& name) {
  return x ? output(*x, like, name) : Operand();
}

// Checks what does not depend on the device; false for no noise at all.
inline bool injects(const char* op, const Injected& in, const Like& like) {
  const Ints& w = in.words;
  if (w.empty() && in.numbers.empty()) return false;
  STD_TORCH_CHECK(w.size() == kWords && in.numbers.size() == kNumbers, op, ": words and numbers must hold ",
                  int(kWords), " and ", int(kNumbers), " numbers, got ", w.size(), " and ", in.numbers.size());
  STD_TORCH_CHECK(w[kKind] >= kOff && w[kKind] <= kGiven, op, ": draw.kind must be ", int(kOff), " to ", int(kGiven),
                  ", got ", w[kKind]);
  STD_TORCH_CHECK(w[kKind] == kOff || in.source, op, ": ", source_name(w[kKind]), " must be a tensor for noise kind ",
                  w[kKind], ", got None");
  if (w[kKind] == kSignedRoll && like.numel) {
    const int64_t size = like.numel / like.samples();
    STD_TORCH_CHECK(w[kOffset] >= 0 && w[kOffset] < size, op, ": draw.offset must be in 0 to ", size - 1, ", got ",
                    w[kOffset]);
    STD_TORCH_CHECK(like.samples() <= int64_t(1) << 32, op, ": z0 must hold at most 2**32 samples, got ",
                    like.samples());
  }
  STD_TORCH_CHECK(!in.amount_tensor || in.amount_tensor->numel() == 1, op, ": noise_coef must hold 1 numbers, got ",
                  in.amount_tensor ? in.amount_tensor->numel() : 0);
  return true;
}

inline bool wide(std::initializer_list<const Operand*> list) {
  for (const Operand* x : list)
    if (*x && x->dtype == kFloat64) return true;
  return false;
}

// A small float32 or float64 tensor on the CPU as doubles.
inline Floats values_of(const Tensor& x, const Name& name) {
  const int dtype = dtype_of(x, name);
  const Like like(x);
  const Operand from = operand(x, like, name);
  Floats to(size_t(like.numel));
  if (like.numel == 0) return to;
  alignas(64) double buffer[kBlock];
  for (int64_t i = 0; i < like.numel; i += kBlock) {
    const int64_t n = std::min(kBlock, like.numel - i);
    const double* part = load(loops<double>(), from, i, n, buffer);
    std::copy(part, part + n, to.begin() + i);
  }
  (void)dtype;
  return to;
}

inline void put_values(const Tensor& x, const Floats& from, const Name& name) {
  const Like like(x);
  STD_TORCH_CHECK(like.numel == int64_t(from.size()), name.text(), " must hold ", from.size(),
                  " elements, got ", like.numel);
  const Operand to = output(x, like, name);
  for (int64_t i = 0; i < like.numel; i += kBlock)
    store(loops<double>(), to, i, std::min(kBlock, like.numel - i), from.data() + i, false);
}

}  // namespace gs
