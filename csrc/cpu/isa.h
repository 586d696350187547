// SPDX-License-Identifier: Apache-2.0
// The loops over one block of elements, compiled once for each instruction set and chosen at run
// time. A table of functions rather than target_clones: each set can be forced and tested, and
// neither ifunc nor a loader that resolves it is needed.
#pragma once
#include <stdint.h>

#include <type_traits>

#include "../step_math.h"

namespace gs {

// Elements of one block: the unit of work, of scratch memory and of every partial sum, so that
// results do not depend on the number of threads.
constexpr int64_t kBlock = 1024;

// Of a state in integers I.
template <class T, class I>
struct Integers {
  // change = nearest(change), w += sign * change; false if something was NaN or left the range
  bool (*leap)(I* w, T* change, int sign, int64_t n);
  // x = scale * w
  void (*scaled)(T* x, const I* w, T scale, int64_t n);
};

template <class T>
struct Loops {
  // stride in elements of the tensor; stream stores around the cache
  void (*read)(T* to, const void* from, int dtype, int64_t stride, int64_t n);
  void (*write)(void* to, int dtype, int64_t stride, const T* from, int64_t n, bool stream);
  void (*copy)(void* to, const void* from, int64_t bytes, bool stream);
  // out = sum_k c[k] * x[k] (+ s * noise), and with s * wave(z): in the compute type; the wave only as
  // exact as a result in 16 bits needs; and with terms, z and out all in bfloat16
  using Combine = void(void* out, const void* const* x, const T* c, int terms, const T* noise, T s, int64_t n);
  using CombineWave = void(void* out, const void* const* x, const T* c, int terms, const void* z,
                           const Wave<T>& w, T s, int64_t n);
  Combine* combine;
  CombineWave* combine_wave;
  CombineWave* combine_wave_coarse;
  Combine* combine_bf16;
  CombineWave* combine_wave_bf16;
  void (*clamp)(T* x, T lo, T hi, int64_t n);
  void (*clamp_pull)(T* out, const T* g, const T* x, T lo, T hi, int64_t n);
  void (*scale)(T* out, const T* x, T a, int64_t n);
  void (*add_scaled)(T* y, const T* x, T a, int64_t n);
  double (*dot)(const T* x, const T* y, int64_t n);
  void (*wave)(T* out, const T* z, const Wave<T>& w, int64_t n);
  // dz0 += s * wave'(z) * g
  using WavePull = void(void* dz0, const void* z, const void* g, const Wave<T>& w, T s, int64_t n);
  WavePull* wave_pull;
  WavePull* wave_pull_bf16;
  // out = (add ? out : 0) + a * normal of the elements begin .. begin + n - 1
  void (*normals)(T* out, int64_t begin, uint32_t step, uint64_t seed, T a, bool add, int64_t n);
  // out = (add ? out : 0) + a * sign[sample, begin + i] * x[i]
  void (*signs)(T* out, const T* x, int64_t begin, uint32_t sample, uint32_t step, uint64_t seed,
                T a, bool add, int64_t n);
  void (*ancestral)(T* out, const T* x, const T* eps, const T* v, const T* noise,
                    const Ancestral<T>& a, int64_t n);
  void (*ancestral_pull)(T* dx, T* deps, T* dv, T* dnoise, const T* g, const T* x, const T* eps,
                         const T* v, const T* noise, const Ancestral<T>& a, int64_t n);
  void (*flow)(T* x_t, T* velocity, const T* x0, const T* x1, const Flow<T>& f, int64_t n);
  void (*flow_pull)(T* dx0, T* dx1, const T* gx, const T* gv, const Flow<T>& f, int64_t n);
  Integers<T, int32_t> i32;
  Integers<T, int64_t> i64;
};

template <class I, class T>
const Integers<T, I>& integers(const Loops<T>& loops) {
  if constexpr (sizeof(I) == 4)
    return loops.i32;
  else
    return loops.i64;
}

struct Isa {
  const char* name;
  Loops<float> f32;
  Loops<double> f64;
};

extern const Isa isa_default;
#if defined(__x86_64__) && defined(__GNUC__)
#define GS_X86_LEVELS 1
extern const Isa isa_v3;
extern const Isa isa_v4;
#endif

const Isa& isa();                  // the one in use
int isa_count();                   // those this machine can run, best first
const char* isa_name(int index);
bool use_isa(const char* name);    // false if this machine cannot run it

template <class T>
const Loops<T>& loops();
template <>
inline const Loops<float>& loops<float>() { return isa().f32; }
template <>
inline const Loops<double>& loops<double>() { return isa().f64; }

}  // namespace gs
