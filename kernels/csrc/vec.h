// Eight floats at a time, so that a kernel is written once: AVX2 for the unit that defines DIBIT_VEC_AVX2 after its
// `#pragma GCC target` (whose macros g++ 12 sets too late to test), plain C++ elsewhere.
//
// Included by one unit per ISA. Everything here has internal linkage, and nothing is taken from the standard library's
// templates, whose bodies the linker could share between units of different ISAs.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef DIBIT_VEC_AVX2
#include <immintrin.h>
#endif

#define DIBIT_INLINE static inline __attribute__((always_inline))

namespace dibit {
namespace {

inline constexpr int kLanes = 8;

DIBIT_INLINE float from_bits(uint32_t raw) {
  float a;
  std::memcpy(&a, &raw, sizeof a);
  return a;
}
DIBIT_INLINE uint32_t to_bits(float a) {
  uint32_t raw;
  std::memcpy(&raw, &a, sizeof raw);
  return raw;
}

#ifdef DIBIT_VEC_AVX2

using F8 = __m256;
using I8 = __m256i;

DIBIT_INLINE F8 load(const float* p) { return _mm256_loadu_ps(p); }
DIBIT_INLINE void store(float* p, F8 a) { _mm256_storeu_ps(p, a); }
DIBIT_INLINE F8 splat(float a) { return _mm256_set1_ps(a); }
DIBIT_INLINE F8 add(F8 a, F8 b) { return _mm256_add_ps(a, b); }
DIBIT_INLINE F8 sub(F8 a, F8 b) { return _mm256_sub_ps(a, b); }
DIBIT_INLINE F8 mul(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
DIBIT_INLINE F8 div(F8 a, F8 b) { return _mm256_div_ps(a, b); }
DIBIT_INLINE F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand when either is NaN, in both bodies.
DIBIT_INLINE F8 max(F8 a, F8 b) { return _mm256_max_ps(a, b); }
DIBIT_INLINE F8 min(F8 a, F8 b) { return _mm256_min_ps(a, b); }
DIBIT_INLINE F8 zero_where_less(F8 a, F8 key, F8 bound) {
  return _mm256_andnot_ps(_mm256_cmp_ps(key, bound, _CMP_LT_OQ), a);
}
DIBIT_INLINE I8 bits(F8 a) { return _mm256_castps_si256(a); }
DIBIT_INLINE F8 floats(I8 a) { return _mm256_castsi256_ps(a); }
DIBIT_INLINE I8 add(I8 a, I8 b) { return _mm256_add_epi32(a, b); }
DIBIT_INLINE I8 splat_bits(uint32_t a) { return _mm256_set1_epi32(static_cast<int32_t>(a)); }
template <int N>
DIBIT_INLINE I8 shift_left(I8 a) { return _mm256_slli_epi32(a, N); }

// Four vectors half summed, and two such results to the eight sums; each ((a0 + a1) + (a2 + a3)) + ((a4 + ...) + ...).
DIBIT_INLINE F8 half_sums(F8 a, F8 b, F8 c, F8 d) {
  return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
}
DIBIT_INLINE F8 join_sums(F8 a, F8 b) {
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
DIBIT_INLINE float sum(F8 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Any number when a lane is NaN.
DIBIT_INLINE float peak(F8 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
DIBIT_INLINE float first(F8 a) { return _mm256_cvtss_f32(a); }

DIBIT_INLINE F8 load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DIBIT_INLINE void store_half(uint16_t* p, F8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
DIBIT_INLINE F8 splat_half(uint16_t a) { return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(a))); }
DIBIT_INLINE float first_of_half(uint16_t a) { return first(splat_half(a)); }
// Eight signed bytes; eight nibbles, the low one of a byte first.
DIBIT_INLINE F8 load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
DIBIT_INLINE F8 load_u4(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  const I8 all = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  return _mm256_cvtepi32_ps(_mm256_and_si256(all, _mm256_set1_epi32(15)));
}
// Eight bytes of e4m3: exponent and mantissa, at their place in a half, are 2^8 too small, and the product is exact.
DIBIT_INLINE F8 load_e4m3(const uint8_t* p) {
  // Sign extension leaves the sign in the bits 7 to 15, two of which stay.
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m128i most = _mm_set1_epi16(0x3f80);
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, most), most);
  const __m128i quiet = _mm_and_si128(nan, _mm_set1_epi16(0x7e00));
  return mul(_mm256_cvtph_ps(_mm_or_si128(half, quiet)), splat(256.0f));
}
DIBIT_INLINE F8 load_bfloat(const uint16_t* p) {
  const I8 wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return floats(shift_left<16>(wide));
}
DIBIT_INLINE void store_bfloat(uint16_t* p, F8 a) {
  const I8 raw = bits(a), one = splat_bits(1);
  const I8 odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), one);
  const I8 rounded = _mm256_srli_epi32(add(add(raw, splat_bits(0x7fff)), odd), 16);
  const I8 number = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_ORD_Q));
  const I8 kept = _mm256_blendv_epi8(splat_bits(0x7fc0), rounded, number);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else

