// SPDX-License-Identifier: Apache-2.0
// The loops of a state in integers, one block at a time. Included by loops.h inside its level.

// w += sign * round(change); whether all of it stayed within the range, which ends a bit before the
// integers', so that a sum of two within it does not wrap.
template <class T, class I>
bool leap(I* w, T* change, int sign, int64_t n) {
  using Unsigned = std::make_unsigned_t<I>;
  constexpr I kLimit = I(1) << (8 * sizeof(I) - 2);
  // Two loops, as not every machine converts to 64-bit integers in vectors.
  T rejected = 0;
  GS_LOOP for (int64_t i = 0; i < n; ++i) {
    const T x = change[i];
    const bool inside = (x >= T(-kLimit)) & (x <= T(kLimit));  // not so for NaN
    change[i] = inside ? nearest(x) : T(0);
    rejected = inside ? rejected : T(1);
  }
  I least = 0, most = 0;
  GS_LOOP for (int64_t i = 0; i < n; ++i) {
    const Unsigned by = Unsigned(I(change[i]));
    w[i] = I(Unsigned(w[i]) + (sign < 0 ? Unsigned(0) - by : by));
    least = w[i] < least ? w[i] : least;
    most = w[i] > most ? w[i] : most;
  }
  return rejected == 0 && least >= -kLimit && most <= kLimit;
}

template <class T, class I>
void scaled_integers(T* x, const I* w, T scale, int64_t n) {
  GS_LOOP for (int64_t i = 0; i < n; ++i) x[i] = T(w[i]) * scale;
}
