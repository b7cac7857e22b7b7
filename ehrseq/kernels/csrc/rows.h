// Tensors as the kernels see them: rows of contiguous channels, any dtype, any stride between rows. A tile of rows is
// converted to vectors of the compute type while it is read, so that no half-precision tensor needs a float copy.
#pragma once
#include "vectors.h"

namespace ehrseq {

enum Dtype : int64_t { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

EHRSEQ_INLINE float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
// Not _Float16: GCC has it in C++ from 12 (x86) and 13 (ARM) on only.
#if defined(__F16C__)
EHRSEQ_INLINE float widen(Float16 x) { return _cvtsh_ss(x.bits); }
EHRSEQ_INLINE Float16 narrow_half(float x) { return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))}; }
#elif defined(__aarch64__)
EHRSEQ_INLINE float widen(Float16 x) {
  __fp16 y;
  memcpy(&y, &x, 2);
  return float(y);
}
EHRSEQ_INLINE Float16 narrow_half(float x) {
  const __fp16 y = __fp16(x);
  Float16 z;
  memcpy(&z, &y, 2);
  return z;
}
#else
#error "half precision needs F16C (x86-64-v3) or aarch64"
#endif
EHRSEQ_INLINE float widen(float x) { return x; }
EHRSEQ_INLINE double widen(double x) { return x; }

template <class S> EHRSEQ_INLINE S narrow(double x);
template <> EHRSEQ_INLINE float narrow<float>(double x) { return float(x); }
template <> EHRSEQ_INLINE double narrow<double>(double x) { return x; }
template <> EHRSEQ_INLINE Float16 narrow<Float16>(double x) { return narrow_half(float(x)); }
template <> EHRSEQ_INLINE Bfloat16 narrow<Bfloat16>(double x) {
  const float y = float(x);
  uint32_t bits;
  memcpy(&bits, &y, 4);
  if (y != y) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

template <class A, class B> constexpr bool kSame = false;
template <class A> constexpr bool kSame<A, A> = true;

// The first `lanes` elements at p, 0 beyond: nothing past a row's end is touched.
template <class T, class S> EHRSEQ_INLINE Vector<T> load(const S* p, int lanes) {
  Vector<T> v{};
  if (lanes >= kLanes<T>) {
    if constexpr (kSame<T, S>) {
      memcpy(&v, p, kVectorBytes);
      return v;
    } else if constexpr (kSame<T, float> && kSame<S, Bfloat16>) {
      HalfVector half;
      memcpy(&half, p, sizeof half);
      return (FloatVector)(__builtin_convertvector(half, WordVector) << 16);
#if defined(__AVX512F__)
    } else if constexpr (kSame<T, float> && kSame<S, Float16>) {
      return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    } else if constexpr (kSame<T, float> && kSame<S, Float16>) {
      return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
    }
    lanes = kLanes<T>;
  }
#if defined(__AVX512F__)
  if constexpr (kSame<T, float> && kSame<S, float>)
    return (FloatVector)_mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), p);
#endif
  for (int i = 0; i < lanes; i++) v[i] = T(widen(p[i]));
  return v;
}

template <class T, class S> EHRSEQ_INLINE void store(S* p, Vector<T> v, int lanes) {
  if (lanes >= kLanes<T>) {
    if constexpr (kSame<T, S>) {
      memcpy(p, &v, kVectorBytes);
      return;
    } else if constexpr (kSame<T, float> && kSame<S, Bfloat16>) {
      const WordVector bits = (WordVector)v;
      WordVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      rounded = v != v ? WordVector{} + 0x7fc0 : rounded;
      const HalfVector half = __builtin_convertvector(rounded, HalfVector);
      memcpy(p, &half, sizeof half);
      return;
#if defined(__AVX512F__)
    } else if constexpr (kSame<T, float> && kSame<S, Float16>) {
      _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
      return;
#elif defined(__F16C__)
    } else if constexpr (kSame<T, float> && kSame<S, Float16>) {
      _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
      return;
#endif
    }
    lanes = kLanes<T>;
  }
#if defined(__AVX512F__)
  if constexpr (kSame<T, float> && kSame<S, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << lanes) - 1), (__m512)v);
    return;
  }
