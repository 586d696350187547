// SPDX-License-Identifier: Apache-2.0
// The bodies of isa.h's loops, included once for each instruction set; no include guard. Intrinsics
// ask for GS_X86_LEVEL: the compiler's own macros do not follow a target pragma before GCC 13.

// Equal pointers may be passed (in-place use); a shift between them may not.
#if defined(__clang__)
#define GS_LOOP _Pragma("clang loop vectorize(assume_safety)")
#else
#define GS_LOOP _Pragma("GCC ivdep")
#endif

namespace gs {
namespace GS_LEVEL {

#include "convert.h"
#include "elements.h"

template <class S, int K, int Lane, class T, class W>
GS_FN T weighted_sum(const W& words, const T (&c)[K]) {
  T sum = c[0] * S::template get<Lane>(words[0]);
  GS_UNROLL
  for (int k = 1; k < K; ++k) sum = mul_add(c[k], S::template get<Lane>(words[k]), sum);
  return sum;
}

template <class T, int K, class S>
void combine_terms(void* out, const void* const* terms, const T* coefs, const T* noise, T s, int64_t n) {
  const void* x[K];
  T c[K];
  for (int k = 0; k < K; ++k) x[k] = terms[k], c[k] = coefs[k];
  if (noise)
    map_elements<S>(out, x, n, [&](const auto& words, int64_t i, auto at) GS_INLINE {
      return mul_add(s, noise[i], weighted_sum<S, K, at.lane>(words, c));
    });
  else
    map_elements<S>(out, x, n, [&](const auto& words, int64_t, auto at) GS_INLINE {
      return weighted_sum<S, K, at.lane>(words, c);
    });
}

template <class T, int K, class S>
void combine_wave_terms(void* out, const void* const* terms, const T* coefs, const void* source,
                        const Wave<T>& wave, T s, int64_t n) {
  Wave<T> w = wave;
  w.gain *= s, w.amplitude *= s;
  const void* x[K + 1];
  T c[K];
  for (int k = 0; k < K; ++k) x[k] = terms[k], c[k] = coefs[k];
  x[K] = source;
  map_elements<S>(out, x, n, [&](const auto& words, int64_t, auto at) GS_INLINE {
    return S::add_wave(weighted_sum<S, K, at.lane>(words, c), w, S::template get<at.lane>(words[K]));
  });
}

template <int K>
struct Terms {
  static constexpr int count = K;
};

// A loop of its own for each number of terms.
template <int K = 1, class F>
GS_FN void for_terms(int terms, const F& loop) {
  if constexpr (K < kMaxTerms)
    if (terms != K) return for_terms<K + 1>(terms, loop);
  loop(Terms<K>());
}

template <class T, class S>
void combine(void* out, const void* const* x, const T* c, int terms, const T* noise, T s, int64_t n) {
  for_terms(terms, [&](auto each) { combine_terms<T, each.count, S>(out, x, c, noise, s, n); });
}

template <class T, class S>
void combine_wave(void* out, const void* const* x, const T* c, int terms, const void* z,
                  const Wave<T>& w, T s, int64_t n) {
  for_terms(terms, [&](auto each) { combine_wave_terms<T, each.count, S>(out, x, c, z, w, s, n); });
}

template <class T>
void clamp_block(T* x, T lo, T hi, int64_t n) {
  GS_LOOP for (int64_t i = 0; i < n; ++i) x[i] = clamp_value(x[i], lo, hi);
}

template <class T>
void clamp_pull_block(T* out, const T* g, const T* x, T lo, T hi, int64_t n) {
  GS_LOOP for (int64_t i = 0; i < n; ++i) out[i] = clamp_pull(g[i], x[i], lo, hi);
}

template <class T>
void scale(T* out, const T* x, T a, int64_t n) {
  GS_LOOP for (int64_t i = 0; i < n; ++i) out[i] = a * x[i];
}

template <class T>
void add_scaled(T* y, const T* x, T a, int64_t n) {
  GS_LOOP for (int64_t i = 0; i < n; ++i) y[i] = mul_add(a, x[i], y[i]);
}

// A fixed number of lanes, so that the order of addition is the same on every machine.
template <class T>
double dot(const T* x, const T* y, int64_t n) {
  constexpr int kLanes = 32;
  T lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    GS_LOOP for (int l = 0; l < kLanes; ++l) lane[l] = mul_add(x[i + l], y[i + l], lane[l]);
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] = mul_add(x[i], y[i], lane[l]);
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += double(lane[l]);
  return sum;
}

template <class T>
void wave(T* out, const T* z, const Wave<T>& wave, int64_t n) {
  const Wave<T> w = wave;
  GS_LOOP for (int64_t i = 0; i < n; ++i) out[i] = wave_value(w, z[i]);
}

template <class T, class S>
void wave_pull(void* dz0, const void* z, const void* g, const Wave<T>& wave, T s, int64_t n) {
  Wave<T> w = wave;
  w.gain *= s, w.slope *= s;
  const void* x[3] = {dz0, z, g};
  map_elements<S>(dz0, x, n, [&](const auto& words, int64_t, auto at) GS_INLINE {
    return S::add_pull(S::template get<at.lane>(words[0]), w, S::template get<at.lane>(words[1]),
                       S::template get<at.lane>(words[2]));
  });
}

// normal_words with every word in 64 bits, as the products need: GCC would widen and narrow whole
// vectors in each round, which takes as long as the rounds. Below AVX-512 a 64-bit product costs more.
GS_FN Words wide_normal_words(uint64_t block, uint32_t step, uint64_t seed) {
#if GS_X86_LEVEL >= 4
  uint64_t c0 = uint32_t(block), c1 = block >> 32, c2 = step, c3 = kNormals;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  GS_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * uint32_t(c0), p1 = uint64_t(kPhiloxM1) * uint32_t(c2);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{uint32_t(c0), uint32_t(c1), uint32_t(c2), uint32_t(c3)}};
#else
  return normal_words(block, step, seed);
#endif
}

