// SPDX-License-Identifier: Apache-2.0
// Loops over elements that are converted in registers. Included by loops.h inside its level.

// How elements lie in memory: a word holds kLanes of them, and the loops take a word at a time.
template <class T>
struct Plain {
  using Word = T;
  using Element = T;
  static constexpr int kLanes = 1;
  template <int Lane>
  static GS_FN T get(T word) { return word; }
  static GS_FN T put(T value) { return value; }
  static GS_FN T add_wave(T sum, const Wave<T>& w, T z) { return gs::add_wave(sum, w, z); }
  static GS_FN T add_pull(T sum, const Wave<T>& w, T z, T g) { return gs::add_pull(sum, w, z, g); }
};
// In float, on the way to 16 bits.
struct Coarse : Plain<float> {
  static GS_FN float add_wave(float sum, const Wave<float>& w, float z) {
    return add_wave_coarse(sum, w, z);
  }
};
// Two in 32 bits: a half becomes a float by a shift or a mask, where single elements would have to be
// unpacked and packed again, at the cost of the whole sine.
struct BFloat16 {
  typedef uint32_t __attribute__((aligned(2), may_alias)) Word;
  using Element = uint16_t;
  static constexpr int kLanes = 2;
  template <int Lane>
  static GS_FN float get(uint32_t word) { return from_bits(Lane ? word & 0xffff0000u : word << 16); }
  static GS_FN uint32_t put(float low, float high) {
    return (rounded_bf16(low) >> 16) | (rounded_bf16(high) & 0xffff0000u);
  }
  static GS_FN uint32_t put(float low) { return rounded_bf16(low) >> 16; }
  static GS_FN float add_wave(float sum, const Wave<float>& w, float z) {
    return add_wave_coarse(sum, w, z);
  }
  static GS_FN float add_pull(float sum, const Wave<float>& w, float z, float g) {
    return add_pull_coarse(sum, w, z, g);
  }
};
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half comes first");

template <int Lane>
struct InLane {
  static constexpr int lane = Lane;
};

// out[i] = value(words of the inputs, i, lane of element i)
template <class S, int Inputs, class F>
GS_FN void map_elements(void* to, const void* const (&from)[Inputs], int64_t n, const F& value) {
  using Word = typename S::Word;
  using Element = typename S::Element;
  Word* out = (Word*)to;
  const Word* in[Inputs];
  for (int k = 0; k < Inputs; ++k) in[k] = (const Word*)from[k];
  if constexpr (S::kLanes == 1) {
    GS_LOOP for (int64_t i = 0; i < n; ++i) {
      Word w[Inputs];
      GS_UNROLL for (int k = 0; k < Inputs; ++k) w[k] = in[k][i];
      out[i] = S::put(value(w, i, InLane<0>()));
    }
  } else {
    const int64_t pairs = n / 2;
    GS_LOOP for (int64_t i = 0; i < pairs; ++i) {
      Word w[Inputs];
      GS_UNROLL for (int k = 0; k < Inputs; ++k) w[k] = in[k][i];
      out[i] = S::put(value(w, 2 * i, InLane<0>()), value(w, 2 * i + 1, InLane<1>()));
    }
    if (n % 2) {
      Word w[Inputs];
      for (int k = 0; k < Inputs; ++k) w[k] = *(const Element*)(in[k] + pairs);
      *(Element*)(out + pairs) = Element(S::put(value(w, n - 1, InLane<0>())));
    }
  }
}
