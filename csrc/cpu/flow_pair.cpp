// SPDX-License-Identifier: Apache-2.0
#include "blocks.h"
#include "noise.h"

namespace gs {
namespace {

// x1 of one block: the caller's, or float32 normals rounded to x0's dtype, as a tensor would hold.
template <class T>
const T* x1_block(const FlowPair& a, const Loops<T>& loops, const Block& b, T* buffer) {
  if (a.x1) return load(loops, a.x1, b.begin, b.n, buffer);
  alignas(64) float normal[kBlock];
  alignas(64) char stored[kBlock * 8];
  const Loops<float>& narrow = gs::loops<float>();
  narrow.normals(normal, b.begin, 0, a.seed, 1.0f, false, b.n);
  narrow.write(stored, a.x0.dtype, 1, normal, b.n, false);
  loops.read(buffer, stored, a.x0.dtype, 1, b.n);
  return buffer;
}

template <class T>
void forward(const FlowPair& a) {
  const Loops<T>& loops = gs::loops<T>();
  const Blocks blocks(a.shape.samples, a.shape.size);
  const int64_t n = a.shape.samples * a.shape.size;
  const bool stream = traffic({&a.x0, &a.x1, &a.x_t, &a.velocity, &a.x1_out}, n) > cache_bytes();
  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T x0_buffer[kBlock], x1_buffer[kBlock], x_t[kBlock], velocity[kBlock];
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      const T* x0 = load(loops, a.x0, b.begin, b.n, x0_buffer);
      const T* x1 = x1_block(a, loops, b, x1_buffer);
      loops.flow(x_t, velocity, x0, x1, make_flow<T>(a.t[b.row], a.sigma_min), b.n);
      store(loops, a.x_t, b.begin, b.n, x_t, stream);
      store(loops, a.velocity, b.begin, b.n, velocity, stream);
      if (a.x1_out) store(loops, a.x1_out, b.begin, b.n, x1, stream);
    }
    if (stream) fence();
  });
}

template <class T>
void backward(const FlowPair& a) {
  const Loops<T>& loops = gs::loops<T>();
  const Blocks blocks(a.shape.samples, a.shape.size);
  const int64_t n = a.shape.samples * a.shape.size;
  const bool stream = traffic({&a.x0, &a.x1, &a.gx, &a.gv, &a.dx0, &a.dx1}, n) > cache_bytes();
  std::vector<double> partial(a.dt ? blocks.count() : 0);
  for_blocks(blocks, [&](int64_t first, int64_t last) {
    alignas(64) T buffer[4][kBlock], dx0[kBlock], dx1[kBlock];
    for (int64_t index = first; index < last; ++index) {
      const Block b = block_of(blocks, index);
      const Flow<T> f = make_flow<T>(a.t[b.row], a.sigma_min);
      if (!a.gx) std::fill(buffer[0], buffer[0] + b.n, T(0));
      if (!a.gv) std::fill(buffer[1], buffer[1] + b.n, T(0));
      const T* gx = a.gx ? load(loops, a.gx, b.begin, b.n, buffer[0]) : buffer[0];
      const T* gv = a.gv ? load(loops, a.gv, b.begin, b.n, buffer[1]) : buffer[1];
      if (a.dx0 || a.dx1) loops.flow_pull(dx0, dx1, gx, gv, f, b.n);
      if (a.dx0) store(loops, a.dx0, b.begin, b.n, dx0, stream);
      if (a.dx1) store(loops, a.dx1, b.begin, b.n, dx1, stream);
      if (a.dt) {
        const T* x0 = load(loops, a.x0, b.begin, b.n, buffer[2]);
        const T* x1 = x1_block(a, loops, b, buffer[3]);
        loops.flow(dx0, dx1, x0, x1, f, b.n);  // dx1 now holds the velocity, d x_t / d t
        partial[index] = loops.dot(dx1, gx, b.n);
      }
    }
    if (stream) fence();
  });
  for (size_t index = 0; index < partial.size(); ++index)
    (*a.dt)[block_of(blocks, int64_t(index)).row] += partial[index];
}

}  // namespace

void flow_pair(const FlowPair& a) { a.shape.wide ? forward<double>(a) : forward<float>(a); }
void flow_pair_pull(const FlowPair& a) { a.shape.wide ? backward<double>(a) : backward<float>(a); }

}  // namespace gs
