// Vectors of float and double by the vector extensions of GCC and Clang, with the few functions that the losses need.
//
// Included by kernels_<set>.cpp alone, which defines FASTDISTIL_SET (a namespace, so that each instruction set has
// its own symbols) and FASTDISTIL_VECTOR_BYTES.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define FASTDISTIL_INLINE inline __attribute__((always_inline))

namespace fastdistil::FASTDISTIL_SET {

template <class Acc>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int count = FASTDISTIL_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES / 2)));
  typedef uint16_t HalfUnaligned __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES / 2), aligned(2), may_alias));
};

template <>
struct Lanes<double> {
  static constexpr int count = FASTDISTIL_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES), aligned(8), may_alias));
};

template <class Acc>
using Vec = typename Lanes<Acc>::Vec;
using Bits = Lanes<float>::Bits;

template <class Acc>
FASTDISTIL_INLINE Vec<Acc> load(const Acc* p) {
  return *reinterpret_cast<const typename Lanes<Acc>::Unaligned*>(p);
}

template <class Acc>
FASTDISTIL_INLINE void store(Acc* p, Vec<Acc> v) {
  *reinterpret_cast<typename Lanes<Acc>::Unaligned*>(p) = v;
}

template <class Acc>
FASTDISTIL_INLINE Vec<Acc> broadcast(Acc x) {
  return x - Vec<Acc>{};
}

// The second argument where the first is not greater: a NaN in b is kept.
template <class V>
FASTDISTIL_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <class Acc>
FASTDISTIL_INLINE Acc reduce_max(Vec<Acc> v) {
  Acc m = v[0];
  for (int i = 1; i < Lanes<Acc>::count; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <class Acc>
FASTDISTIL_INLINE Acc reduce_add(Vec<Acc> v) {
  Acc total = v[0];
  for (int i = 1; i < Lanes<Acc>::count; ++i) total += v[i];
  return total;
}

// A sum of vectors in double.
template <class Acc>
class Total;

template <>
class Total<float> {
 public:
  FASTDISTIL_INLINE void add(Vec<float> v) {
    Halves halves;
    std::memcpy(&halves, &v, sizeof(v));
    low_ += __builtin_convertvector(halves.low, Vec<double>);
    high_ += __builtin_convertvector(halves.high, Vec<double>);
  }
  FASTDISTIL_INLINE double sum() const { return reduce_add<double>(low_ + high_); }

 private:
  typedef float Half __attribute__((vector_size(FASTDISTIL_VECTOR_BYTES / 2)));
  struct Halves {
    Half low, high;
  };
  Vec<double> low_{}, high_{};
};

template <>
class Total<double> {
 public:
  FASTDISTIL_INLINE void add(Vec<double> v) { lanes_ += v; }
  FASTDISTIL_INLINE double sum() const { return reduce_add<double>(lanes_); }

 private:
  Vec<double> lanes_{};
};

// Below this exp gives 0, because 2^n would leave the normal numbers.
template <class Acc>
constexpr Acc kLowest = sizeof(Acc) == 4 ? -86.9 : -708.0;

// exp(x) for x <= 0 to 1 ulp or so: n = round(x / ln 2), r = x - n ln 2 with ln 2 in two parts (Cody and Waite), and
// the polynomial of Cephes' expf for exp(r). Below kLowest, where all that is meaningless, the result is 0; at -inf
// too. A NaN stays a NaN.
FASTDISTIL_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const V shifted = x * 1.44269504088896341f + kRound;
  const V n = shifted - kRound;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // Pairs of terms, and not one after the other: the length of the chain is what takes the time.
  const V square = r * r;
  V p = (r * 1.9875691500e-4f + 1.3981999507e-3f) * square + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  p = p * square + (r * 1.6666665459e-1f + 5.0000001201e-1f);
  p = p * square + r + 1.0f;
  const V result = (V)((Bits)p + ((Bits)shifted << 23));
  return x < kLowest<float> ? V{} : x == x ? result : x;  // the shift may make a number of a NaN's bits
}

FASTDISTIL_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = x[i] < kLowest<double> ? 0.0 : __builtin_exp(x[i]);
  return x;
}

// log(x) for a normal x > 0, given also x - 1 without the rounding of x: near 1 that decides the accuracy.
FASTDISTIL_INLINE Vec<float> log_near_one(Vec<float> x, Vec<float> x_minus_one) {
  using V = Vec<float>;
  using Int = Lanes<float>::Int;
  const Int exponent = ((Int)x - 0x3f3504f3) >> 23;  // x = 2^exponent * f, f in [sqrt(1/2), sqrt(2))
  const V f = (V)((Int)x - (exponent << 23));
  const V e = __builtin_convertvector(exponent, V);
  const V g = exponent == 0 ? x_minus_one : f - 1.0f;
  const V square = g * g;
  V p = g * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * g + 1.1676998740e-1f;
  p = p * g - 1.2420140846e-1f;
  p = p * g + 1.4249322787e-1f;
  p = p * g - 1.6668057665e-1f;
  p = p * g + 2.0000714765e-1f;
  p = p * g - 2.4999993993e-1f;
  p = p * g + 3.3333331174e-1f;
  V y = p * g * square;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * square;
  const V result = g + y + e * 0.693359375f;
  return x == x ? result : x;  // as above
}

FASTDISTIL_INLINE Vec<double> log_near_one(Vec<double> x, Vec<double> x_minus_one) {
  for (int i = 0; i < Lanes<double>::count; ++i) {
    x[i] = x[i] > 0.5 && x[i] < 2.0 ? __builtin_log1p(x_minus_one[i]) : __builtin_log(x[i]);
  }
  return x;
}