#endif
  for (int i = 0; i < lanes; i++) p[i] = narrow<S>(v[i]);
}

// A tensor [batch, length, width] whose last dimension is contiguous; strides in elements, 0 for an expanded dimension.
struct Rows {
  void* data;
  int64_t dtype, batch_stride, row_stride;
};

// Calls f with a typed pointer to element (batch, row, column) and the stride between rows.
template <class F> EHRSEQ_INLINE void with_pointer(const Rows& rows, int64_t batch, int64_t row, int64_t column, F f) {
  const int64_t offset = batch * rows.batch_stride + row * rows.row_stride + column;
  switch (rows.dtype) {
    case kFloat32: return f((float*)rows.data + offset, rows.row_stride);
    case kFloat64: return f((double*)rows.data + offset, rows.row_stride);
    case kBfloat16: return f((Bfloat16*)rows.data + offset, rows.row_stride);
    case kFloat16: return f((Float16*)rows.data + offset, rows.row_stride);
  }
}

// `steps` rows of one vector of channels. Not inlined: four dtypes at every place of use would triple the library.
template <class T>
__attribute__((noinline)) void load_tile(const Rows& rows, int64_t b, int64_t t, int64_t channel, int steps, int lanes,
                                         Vector<T>* out) {
  with_pointer(rows, b, t, channel, [&](auto* p, int64_t stride) {
    if (lanes >= kLanes<T>) {
      for (int i = 0; i < steps; i++) out[i] = load<T>(p + i * stride, kLanes<T>);
    } else {
      for (int i = 0; i < steps; i++) out[i] = load<T>(p + i * stride, lanes);
    }
  });
}
template <class T>
__attribute__((noinline)) void store_tile(const Rows& rows, int64_t b, int64_t t, int64_t channel, int steps, int lanes,
                                          const Vector<T>* in) {
  with_pointer(rows, b, t, channel, [&](auto* p, int64_t stride) {
    if (lanes >= kLanes<T>) {
      for (int i = 0; i < steps; i++) store<T>(p + i * stride, in[i], kLanes<T>);
    } else {
      for (int i = 0; i < steps; i++) store<T>(p + i * stride, in[i], lanes);
    }
  });
}

// Asks for the cache lines of the next block's tile while this one is at work, a row of each tensor a step: a tile
// touches one line in each of many rows, a pattern that the hardware does not foresee, and all at once they would queue.
// Into the second level only: rows that lie a multiple of 4 KiB apart share one set of the first.
class Ahead {
 public:
  EHRSEQ_INLINE void add(const Rows& rows, int64_t b, int64_t t, int64_t channel) {
    if (!rows.data) return;
    const int64_t size = rows.dtype == kFloat64 ? 8 : rows.dtype == kFloat32 ? 4 : 2;
    rows_[count_] = (const char*)rows.data + (b * rows.batch_stride + t * rows.row_stride + channel) * size;
    strides_[count_++] = rows.row_stride * size;
  }
  EHRSEQ_INLINE void fetch(int step) const {
    for (int i = 0; i < count_; i++) __builtin_prefetch(rows_[i] + step * strides_[i], 0, 2);
  }

 private:
  const char* rows_[4];
  int64_t strides_[4];
  int count_ = 0;
};

// A tile of B or C as scalars, [steps, padded]: the states beyond `state` are 0 and change nothing.
template <class T>
__attribute__((noinline)) void load_scalars(const Rows& rows, int64_t b, int64_t t, int steps, int state, int padded,
                                            T* out) {
  with_pointer(rows, b, t, 0, [&](auto* p, int64_t stride) {
    for (int i = 0; i < steps; i++) {
      for (int n = 0; n < state; n++) out[i * padded + n] = T(widen(p[i * stride + n]));
      for (int n = state; n < padded; n++) out[i * padded + n] = T(0);
    }
  });
}

}  // namespace ehrseq
