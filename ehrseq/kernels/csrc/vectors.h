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
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EHRSEQ_INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define EHRSEQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EHRSEQ_UNROLL _Pragma("GCC unroll 64")
#endif

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

// a b + c, rounded once where the machine can: left to itself a compiler fuses in one copy of a loop and not in another,
// and rows that must not depend on their number would.
EHRSEQ_INLINE FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (FloatVector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

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
// 2^x = 2^n (1 + m), n an integer, |m| < 0.42. Exactly 1 at 0, so that a step of size 0 holds the state; 0 at -inf; inf
// from 128 (1024 in double) on. The parts are kept apart where it matters: 1 + m rounds to a multiple of 2^-24 off the
// truth, the same at every step of the same size, and thousands of steps add that up.
// ---------------------------------------------------------------------------------------------------------------------
template <class V> struct PowerOf2 {
  V m;  // 2^(x - n) - 1
#if defined(__AVX512F__)
  V n;  // instructions that scale by 2^n take n itself
#else
  V scale;  // 2^n
#endif
};

// 2^f - 1 for |f| <= 0.5: minimax, 1.1e-8 of itself
EHRSEQ_INLINE FloatVector mantissa_minus_1(FloatVector f) {
  FloatVector p = 0.00015403518779571435f * f + 0.0013390740365062095f;
  p = p * f + 0.009618237497864078f, p = p * f + 0.05550357424654277f, p = p * f + 0.24022649794801498f;
  p = p * f + 0.6931471879284726f;
  return p * f;
}
// Taylor to f^13: the remainder is below 1e-17.
EHRSEQ_INLINE DoubleVector mantissa_minus_1(DoubleVector f) {
  DoubleVector p = 1.3691488853904124e-12 * f + 2.5678435993488196e-11;
  p = p * f + 4.44553827187081e-10, p = p * f + 7.054911620801121e-09, p = p * f + 1.0178086009239696e-07;
  p = p * f + 1.3215486790144305e-06, p = p * f + 1.5252733804059838e-05, p = p * f + 0.00015403530393381606;
  p = p * f + 0.0013333558146428441, p = p * f + 0.009618129107628477, p = p * f + 0.055504108664821576;
  p = p * f + 0.2402265069591007, p = p * f + 0.6931471805599453;
  return p * f;
}

#if defined(__AVX512F__)
EHRSEQ_INLINE PowerOf2<FloatVector> power_of_2(FloatVector x) {
  const FloatVector f = (FloatVector)_mm512_reduce_ps((__m512)x, 0);  // x - round(x)
  return {mantissa_minus_1(f), x - f};
}
EHRSEQ_INLINE PowerOf2<DoubleVector> power_of_2(DoubleVector x) {
  const DoubleVector f = (DoubleVector)_mm512_reduce_pd((__m512d)x, 0);
  return {mantissa_minus_1(f), x - f};
}
EHRSEQ_INLINE FloatVector scale_by(FloatVector v, PowerOf2<FloatVector> power) {
  return (FloatVector)_mm512_scalef_ps((__m512)v, (__m512)power.n);
}
EHRSEQ_INLINE DoubleVector scale_by(DoubleVector v, PowerOf2<DoubleVector> power) {
  return (DoubleVector)_mm512_scalef_pd((__m512d)v, (__m512d)power.n);
}
#else
// Adding 1.5 * 2^23 (2^52 in double) rounds to an integer and leaves it in the low bits; the exponent's bias on top makes
// those bits, shifted, the float 2^n. A NaN comes out as NaN through m.
EHRSEQ_INLINE PowerOf2<FloatVector> power_of_2(FloatVector x) {
#if defined(__AVX__)
  x = (FloatVector)_mm256_max_ps(_mm256_set1_ps(-127.0f), (__m256)x);  // this order of operands lets a NaN through
  x = (FloatVector)_mm256_min_ps(_mm256_set1_ps(128.0f), (__m256)x);
#else
  const FloatVector low = splat(-127.0f), high = splat(128.0f);
  x = x < low ? low : x, x = x > high ? high : x;
#endif
  const float magic = 12582912.0f + 127.0f;
  const FloatVector shifted = x + magic;
  return {mantissa_minus_1(x - (shifted - magic)), (FloatVector)((IntVector)shifted << 23)};
}
EHRSEQ_INLINE PowerOf2<DoubleVector> power_of_2(DoubleVector x) {
  const DoubleVector low = splat(-1023.0), high = splat(1024.0);
  x = x < low ? low : x, x = x > high ? high : x;
  const double magic = 6755399441055744.0 + 1023.0;
  const DoubleVector shifted = x + magic;
  return {mantissa_minus_1(x - (shifted - magic)), (DoubleVector)((LongVector)shifted << 52)};
}
template <class V> EHRSEQ_INLINE V scale_by(V v, PowerOf2<V> power) { return v * power.scale; }
#endif

template <class V> EHRSEQ_INLINE V exp2(V x) {
  const PowerOf2<V> power = power_of_2(x);
  return scale_by(power.m + 1, power);
}
// 2^x y, the product with 1 + m rounded once
template <class V> EHRSEQ_INLINE V exp2_times(V x, V y) {
  const PowerOf2<V> power = power_of_2(x);
  return scale_by(power.m * y + y, power);
}
// 2^x - 1: to the last bits of itself where |x| < 0.5, of 1 elsewhere
template <class V> EHRSEQ_INLINE V exp2_minus_1(V x) {
  const PowerOf2<V> power = power_of_2(x);
  const V scale = scale_by(V{} + 1, power);
  return scale * power.m + (scale - 1);
}

// 2^x - 1 for |x| <= kSmallExponent, to 1.4e-8 relative.
constexpr float kSmallExponent = 0.25f;
// From this exponent on a state forgets within some 90 steps: too few for its roundings to show.
constexpr float kLongMemoryExponent = 1.0f / 64;
EHRSEQ_INLINE FloatVector exp2_minus_1_small(FloatVector x) {
  FloatVector p = 0.001333355774174226f * x + 0.009630163165778478f;
  p = p * x + 0.05550416452657916f, p = p * x + 0.24022631912246428f, p = p * x + 0.6931471799786546f;
  return p * x;
}

// a + b as the rounded sum and what the rounding lost (Knuth's two-sum; relies on no reordering of sums).
template <class V> EHRSEQ_INLINE void two_sum(V a, V b, V& sum, V& lost) {
  sum = a + b;
  const V from_b = sum - a;
  lost = (a - (sum - from_b)) + (b - from_b);
}
// sum += x, and what the rounding lost to `lost`: for sums over all tiles, of which little may be left in the end
template <class V> EHRSEQ_INLINE void add_exactly(V& sum, V& lost, V x) {
  V rounded, missing;
  two_sum(sum, x, rounded, missing);
  sum = rounded, lost += missing;
}

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
