// SIMD vectors by the vector extensions of GCC and Clang: one source for AVX-512, AVX2, NEON and what follows them.
// A vector holds as many channels as the widest registers of the target; its lanes never talk to each other, except in
// `sum_lanes`.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EHRSEQ_INLINE __attribute__((always_inline)) inline
#define EHRSEQ_UNROLL _Pragma("GCC unroll 64")

namespace ehrseq {

// kForwardStates, kBackwardStates: how many states of a vector of channels stay in registers; the rest of the registers
// holds the step, the outputs and the polynomial.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kForwardStates = 16, kBackwardStates = 8;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kForwardStates = 8, kBackwardStates = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kForwardStates = 16, kBackwardStates = 8;
#else
constexpr int kVectorBytes = 16, kForwardStates = 8, kBackwardStates = 4;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t WordVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef FloatVector type; typedef IntVector mask; };
template <> struct VectorOf<double> { typedef DoubleVector type; typedef LongVector mask; };
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T> EHRSEQ_INLINE Vector<T> splat(T x) { return x - Vector<T>{}; }

// Decaying states run into denormal numbers, which cost a hundred cycles each. Flushed to zero inside the kernel's own
// threads only: the caller's setting comes back.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(saved_));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushDenormals() { __asm__ __volatile__("msr fpcr, %0" : : "r"(saved_)); }
 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// 2^x. Exactly 1 at 0, so that a step of size 0 holds the state; 0 at -inf; inf from 128 (1024 in double) on.
// ---------------------------------------------------------------------------------------------------------------------
EHRSEQ_INLINE FloatVector exp2(FloatVector x) {
  // Minimax on [-0.5, 0.5] with the constant term fixed at 1: 9.2e-8 relative.
  const float c1 = 0.693146977557139f, c2 = 0.24022242011419265f, c3 = 0.05550733769142087f, c4 = 0.009671517534833151f,
              c5 = 0.0013264735231257065f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const FloatVector f = (FloatVector)_mm512_reduce_ps((__m512)x, 0);  // x - round(x)
  FloatVector p = c5 * f + c4;
  p = p * f + c3, p = p * f + c2, p = p * f + c1, p = p * f + 1.0f;
  return (FloatVector)_mm512_scalef_ps((__m512)p, (__m512)(x - f));
#else
#if defined(__AVX__)
  x = (FloatVector)_mm256_max_ps(_mm256_set1_ps(-127.0f), (__m256)x);  // this order of operands lets a NaN through
  x = (FloatVector)_mm256_min_ps(_mm256_set1_ps(128.0f), (__m256)x);
#else
  const FloatVector low = splat(-127.0f), high = splat(128.0f);
  x = x < low ? low : x, x = x > high ? high : x;
#endif
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 more makes it a float's exponent.
  const float magic = 12582912.0f + 127.0f;
  const FloatVector m = x + magic, scale = (FloatVector)((IntVector)m << 23), f = x - (m - magic);
  FloatVector p = c5 * f + c4;
  p = p * f + c3, p = p * f + c2, p = p * f + c1, p = p * f + 1.0f;
  return p * scale;  // a product, not an addition to the exponent's bits: NaN stays NaN whatever its payload
#endif
}

EHRSEQ_INLINE DoubleVector exp2(DoubleVector x) {
  const DoubleVector low = splat(-1023.0), high = splat(1024.0);
  x = x < low ? low : x, x = x > high ? high : x;
  const double magic = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52, as above
  const DoubleVector m = x + magic, scale = (DoubleVector)((LongVector)m << 52), f = x - (m - magic);
  // Taylor to f^13: the remainder is below 1e-17 on [-0.5, 0.5].
  DoubleVector p = 1.3691488853904128e-12 * f + 2.5678435993488206e-11;
  p = p * f + 4.4455382718708114e-10, p = p * f + 7.0549116208011233e-9, p = p * f + 1.0178086009239699e-7;
  p = p * f + 1.3215486790144307e-6, p = p * f + 1.5252733804059840e-5, p = p * f + 1.5403530393381609e-4;
  p = p * f + 1.3333558146428443e-3, p = p * f + 9.6181291076284772e-3, p = p * f + 5.5504108664821580e-2;
  p = p * f + 2.4022650695910071e-1, p = p * f + 6.9314718055994531e-1, p = p * f + 1.0;
  return p * scale;
}

