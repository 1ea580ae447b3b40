// Sixteen floats at a time: vec.h's operations on a 512-bit register, same names and same meaning lane by lane.
//
// Part of vec.h for the unit that defines DIBIT_VEC_AVX512 beside DIBIT_VEC_AVX2. A kernel whose lanes are independent
// of each other gives the same bits on sixteen lanes as on eight.
#pragma once

namespace dibit {
namespace {

using F16 = __m512;
using I16 = __m512i;

DIBIT_INLINE F16 load16(const float* p) { return _mm512_loadu_ps(p); }
DIBIT_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a); }
DIBIT_INLINE F16 splat16(float a) { return _mm512_set1_ps(a); }
DIBIT_INLINE F16 splat_as(F16, float a) { return _mm512_set1_ps(a); }
DIBIT_INLINE F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
DIBIT_INLINE F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
DIBIT_INLINE F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
DIBIT_INLINE F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
DIBIT_INLINE F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
DIBIT_INLINE F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
DIBIT_INLINE F16 zero_where_less(F16 a, F16 key, F16 bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(key, bound, _CMP_NLT_UQ), a);
}
DIBIT_INLINE I16 bits(F16 a) { return _mm512_castps_si512(a); }
DIBIT_INLINE F16 floats(I16 a) { return _mm512_castsi512_ps(a); }
DIBIT_INLINE I16 add(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
template <int N>
DIBIT_INLINE I16 shift_left(I16 a) { return _mm512_slli_epi32(a, N); }

// Eight floats in both halves.
DIBIT_INLINE F16 twice(const float* p) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
DIBIT_INLINE F16 pair(F8 low, F8 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

// half_sums and join_sums of vec.h for both halves of the register at once.
DIBIT_INLINE F16 neighbour_sums(F16 a, F16 b) {
  return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
DIBIT_INLINE F16 half_sums(F16 a, F16 b, F16 c, F16 d) {
  return neighbour_sums(neighbour_sums(a, b), neighbour_sums(c, d));
}
// The four sums of the low halves, then those of the high halves.
DIBIT_INLINE F8 join_halves(F16 a) {
  return _mm512_castps512_ps256(add(_mm512_shuffle_f32x4(a, a, 0x88), _mm512_shuffle_f32x4(a, a, 0xdd)));
}

}  // namespace
}  // namespace dibit
