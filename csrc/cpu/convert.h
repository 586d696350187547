// SPDX-License-Identifier: Apache-2.0
// Between storage and compute types, one block at a time. Included by loops.h inside its level.

GS_FN float widen_bf16(uint16_t h) { return from_bits(uint32_t(h) << 16); }

// The upper half is the nearest bfloat16, ties to even; the lower half is left over. NaN stays NaN.
GS_FN uint32_t rounded_bf16(float x) {
  const uint32_t b = bits_of(x), rounded = b + 0x7fffu + ((b >> 16) & 1u);
  return x != x ? b | 0x400000u : rounded;
}
GS_FN uint16_t narrow_bf16(float x) { return uint16_t(rounded_bf16(x) >> 16); }

// Scaling by 2^112 moves half's exponent bias to float's and makes its subnormals normal.
GS_FN float widen_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = uint32_t(h & 0x7fffu) << 13;
  const uint32_t finite = bits_of(from_bits(magnitude) * 0x1p112f);
  return from_bits(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

GS_FN uint16_t narrow_f16(float x) {
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 1/2 lets the adder round at half's last subnormal bit, 2^-24.
  const uint32_t subnormal = bits_of(from_bits(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u : h;
  return uint16_t(sign | h);
}

template <class T>
void read_as(T* to, const double* from, int64_t stride, int64_t n) {
  GS_LOOP for (int64_t i = 0; i < n; ++i) to[i] = T(from[i * stride]);
}

template <class T>
void read_as(T* to, const float* from, int64_t stride, int64_t n) {
  if (stride == 1) {
    GS_LOOP for (int64_t i = 0; i < n; ++i) to[i] = T(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = T(from[i * stride]);
  }
}

template <class T>
void read_bf16(T* to, const uint16_t* from, int64_t stride, int64_t n) {
  if (stride == 1) {
    GS_LOOP for (int64_t i = 0; i < n; ++i) to[i] = T(widen_bf16(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = T(widen_bf16(from[i * stride]));
  }
}

// Whole vectors of half precision by the machine's own conversion: how many elements they hold. The
// masks are all ones; GCC takes the unmasked forms for uninitialized.
inline int64_t widen_f16_vectors(float* to, const uint16_t* from, int64_t n) {
  int64_t i = 0;
#if GS_X86_LEVEL >= 4
  for (; i < n / 16 * 16; i += 16)
    _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)(from + i))));
#elif GS_X86_LEVEL >= 3
  for (; i < n / 8 * 8; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  return i;
}

inline int64_t narrow_f16_vectors(uint16_t* to, const float* from, int64_t n) {
  int64_t i = 0;
#if GS_X86_LEVEL >= 4
  for (; i < n / 16 * 16; i += 16)
    _mm256_storeu_si256((__m256i*)(to + i), _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i),
                                                                  _MM_FROUND_TO_NEAREST_INT));
#elif GS_X86_LEVEL >= 3
  for (; i < n / 8 * 8; i += 8)
    _mm_storeu_si128((__m128i*)(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  return i;
}

template <class T>
void read_f16(T* to, const uint16_t* from, int64_t stride, int64_t n) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4)
    if (stride == 1) i = widen_f16_vectors(to, from, n);
  if (stride == 1) {
    GS_LOOP for (int64_t j = i; j < n; ++j) to[j] = T(widen_f16(from[j]));
  } else {
    for (; i < n; ++i) to[i] = T(widen_f16(from[i * stride]));
  }
}

// A block is about a page, which hardware prefetchers do not cross: fetch the next one meanwhile.
inline void prefetch_ahead(const void* from, int64_t bytes, int64_t ahead) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + ahead + i, 0, 2);
#endif
}

template <class T>
void read_part(T* to, const void* from, int dtype, int64_t stride, int64_t n) {
  switch (dtype) {
    case kFloat64: return read_as(to, (const double*)from, stride, n);
    case kFloat32: return read_as(to, (const float*)from, stride, n);
    case kBFloat16: return read_bf16(to, (const uint16_t*)from, stride, n);
    default: return read_f16(to, (const uint16_t*)from, stride, n);
  }
}

template <class T>
void read_block(T* to, const void* from, int dtype, int64_t stride, int64_t n) {
  if (stride == 0) {
    read_part(to, from, dtype, 1, 1);
    const T value = to[0];
    for (int64_t i = 1; i < n; ++i) to[i] = value;
    return;
  }
  if (stride != 1 || n < kBlock) return read_part(to, from, dtype, stride, n);
  const int64_t width = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  constexpr int64_t kPart = 256;
  for (int64_t i = 0; i < n; i += kPart) {
    const char* part = (const char*)from + i * width;
    prefetch_ahead(part, kPart * width, kBlock * width);
    read_part(to + i, part, dtype, 1, kPart);
  }
}

template <class T>
void narrow_block(uint16_t* to, int dtype, const T* from, int64_t n) {
  if (dtype == kBFloat16) {
    GS_LOOP for (int64_t i = 0; i < n; ++i) to[i] = narrow_bf16(float(from[i]));
    return;
  }
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) i = narrow_f16_vectors(to, from, n);
  GS_LOOP for (int64_t j = i; j < n; ++j) to[j] = narrow_f16(float(from[j]));
}

// Whole lines go around the cache, the ragged ends through it; the caller fences.
inline void stream_bytes(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  char* d = (char*)to;
  const char* s = (const char*)from;
  const int64_t head = int64_t(-uint64_t(d) & 63);
  if (bytes >= head + 64) {
    memcpy(d, s, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
#if GS_X86_LEVEL >= 4
      _mm512_stream_si512((__m512i*)(d + i), _mm512_loadu_si512((const void*)(s + i)));
#elif GS_X86_LEVEL >= 3
      for (int j = 0; j < 64; j += 32)
        _mm256_stream_si256((__m256i*)(d + i + j), _mm256_loadu_si256((const __m256i*)(s + i + j)));
#else
      for (int j = 0; j < 64; j += 16)
        _mm_stream_si128((__m128i*)(d + i + j), _mm_loadu_si128((const __m128i*)(s + i + j)));
#endif
    }
    memcpy(d + i, s + i, bytes - i);
    return;
  }
#endif
  memcpy(to, from, bytes);
}

inline void copy_bytes(void* to, const void* from, int64_t bytes, bool stream) {
  stream ? stream_bytes(to, from, bytes) : (void)memcpy(to, from, bytes);
}

template <class T, class S>
void write_as(S* to, int64_t stride, const S* from, int64_t n, bool stream) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
  } else {
    copy_bytes(to, from, n * int64_t(sizeof(S)), stream);
  }
}

template <class T>
void write_block(void* to, int dtype, int64_t stride, const T* from, int64_t n, bool stream) {
  alignas(64) char buffer[kBlock * 8];
  switch (dtype) {
    case kFloat64:
      if (sizeof(T) == 8) return write_as<T>((double*)to, stride, (const double*)from, n, stream);
      GS_LOOP for (int64_t i = 0; i < n; ++i) ((double*)buffer)[i] = double(from[i]);
      return write_as<T>((double*)to, stride, (const double*)buffer, n, stream);
    case kFloat32:
      if (sizeof(T) == 4) return write_as<T>((float*)to, stride, (const float*)from, n, stream);
      GS_LOOP for (int64_t i = 0; i < n; ++i) ((float*)buffer)[i] = float(from[i]);
      return write_as<T>((float*)to, stride, (const float*)buffer, n, stream);
    default:
      narrow_block((uint16_t*)buffer, dtype, from, n);
      return write_as<T>((uint16_t*)to, stride, (const uint16_t*)buffer, n, stream);
  }
}
