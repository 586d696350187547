// SPDX-License-Identifier: Apache-2.0
// The fixed partition of the work, and the threads over it.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#include <unistd.h>

#include <stdexcept>

#include "operand.h"

namespace gs {

// rows of `size` elements in blocks that never cross a row. Ops that do not care where a sample
// ends are given one row of everything.
struct Blocks {
  int64_t rows, size, per_row;

  Blocks(int64_t rows_, int64_t size_)
      : rows(rows_), size(size_), per_row(std::max<int64_t>(1, (size_ + kBlock - 1) / kBlock)) {}

  int64_t count() const { return size == 0 ? 0 : rows * per_row; }
  // Enough blocks for a thread to be worth waking: 32 Ki elements.
  int64_t grain() const {
    return std::max<int64_t>(1, 16 * kBlock / std::max<int64_t>(1, std::min(size, kBlock)));
  }
};

struct Block {
  int64_t row, from;   // position within the row
  int64_t begin, n;    // flat index of the first element, and how many
};

inline Block block_of(const Blocks& b, int64_t index) {
  const int64_t row = index / b.per_row, from = (index % b.per_row) * kBlock;
  return {row, from, row * b.size + from, std::min(kBlock, b.size - from)};
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// body(first, last) over ranges of block indices, in parallel where it pays.
template <class F>
void for_blocks(const Blocks& blocks, const F& body) {
  const int64_t count = blocks.count();
  if (count == 0) return;
  if (count <= blocks.grain()) return body(int64_t(0), count);
  auto call = [](int64_t first, int64_t last, void* f) { (*static_cast<const F*>(f))(first, last); };
  if (torch_parallel_for(0, count, blocks.grain(), call, const_cast<F*>(&body)) != 0)
    throw std::runtime_error("gradsampler: the parallel loop failed");
}

// What a process can hope to find cached. Servers and virtual machines report a last level that
// hundreds of others share, so it is bounded.
inline int64_t& cache_bytes() {
  static int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    const int64_t most = int64_t(32) << 20;
    return found > 0 ? std::min(found, most) : most;
  }();
  return bytes;
}

}  // namespace gs