// 2^x - 1 for |x| <= kSmallExponent, to 1.4e-8 relative. In a long run of tiny steps 2^x itself rounds to a multiple of
// 2^-24 off the truth, always to the same side; x alone does not.
constexpr float kSmallExponent = 0.25f;
EHRSEQ_INLINE FloatVector exp2_minus_1(FloatVector x) {
  FloatVector p = 0.001333355774174226f * x + 0.009630163165778478f;
  p = p * x + 0.05550416452657916f, p = p * x + 0.24022631912246428f, p = p * x + 0.6931471799786546f;
  return p * x;
}
EHRSEQ_INLINE DoubleVector exp2_minus_1(DoubleVector x) { return exp2(x) - 1.0; }

// ---------------------------------------------------------------------------------------------------------------------
// Softplus, sigmoid
// ---------------------------------------------------------------------------------------------------------------------
// log(1 + e) for e in [0, 1], accurate relative to its value: 2 atanh(e / (e + 2))
EHRSEQ_INLINE FloatVector log1p_unit(FloatVector e) {
  const FloatVector s = e / (e + 2.0f), q = s * s;
  FloatVector p = 2.0f / 17 * q + 2.0f / 15;
  p = p * q + 2.0f / 13, p = p * q + 2.0f / 11, p = p * q + 2.0f / 9, p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5, p = p * q + 2.0f / 3, p = p * q + 2.0f;
  return s * p;
}
EHRSEQ_INLINE DoubleVector log1p_unit(DoubleVector e) {
  for (int i = 0; i < kLanes<double>; i++) e[i] = std::log1p(e[i]);
  return e;
}

template <class T> EHRSEQ_INLINE Vector<T> sigmoid(Vector<T> x) {
  return T(1) / (T(1) + exp2(x * T(-1.4426950408889634)));
}

// (softplus, its derivative). Both exactly 0 at -inf, where a pad step stands; the identity above 20, as torch has it.
template <class T> EHRSEQ_INLINE void softplus(Vector<T> x, Vector<T>& value, Vector<T>& slope) {
  const Vector<T> zero{};
  const Vector<T> magnitude = x > zero ? x : -x;
  Vector<T> e = exp2(magnitude * T(-1.4426950408889634));
  e = magnitude > splat(T(sizeof(T) == 4 ? 87 : 708)) ? zero : e;
  e = x > splat(T(20)) ? zero : e;
  value = (x > zero ? x : zero) + log1p_unit(e);
  slope = (x > zero ? splat(T(1)) : e) / (T(1) + e);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums over the lanes: kLanes vectors -> one vector whose lane i is the sum of vector i
// ---------------------------------------------------------------------------------------------------------------------
// Lane i of the result comes from lane index(i) of the pair (a, b): in each segment of 2 * S lanes the first S from a,
// the other S from b; both from the segment's first half (High = 0) or second (High = S).
template <int S, int High, int W> constexpr int fold_index(int i) {
  return (i / (2 * S)) * 2 * S + i % S + High + (i % (2 * S) >= S ? W : 0);
}
template <class T, int S, int High, int... I>
EHRSEQ_INLINE Vector<T> fold_shuffle(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, fold_index<S, High, kLanes<T>>(I)...);
#else
  return __builtin_shuffle(a, b, (typename VectorOf<T>::mask){fold_index<S, High, kLanes<T>>(I)...});
#endif
}
template <class T, int S> EHRSEQ_INLINE void fold(Vector<T>* v) {
  if constexpr (S > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
    EHRSEQ_UNROLL
    for (int i = 0; i < S; i++) v[i] = fold_shuffle<T, S, 0>(v[i], v[i + S], lanes) + fold_shuffle<T, S, S>(v[i], v[i + S], lanes);
    fold<T, S / 2>(v);
  }
}
template <class T> EHRSEQ_INLINE Vector<T> sum_lanes(const Vector<T>* vectors) {
  Vector<T> v[kLanes<T>];
  EHRSEQ_UNROLL
  for (int i = 0; i < kLanes<T>; i++) v[i] = vectors[i];
  fold<T, kLanes<T> / 2>(v);
  return v[0];
}

}  // namespace ehrseq
