// SPDX-License-Identifier: Apache-2.0
// A tensor as the loops see it: a flat index over its shape, any strides, any floating dtype.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "isa.h"

namespace gs {

constexpr int kMaxDims = 16;

inline int64_t bytes_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

struct Operand {
  char* data = nullptr;
  int dtype = kFloat32;
  int dims = 1;  // merged as far as the strides allow; a contiguous tensor has one
  int64_t size[kMaxDims] = {0};
  int64_t stride[kMaxDims] = {1};

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t element) const { return data + element * bytes_of(dtype); }

  // body(done, address, count, stride) for every run along the innermost axis in the elements
  // begin .. begin+n-1. Steps to the next run without a division, for runs may be short.
  template <class F>
  void for_runs(int64_t begin, int64_t n, const F& body) const {
    const int inner = dims - 1;
    const int64_t run = size[inner], step = stride[inner];
    int64_t row = begin / run, from = begin % run, offset = 0, index[kMaxDims];
    for (int d = inner - 1; d >= 0; row /= size[d--]) offset += (index[d] = row % size[d]) * stride[d];
    for (int64_t done = 0; done < n; from = 0) {
      const int64_t count = std::min(n - done, run - from);
      body(done, at(offset + from * step), count, step);
      done += count;
      for (int d = inner - 1; d >= 0; --d) {
        offset += stride[d];
        if (++index[d] < size[d]) break;
        offset -= size[d] * stride[d];
        index[d] = 0;
      }
    }
  }
};

// Merges axes; false if more than kMaxDims remain.
inline bool set_shape(Operand& x, const int64_t* sizes, const int64_t* strides, int dims) {
  x.dims = 0;
  for (int d = 0; d < dims; ++d) {
    if (sizes[d] == 1) continue;
    const int last = x.dims - 1;
    if (last >= 0 && x.stride[last] == strides[d] * sizes[d]) {
      x.size[last] *= sizes[d];
      x.stride[last] = strides[d];
    } else {
      if (x.dims == kMaxDims) return false;
      x.size[x.dims] = sizes[d];
      x.stride[x.dims++] = strides[d];
    }
  }
  if (x.dims == 0) x.dims = 1, x.size[0] = 1, x.stride[0] = 1;
  return true;
}

template <class T>
constexpr int compute_dtype() { return sizeof(T) == 8 ? kFloat64 : kFloat32; }

// Where elements begin .. begin+n-1 lie side by side as `dtype`, else nullptr.
inline char* in_place(const Operand& x, int64_t begin, int64_t n, int dtype) {
  const int inner = x.dims - 1;
  if (x.stride[inner] != 1 || x.dtype != dtype || begin % x.size[inner] + n > x.size[inner]) return nullptr;
  char* found = nullptr;
  x.for_runs(begin, n, [&](int64_t, char* from, int64_t, int64_t) { found = from; });
  return found;
}

// Where a block of results can be computed in place, else nullptr.
template <class T>
T* target(const Operand& x, int64_t begin, int64_t n) {
  return reinterpret_cast<T*>(in_place(x, begin, n, compute_dtype<T>()));
}

// The elements begin .. begin+n-1 in the compute type: in place where they lie so, else in buffer.
template <class T>
const T* load(const Loops<T>& loops, const Operand& x, int64_t begin, int64_t n, T* buffer) {
  if (const T* direct = target<T>(x, begin, n)) return direct;
  x.for_runs(begin, n, [&](int64_t done, char* from, int64_t count, int64_t stride) {
    loops.read(buffer + done, from, x.dtype, stride, count);
  });
  return buffer;
}

template <class T>
void store(const Loops<T>& loops, const Operand& x, int64_t begin, int64_t n, const T* values,
           bool stream) {
  x.for_runs(begin, n, [&](int64_t done, char* to, int64_t count, int64_t stride) {
    loops.write(to, x.dtype, stride, values + done, count, stream);
  });
}

// The block of a tensor that is added to: in place, or read into buffer and to be stored.
template <class T>
T* accumulator(const Loops<T>& loops, const Operand& x, int64_t begin, int64_t n, T* buffer) {
  T* direct = target<T>(x, begin, n);
  if (!direct) load(loops, x, begin, n, buffer);
  return direct ? direct : buffer;
}

// As load, within one sample of `size` elements at flat index `base`, rolled round its end.
template <class T>
const T* load_rolled(const Loops<T>& loops, const Operand& x, int64_t base, int64_t size,
                     int64_t begin, int64_t n, T* buffer) {
  begin %= size;
  if (begin + n <= size) return load(loops, x, base + begin, n, buffer);
  for (int64_t done = 0; done < n; begin = 0) {
    const int64_t count = std::min(n - done, size - begin);
    const T* part = load(loops, x, base + begin, count, buffer + done);
    if (part != buffer + done) std::copy(part, part + count, buffer + done);
    done += count;
  }
  return buffer;
}

}  // namespace gs