// bfloat16 is the upper half of a float32; rounding to it is to nearest, ties to even.
FASTDISTIL_INLINE Vec<float> from_bfloat16(Bits h) { return (Vec<float>)(h << 16); }

FASTDISTIL_INLINE Bits to_bfloat16(Vec<float> x) {
  const Bits u = (Bits)x;
  const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x == x ? rounded : (u >> 16) | 0x40u;
}

// float16 by integer arithmetic, so that no instruction set needs its own conversion. The exponent moves by 112,
// which a product does for normal and subnormal numbers alike; infinities and NaNs get the largest exponent.
FASTDISTIL_INLINE Vec<float> from_float16(Bits h) {
  const Bits magnitude = (h & 0x7fffu) << 13;
  const Bits finite = (Bits)((Vec<float>)magnitude * 0x1p112f);
  const Bits special = magnitude | 0x7f800000u;
  return (Vec<float>)((magnitude >= (0x7c00u << 13) ? special : finite) | ((h & 0x8000u) << 16));
}

FASTDISTIL_INLINE Bits to_float16(Vec<float> x) {
  const Bits u = (Bits)x;
  const Bits magnitude = u & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal's 2^-24 units, rounded to even, in the low bits.
  const Bits subnormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  Bits result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : result;
  return result | ((u >> 16) & 0x8000u);
}

FASTDISTIL_INLINE Bits load_half(const uint16_t* p) {
  const Lanes<float>::Half h = *reinterpret_cast<const Lanes<float>::HalfUnaligned*>(p);
  return __builtin_convertvector(h, Bits);
}

FASTDISTIL_INLINE void store_half(uint16_t* p, Bits h) {
  *reinterpret_cast<Lanes<float>::HalfUnaligned*>(p) = __builtin_convertvector(h, Lanes<float>::Half);
}

// target[0, n) = source[0, n) converted; the tail goes through a padded vector.
template <Vec<float> (*convert)(Bits)>
FASTDISTIL_INLINE void convert_halves(const uint16_t* source, int64_t n, float* target) {
  constexpr int W = Lanes<float>::count;
  int64_t i = 0;
  for (; i + W <= n; i += W) store<float>(target + i, convert(load_half(source + i)));
  if (i == n) return;
  uint16_t halves[W] = {};
  float values[W];
  for (int64_t j = i; j < n; ++j) halves[j - i] = source[j];
  store<float>(values, convert(load_half(halves)));
  for (int64_t j = i; j < n; ++j) target[j] = values[j - i];
}

template <Bits (*convert)(Vec<float>)>
FASTDISTIL_INLINE void convert_floats(const float* source, int64_t n, uint16_t* target) {
  constexpr int W = Lanes<float>::count;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_half(target + i, convert(load<float>(source + i)));
  if (i == n) return;
  float values[W] = {};
  uint16_t halves[W];
  for (int64_t j = i; j < n; ++j) values[j - i] = source[j];
  store_half(halves, convert(load<float>(values)));
  for (int64_t j = i; j < n; ++j) target[j] = halves[j - i];
}

template <class Acc, class From>
FASTDISTIL_INLINE void cast(const From* source, int64_t n, Acc* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<Acc>(source[i]);
}

// Double accumulation meets 16-bit numbers only when student and teacher differ in dtype: speed does not matter
// there.
inline void to_acc(const void* source, Dtype dtype, int64_t n, float* target) {
  switch (dtype) {
    case Dtype::float32: std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float)); break;
    case Dtype::float64: cast(static_cast<const double*>(source), n, target); break;
    case Dtype::bfloat16: convert_halves<from_bfloat16>(static_cast<const uint16_t*>(source), n, target); break;
    case Dtype::float16: convert_halves<from_float16>(static_cast<const uint16_t*>(source), n, target); break;
  }
}

inline void to_acc(const void* source, Dtype dtype, int64_t n, double* target) {
  if (dtype == Dtype::float64) {
    std::memcpy(target, source, static_cast<size_t>(n) * sizeof(double));
  } else if (dtype == Dtype::float32) {
    cast(static_cast<const float*>(source), n, target);
  } else {
    constexpr int64_t kPiece = 64;
    float piece[kPiece] = {};
    for (int64_t i = 0; i < n; i += kPiece) {
      const int64_t m = n - i < kPiece ? n - i : kPiece;
      to_acc(static_cast<const uint16_t*>(source) + i, dtype, m, piece);
      cast(piece, m, target + i);
    }
  }
}

// Results are in the accumulation type itself, or in 16 bits from float.
inline void from_acc(const float* source, int64_t n, Dtype dtype, void* target) {
  if (dtype == Dtype::bfloat16) {
    convert_floats<to_bfloat16>(source, n, static_cast<uint16_t*>(target));
  } else if (dtype == Dtype::float16) {
    convert_floats<to_float16>(source, n, static_cast<uint16_t*>(target));
  } else {
    std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
  }
}

inline void from_acc(const double* source, int64_t n, Dtype, void* target) {
  std::memcpy(target, source, static_cast<size_t>(n) * sizeof(double));
}

inline int64_t dtype_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// True where memory of this dtype can be used as it stands.
template <class Acc>
FASTDISTIL_INLINE bool is_acc(Dtype dtype) {
  return dtype == (sizeof(Acc) == 8 ? Dtype::float64 : Dtype::float32);
}

}  // namespace fastdistil::FASTDISTIL_SET