template <class T>
void normals(T* out, int64_t begin, uint32_t step, uint64_t seed, T a, bool add, int64_t n) {
  constexpr int kQuads = 64;
  uint32_t word[4][kQuads];
  T value[4][kQuads], flat[4 * kQuads];
  int64_t done = 0;
  while (done < n) {
    const uint64_t first = uint64_t(begin + done) >> 2;
    const int skip = int((begin + done) & 3);
    int64_t count = 4 * kQuads - skip;
    if (count > n - done) count = n - done;
    const int quads = int((skip + count + 3) / 4);
    GS_LOOP for (int q = 0; q < quads; ++q) {
      const Words w = wide_normal_words(first + q, step, seed);
      word[0][q] = w.w[0], word[1][q] = w.w[1], word[2][q] = w.w[2], word[3][q] = w.w[3];
    }
    GS_LOOP for (int q = 0; q < quads; ++q)
      normal_pair<T>(word[0][q], word[1][q], value[0][q], value[1][q]);
    GS_LOOP for (int q = 0; q < quads; ++q)
      normal_pair<T>(word[2][q], word[3][q], value[2][q], value[3][q]);
    for (int q = 0; q < quads; ++q) {
      flat[4 * q] = value[0][q], flat[4 * q + 1] = value[1][q];
      flat[4 * q + 2] = value[2][q], flat[4 * q + 3] = value[3][q];
    }
    T* to = out + done;
    const T* from = flat + skip;
    if (add) {
      GS_LOOP for (int64_t i = 0; i < count; ++i) to[i] = mul_add(a, from[i], to[i]);
    } else {
      GS_LOOP for (int64_t i = 0; i < count; ++i) to[i] = a * from[i];
    }
    done += count;
  }
}

GS_FN float negate_if(float x, uint32_t bit) { return from_bits(bits_of(x) ^ (bit << 31)); }
GS_FN double negate_if(double x, uint32_t bit) { return from_bits(bits_of(x) ^ (uint64_t(bit) << 63)); }

