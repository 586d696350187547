// SPDX-License-Identifier: Apache-2.0
// The per-element formulas of the ops, forward and backward side by side, host and device.
// T is the compute type, float or double.
#pragma once
#include "philox.h"
#include "portable.h"

namespace gs {

// ---- sine of half turns -------------------------------------------------------------------

// Adding it rounds to the nearest integer and leaves that integer's parity in the last bit.
template <class T>
struct Round;
template <>
struct Round<float> {
  static GS_FN float magic() { return 12582912.0f; }  // 1.5 * 2^23
  static GS_FN float flip(float x, float u) { return from_bits(bits_of(x) ^ (bits_of(u) << 31)); }
};
template <>
struct Round<double> {
  static GS_FN double magic() { return 6755399441055744.0; }  // 1.5 * 2^52
  static GS_FN double flip(double x, double u) { return from_bits(bits_of(x) ^ (bits_of(u) << 63)); }
};

// sin(pi f) for |f| <= 1/2: minimax of degree 9 (5e-9 relative), Taylor of degree 21.
GS_FN float sin_pi(float f) {
  const float y = f * f;
  float p = 0.0775512428711f;
  p = mul_add(p, y, -0.598237994967f);
  p = mul_add(p, y, 2.5500691491f);
  p = mul_add(p, y, -5.1677096593f);
  p = mul_add(p, y, 3.14159263672f);
  return p * f;
}
GS_FN double sin_pi(double f) {
  const double y = f * f;
  double p = 5.3926646626081284894e-10;
  p = mul_add(p, y, -2.294842899726987311e-8);
  p = mul_add(p, y, 7.9520540014755127848e-7);
  p = mul_add(p, y, -2.1915353447830215827e-5);
  p = mul_add(p, y, 4.6630280576761256442e-4);
  p = mul_add(p, y, -7.3704309457143507773e-3);
  p = mul_add(p, y, 8.2145886611128228799e-2);
  p = mul_add(p, y, -0.59926452932079207689);
  p = mul_add(p, y, 2.5501640398773454439);
  p = mul_add(p, y, -5.1677127800499700292);
  p = mul_add(p, y, 3.1415926535897932385);
  return p * f;
}

// sin(pi (z*(hi + lo) + phase)). The product with hi loses nothing to the reduction, because the
// nearest integer is taken off in the same rounding; lo restores what hi could not hold. The second
// reduction keeps the sine bounded where float32 holds no phase any more, beyond 2^22 half turns.
template <class T>
GS_FN T sin_half_turns(T z, T hi, T lo, T phase) {
  const T u = mul_add(z, hi, phase) + Round<T>::magic();
  const T f = mul_add(z, hi, -(u - Round<T>::magic())) + mul_add(z, lo, phase);
  const T v = f + Round<T>::magic();
  return Round<T>::flip(Round<T>::flip(sin_pi(f - (v - Round<T>::magic())), u), v);
}

// The same where the result is rounded to 16 bits: off by 1e-6 and by 4e-7 of the argument.
GS_FN float sin_half_turns_coarse(float z, float hi, float phase) {
  const float t = mul_add(z, hi, phase), u = t + Round<float>::magic();
  const float f = t - (u - Round<float>::magic());
  // Beyond 2^22 half turns |f| may be over 1/2. As an integer, because GCC knows no minimum of floats.
  const uint32_t square = bits_of(f * f), quarter = bits_of(0.25f);
  const float y = from_bits(square < quarter ? square : quarter);
  float p = -0.558396049f;
  p = mul_add(p, y, 2.54360496f);
  p = mul_add(p, y, -5.16736781f);
  p = mul_add(p, y, 3.1415897f);
  return Round<float>::flip(p * f, u);
}

// ---- sincos noise: noise.SinCos ----------------------------------------------------------

template <class T>
struct Wave {
  T gain, amplitude, slope;  // slope = rate * amplitude
  T hi, lo;                  // rate / pi in two parts
  T phase, quarter;          // phase / pi, and half a half turn further for the cosine
};

template <class T>
inline Wave<T> make_wave(double weight, double gain, double rate, double amplitude, double phase) {
  const double pi = 3.14159265358979323846;
  Wave<T> w;
  w.gain = T(weight * gain);
  w.amplitude = T(weight * amplitude);
  w.slope = T(weight * rate * amplitude);
  w.hi = T(rate / pi);
  w.lo = T(rate / pi - double(w.hi));
  const double turns = remainder(phase / pi, 2.0);
  w.phase = T(turns);
  w.quarter = T(turns + 0.5);
  return w;
}

template <class T>
GS_FN T wave_value(const Wave<T>& w, T z) {
  return mul_add(w.gain, z, w.amplitude * sin_half_turns(z, w.hi, w.lo, w.phase));
}
// sum + wave_value
template <class T>
GS_FN T add_wave(T sum, const Wave<T>& w, T z) {
  return mul_add(w.amplitude, sin_half_turns(z, w.hi, w.lo, w.phase), mul_add(w.gain, z, sum));
}
GS_FN float add_wave_coarse(float sum, const Wave<float>& w, float z) {
  return mul_add(w.amplitude, sin_half_turns_coarse(z, w.hi, w.phase), mul_add(w.gain, z, sum));
}
template <class T>
GS_FN T wave_slope(const Wave<T>& w, T z) {
  return mul_add(w.slope, sin_half_turns(z, w.hi, w.lo, w.quarter), w.gain);
}

// sum + wave_slope * g
template <class T>
GS_FN T add_pull(T sum, const Wave<T>& w, T z, T g) {
  return mul_add(wave_slope(w, z), g, sum);
}
GS_FN float add_pull_coarse(float sum, const Wave<float>& w, float z, float g) {
  return mul_add(mul_add(w.slope, sin_half_turns_coarse(z, w.hi, w.quarter), w.gain), g, sum);
}

// ---- clamp: torch.clamp's value (NaN passes) and torch.clamp's mask ------------------------

template <class T>
GS_FN T clamp_value(T x, T lo, T hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}
template <class T>
GS_FN T clamp_pull(T g, T x, T lo, T hi) {
  return (x >= lo) & (x <= hi) ? g : T(0);
}

// ---- rounding of a step in integers: ops/reference.py, leap ------------------------------

// The nearest integer, the even one of two: the adder rounds where the type has no fractions left.
GS_FN float nearest(float x) {
  const float size = from_bits(bits_of(x) & 0x7fffffffu);
  const float whole = size < 0x1p23f ? (size + 0x1p23f) - 0x1p23f : size;
  return from_bits(bits_of(whole) | (bits_of(x) & 0x80000000u));
}
GS_FN double nearest(double x) {
  const double size = from_bits(bits_of(x) & ~(uint64_t(1) << 63));
  const double whole = size < 0x1p52 ? (size + 0x1p52) - 0x1p52 : size;
  return from_bits(bits_of(whole) | (bits_of(x) & uint64_t(1) << 63));
}

// ---- exponential and logarithm ------------------------------------------------------------

#if defined(__CUDA_ARCH__)
GS_FN float exp_of(float x) { return expf(x); }
GS_FN float log_unit(float u) { return logf(u); }
GS_FN float root(float x) { return sqrtf(x); }
GS_FN double root(double x) { return sqrt(x); }
GS_FN double exp_of(double x) { return exp(x); }
GS_FN double log_unit(double u) { return log(u); }
#else
GS_FN float root(float x) { return __builtin_sqrtf(x); }
GS_FN double root(double x) { return __builtin_sqrt(x); }
GS_FN double exp_of(double x) { return __builtin_exp(x); }

// e^x = 2^k e^r, |r| <= ln2/2; scaled twice by half of k, so that the ends of the range are right.
GS_FN float exp_of(float x) {
  x = x < -105.0f ? -105.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float u = mul_add(x, 1.44269504f, Round<float>::magic());
  const float k = u - Round<float>::magic();
  const float r = mul_add(k, -1.42860677e-6f, mul_add(k, -0.693145752f, x));
  float p = 0.00138365680147f;
  p = mul_add(p, r, 0.00837503666301f);
  p = mul_add(p, r, 0.0416682422667f);
  p = mul_add(p, r, 0.166664175452f);
  p = mul_add(p, r, 0.499999919523f);
  p = mul_add(p, r, 1.0000000369f);
  p = mul_add(p, r, 1.0f);
  const int32_t e = int32_t(bits_of(u) - bits_of(Round<float>::magic())), half = e >> 1;
  return p * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(e - half + 127) << 23);
}