// Two vectors of four: the width that SSE2 and NEON have, which every 64-bit target starts from.
typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t I4 __attribute__((vector_size(16)));
struct F8 {
  F4 lo, hi;
};
struct I8 {
  I4 lo, hi;
};

DIBIT_INLINE F8 load(const float* p) {
  F8 a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
DIBIT_INLINE void store(float* p, F8 a) { std::memcpy(p, &a, sizeof a); }
DIBIT_INLINE F8 splat(float a) { return {F4{a, a, a, a}, F4{a, a, a, a}}; }
DIBIT_INLINE F8 add(F8 a, F8 b) { return {a.lo + b.lo, a.hi + b.hi}; }
DIBIT_INLINE F8 sub(F8 a, F8 b) { return {a.lo - b.lo, a.hi - b.hi}; }
DIBIT_INLINE F8 mul(F8 a, F8 b) { return {a.lo * b.lo, a.hi * b.hi}; }
DIBIT_INLINE F8 div(F8 a, F8 b) { return {a.lo / b.lo, a.hi / b.hi}; }
DIBIT_INLINE F8 fma(F8 a, F8 b, F8 c) { return add(mul(a, b), c); }
DIBIT_INLINE F8 max(F8 a, F8 b) { return {a.lo > b.lo ? a.lo : b.lo, a.hi > b.hi ? a.hi : b.hi}; }
DIBIT_INLINE F8 min(F8 a, F8 b) { return {a.lo < b.lo ? a.lo : b.lo, a.hi < b.hi ? a.hi : b.hi}; }
DIBIT_INLINE F8 zero_where_less(F8 a, F8 key, F8 bound) {
  const F4 none = {0, 0, 0, 0};
  return {key.lo < bound.lo ? none : a.lo, key.hi < bound.hi ? none : a.hi};
}
DIBIT_INLINE I8 bits(F8 a) { return {reinterpret_cast<I4>(a.lo), reinterpret_cast<I4>(a.hi)}; }
DIBIT_INLINE F8 floats(I8 a) { return {reinterpret_cast<F4>(a.lo), reinterpret_cast<F4>(a.hi)}; }
DIBIT_INLINE I8 add(I8 a, I8 b) { return {a.lo + b.lo, a.hi + b.hi}; }
DIBIT_INLINE I8 splat_bits(uint32_t a) { return {I4{a, a, a, a}, I4{a, a, a, a}}; }
template <int N>
DIBIT_INLINE I8 shift_left(I8 a) { return {a.lo << N, a.hi << N}; }

DIBIT_INLINE float sum(F4 a) { return (a[0] + a[1]) + (a[2] + a[3]); }
DIBIT_INLINE F8 half_sums(F8 a, F8 b, F8 c, F8 d) {
  return {F4{sum(a.lo), sum(b.lo), sum(c.lo), sum(d.lo)}, F4{sum(a.hi), sum(b.hi), sum(c.hi), sum(d.hi)}};
}
DIBIT_INLINE F8 join_sums(F8 a, F8 b) { return {a.lo + a.hi, b.lo + b.hi}; }
DIBIT_INLINE float sum(F8 a) { return sum(a.lo + a.hi); }
DIBIT_INLINE float peak(F8 a) {
  const F4 four = a.lo > a.hi ? a.lo : a.hi;
  const float low = four[0] > four[1] ? four[0] : four[1], high = four[2] > four[3] ? four[2] : four[3];
  return low > high ? low : high;
}
DIBIT_INLINE float first(F8 a) { return a.lo[0]; }

DIBIT_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A half's exponent and mantissa, read as float, are 2^112 too small; the product is exact, subnormals included.
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}
DIBIT_INLINE uint16_t float_to_half(float a) {
  const uint32_t raw = to_bits(a), sign = raw >> 16 & 0x8000, rest = raw & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  if (rest >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  // Below the smallest normal half: the sum with 0.5, whose last bit is 2^-24, rounds to a multiple of it.
  if (rest < 0x38800000) return static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
DIBIT_INLINE F8 load_half(const uint16_t* p) {
  float wide[8];
  for (int i = 0; i < 8; ++i) wide[i] = half_to_float(p[i]);
  return load(wide);
}
DIBIT_INLINE float first_of_half(uint16_t a) { return half_to_float(a); }
DIBIT_INLINE F8 splat_half(uint16_t a) { return splat(half_to_float(a)); }
DIBIT_INLINE F8 load_i8(const int8_t* p) {
  float wide[8];
  for (int i = 0; i < 8; ++i) wide[i] = static_cast<float>(p[i]);
  return load(wide);
}
DIBIT_INLINE F8 load_u4(const uint8_t* p) {
  float wide[8];
  for (int i = 0; i < 8; ++i) wide[i] = static_cast<float>(p[i / 2] >> i % 2 * 4 & 15);
  return load(wide);
}
DIBIT_INLINE void store_half(uint16_t* p, F8 a) {
  float wide[8];
  store(wide, a);
  for (int i = 0; i < 8; ++i) p[i] = float_to_half(wide[i]);
}
DIBIT_INLINE F8 load_e4m3(const uint8_t* p) {
  float wide[8];
  for (int i = 0; i < 8; ++i) {
    const uint32_t sign = (p[i] & 0x80u) << 8, rest = p[i] & 0x7fu;
    wide[i] = half_to_float(static_cast<uint16_t>(sign | rest << 7 | (rest == 0x7f ? 0x7e00 : 0))) * 256.0f;
  }
  return load(wide);
}
DIBIT_INLINE F8 load_bfloat(const uint16_t* p) {
  float wide[8];
  for (int i = 0; i < 8; ++i) wide[i] = from_bits(static_cast<uint32_t>(p[i]) << 16);
  return load(wide);
}
DIBIT_INLINE void store_bfloat(uint16_t* p, F8 a) {
  float wide[8];
  store(wide, a);
  for (int i = 0; i < 8; ++i) {
    const uint32_t raw = to_bits(wide[i]);
    p[i] = wide[i] != wide[i] ? 0x7fc0 : static_cast<uint16_t>((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
  }
}

#endif

DIBIT_INLINE F8 splat_as(F8, float a) { return splat(a); }

// To the nearest, halves to even; beyond 448 it stays there, and what is not finite is 0x7f.
DIBIT_INLINE uint8_t float_to_e4m3(float a) {
  const uint32_t raw = to_bits(a), sign = raw >> 24 & 0x80, rest = raw & 0x7fffffff;
  const uint32_t kept = rest < 0x43e00000 ? rest : 0x43e00000;
  const uint32_t normal = (kept - 0x3c000000 + 0x7ffff + (kept >> 20 & 1)) >> 20;
  // Below the smallest normal one: the sum with 2^14, whose last bit is 2^-9, rounds to a multiple of it.
  const uint32_t small = to_bits(from_bits(kept) + 0x1p14f) - 0x46800000;
  const uint32_t code = sign | (kept < 0x3c800000 ? small : normal);
  return static_cast<uint8_t>(rest < 0x7f800000 ? code : 0x7f);
}
DIBIT_INLINE void store_e4m3(uint8_t* p, F8 a) {
  float wide[8];
  store(wide, a);
  for (int i = 0; i < 8; ++i) p[i] = float_to_e4m3(wide[i]);
}

}  // namespace
}  // namespace dibit

#ifdef DIBIT_VEC_AVX512
#include "vec512.h"
#endif

namespace dibit {
namespace {

// e^x, relative error below 2e-7 with or without fused multiply-adds (tests measure it through silu_mul). e^0 is
// exactly 1, e^x is 0 below x = -87 (so for -inf) and inf above 88.4, and NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2; e^r by a minimax polynomial of degree 6, 2^n by its exponent bits. ln2's upper
// part has 9 bits, so that n times it is exact.
template <class F>
DIBIT_INLINE F exp_of(F x) {
  const F round_shift = splat_as(x, 0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const F y = min(splat_as(x, 89.0f), x);
  const F shifted = fma(y, splat_as(x, 1.44269502f), round_shift);
  const F n = sub(shifted, round_shift);
  const F r = fma(n, splat_as(x, 0x1.bd0106p-13f), fma(n, splat_as(x, -0x1.63p-1f), y));
  F p = splat_as(x, 0x1.6a21acp-10f);
  p = fma(p, r, splat_as(x, 0x1.123b6ap-7f));
  p = fma(p, r, splat_as(x, 0x1.5558fap-5f));
  p = fma(p, r, splat_as(x, 0x1.555490p-3f));
  p = fma(p, r, splat_as(x, 0x1.fffffcp-2f));
  p = add(fma(mul(r, r), p, r), splat_as(x, 1.0f));
  // A product, not an addition to p's exponent: that would turn some NaNs into numbers.
  const F power = floats(add(shift_left<23>(bits(shifted)), bits(splat_as(x, 1.0f))));
  return zero_where_less(mul(p, power), x, splat_as(x, -87.0f));
}
DIBIT_INLINE F8 exp(F8 x) { return exp_of(x); }

}  // namespace
}  // namespace dibit