template <class T, bool Add>
GS_FN void sign_run(T* to, const T* from, uint32_t word, T a, int count) {
  GS_LOOP for (int l = 0; l < count; ++l) {
    const T x = negate_if(from[l], (word >> l) & 1u);
    to[l] = Add ? mul_add(a, x, to[l]) : a * x;
  }
}

template <class T, bool Add>
void sign_blocks(T* out, const T* x, int64_t begin, uint32_t sample, uint32_t step, uint64_t seed, T a,
                 int64_t n) {
  for (int64_t i = 0; i < n;) {
    const int64_t j = begin + i;
    const Words w = sign_words(uint32_t(j >> 7), sample, step, seed);
    for (int bit = int(j & 127); bit < 128 && i < n;) {
      const int first = bit & 31;
      const int count = int(n - i < 32 - first ? n - i : 32 - first);
      if (count == 32)  // a constant: no remainder loops
        sign_run<T, Add>(out + i, x + i, w.w[bit >> 5], a, 32);
      else
        sign_run<T, Add>(out + i, x + i, w.w[bit >> 5] >> first, a, count);
      i += count;
      bit += count;
    }
  }
}

template <class T>
void signs(T* out, const T* x, int64_t begin, uint32_t sample, uint32_t step, uint64_t seed, T a,
           bool add, int64_t n) {
  add ? sign_blocks<T, true>(out, x, begin, sample, step, seed, a, n)
      : sign_blocks<T, false>(out, x, begin, sample, step, seed, a, n);
}

#include "leap.h"

template <class T>
void ancestral(T* out, const T* x, const T* eps, const T* v, const T* noise, const Ancestral<T>& given,
               int64_t n) {
  const Ancestral<T> a = given;
  GS_LOOP for (int64_t i = 0; i < n; ++i)
    out[i] = ancestral_value(a, x[i], eps[i], v[i], noise[i]);
}

template <class T>
void ancestral_pull_block(T* dx, T* deps, T* dv, T* dnoise, const T* g, const T* x, const T* eps,
                          const T* v, const T* noise, const Ancestral<T>& given, int64_t n) {
  const Ancestral<T> a = given;
  GS_LOOP for (int64_t i = 0; i < n; ++i)
    ancestral_pull(a, g[i], x[i], eps[i], v[i], noise[i], dx[i], deps[i], dv[i], dnoise[i]);
}

template <class T>
void flow(T* x_t, T* velocity, const T* x0, const T* x1, const Flow<T>& given, int64_t n) {
  const Flow<T> f = given;
  GS_LOOP for (int64_t i = 0; i < n; ++i) {
    x_t[i] = flow_state(f, x0[i], x1[i]);
    velocity[i] = flow_velocity(f, x0[i], x1[i]);
  }
}

template <class T>
void flow_pull(T* dx0, T* dx1, const T* gx, const T* gv, const Flow<T>& given, int64_t n) {
  const Flow<T> f = given;
  GS_LOOP for (int64_t i = 0; i < n; ++i) {
    dx0[i] = flow_pull_x0(f, gx[i], gv[i]);
    dx1[i] = flow_pull_x1(f, gx[i], gv[i]);
  }
}

template <class T, class Rounded, class Half>
constexpr Loops<T> make_loops() {
  return {read_block<T>, write_block<T>, copy_bytes, combine<T, Plain<T>>, combine_wave<T, Plain<T>>,
          combine_wave<T, Rounded>, combine<T, Half>, combine_wave<T, Half>, clamp_block<T>, clamp_pull_block<T>,
          scale<T>, add_scaled<T>, dot<T>, wave<T>, wave_pull<T, Plain<T>>, wave_pull<T, Half>, normals<T>,
          signs<T>, ancestral<T>, ancestral_pull_block<T>, flow<T>, flow_pull<T>,
          {leap<T, int32_t>, scaled_integers<T, int32_t>}, {leap<T, int64_t>, scaled_integers<T, int64_t>}};
}

}  // namespace GS_LEVEL
}  // namespace gs