// log u for normal u > 0 by 2 atanh((m-1)/(m+1)), exact to the rounding also next to u = 1.
GS_FN float log_unit(float u) {
  const uint32_t shifted = bits_of(u) - 0x3f3504f3u;  // mantissa into [sqrt(1/2), sqrt(2))
  const float e = float(int32_t(shifted) >> 23);
  const float m = from_bits((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f), y = s * s;
  float p = 0.299334010304f;
  p = mul_add(p, y, 0.399745088853f);
  p = mul_add(p, y, 0.666668184848f);
  p = p * y * s;
  return mul_add(e, 0.693147181f, mul_add(2.0f, s, p));
}
GS_FN double log_unit(double u) {
  const uint64_t first = 0x3fe6a09e667f3bcdu, shifted = bits_of(u) - first;  // from sqrt(1/2) on
  // The exponent by the bits of 2^52 + 2048 + e: not every machine converts 64-bit integers.
  const double e = from_bits(((shifted >> 52) ^ 0x800u) | 0x4330000000000000u) - 4503599627372544.0;
  const double m = from_bits((shifted & 0x000fffffffffffffu) + first);
  const double s = (m - 1.0) / (m + 1.0), y = s * s;
  double p = 0.14796442922268885616;
  p = mul_add(p, y, 0.15314003926993145823);
  p = mul_add(p, y, 0.18183566039484563799);
  p = mul_add(p, y, 0.22222198542422633225);
  p = mul_add(p, y, 0.28571428742664610172);
  p = mul_add(p, y, 0.39999999999413542725);
  p = mul_add(p, y, 0.66666666666667345655);
  p = mul_add(e, 1.9082149292705877e-10, p * y * s);  // ln 2 in two parts
  return mul_add(e, 6.9314718036912382e-1, mul_add(2.0, s, p));
}
#endif

// ---- normals (Box and Muller) -------------------------------------------------------------

template <class T>
GS_FN void normal_pair(uint32_t word_u, uint32_t word_w, T& first, T& second) {
  const T radius = root(T(-2) * log_unit(T(open_uniform(word_u))));
  const T turn = T(2) * T(uniform(word_w));
  const T u = turn + Round<T>::magic();
  second = radius * Round<T>::flip(sin_pi(turn - (u - Round<T>::magic())), u);
  // cos(pi t) = sin(pi (t + 1/2)); t + 1/2 itself would round, t - (k - 1/2) does not.
  const T v = (turn + T(0.5)) + Round<T>::magic();
  first = radius * Round<T>::flip(sin_pi(turn - (v - Round<T>::magic() - T(0.5))), v);
}

// ---- ancestral step: Nichol and Dhariwal 2021, equations 9 and 15 ------------------------

template <class T>
struct Ancestral {
  T r1, r2, c1, c2, log_max, log_min;
  T lo, hi;  // clamp of x0; infinite where there is none
  T nonzero;
  bool learned;  // log variance from v; else log_max is the log variance
};

template <class T>
GS_FN T ancestral_sigma(const Ancestral<T>& a, T v) {
  const T f = (v + T(1)) * T(0.5);
  const T log_var = a.learned ? f * a.log_max + (T(1) - f) * a.log_min : a.log_max;
  // Not nonzero * exp(): where the step is the last one, an infinite log variance must not matter.
  return a.nonzero != T(0) ? a.nonzero * exp_of(T(0.5) * log_var) : T(0);
}

template <class T>
GS_FN T ancestral_value(const Ancestral<T>& a, T x, T eps, T v, T noise) {
  const T x0 = clamp_value(a.r1 * x - a.r2 * eps, a.lo, a.hi);
  return a.c1 * x0 + a.c2 * x + ancestral_sigma(a, v) * noise;
}

template <class T>
GS_FN void ancestral_pull(const Ancestral<T>& a, T g, T x, T eps, T v, T noise, T& dx, T& deps,
                          T& dv, T& dnoise) {
  const T dx0 = clamp_pull(a.c1 * g, a.r1 * x - a.r2 * eps, a.lo, a.hi);
  dx = a.c2 * g + a.r1 * dx0;
  deps = -a.r2 * dx0;
  dnoise = ancestral_sigma(a, v) * g;
  dv = dnoise * noise * (T(0.25) * (a.log_max - a.log_min));
}

// ---- flow-matching pair: Lipman et al. 2023, equations 22 and 23 -------------------------

template <class T>
struct Flow {
  T r, s;  // x_t = r x0 + s x1, r = 1 - t, s = 1 - (1 - sigma_min) r
  T keep;  // 1 - sigma_min
};

template <class T>
inline Flow<T> make_flow(double t, double sigma_min) {
  return {T(1.0 - t), T(1.0 - (1.0 - sigma_min) * (1.0 - t)), T(1.0 - sigma_min)};
}

template <class T>
GS_FN T flow_state(const Flow<T>& f, T x0, T x1) { return f.r * x0 + f.s * x1; }
// Also d x_t / d t.
template <class T>
GS_FN T flow_velocity(const Flow<T>& f, T x0, T x1) { return f.keep * x1 - x0; }
template <class T>
GS_FN T flow_pull_x0(const Flow<T>& f, T gx, T gv) { return f.r * gx - gv; }
template <class T>
GS_FN T flow_pull_x1(const Flow<T>& f, T gx, T gv) { return f.s * gx + f.keep * gv; }

}  // namespace gs
