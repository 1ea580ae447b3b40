// The register tiles of attention_body.h with AVX-512: two keys to a register for scores, sixteen columns for values.
//
// Each half of a register holds the eight chains of one key, each lane one output element, so the bits are those of
// eight lanes.
#pragma once
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

// Six rows of four sums, six queries and a key, or six rows of four sums, six weights and four values.
inline constexpr int kRegisterRows = 6;

template <Real kReal>
DIBIT_INLINE F16 load_pair(const void* low, const void* high, int64_t i, int d) {
  if constexpr (kReal != Real::f16) return pair(load_real<kReal>(low, i, d), load_real<kReal>(high, i, d));
  const auto half = [i](const void* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
  };
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(half(low)), half(high), 1));
}

template <Real kReal>
DIBIT_INLINE F16 load_sixteen(const void* p, int64_t i, int d) {
  if constexpr (kReal == Real::f32) return load16(static_cast<const float*>(p) + i);
  if constexpr (is_codes(kReal) || kReal == Real::e4m3)
    return pair(load_real<kReal>(p, i, d), load_real<kReal>(p, i + kLanes, d));
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
  if constexpr (kReal == Real::f16) return _mm512_cvtph_ps(raw);
  return floats(shift_left<16>(_mm512_cvtepu16_epi32(raw)));
}

// score[r, j] = q_r . key_j for R rows and 8 keys.
template <int R, Real kReal>
DIBIT_INLINE void dot_tile(float* score, const float* q, const void* const* keys, int width) {
  F16 acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 4; ++j) acc[r][j] = splat16(0.0f);
  for (int i = 0; i < width; i += kLanes) {
    F16 a[R];
    for (int r = 0; r < R; ++r) a[r] = twice(q + r * width + i);
    for (int j = 0; j < 4; ++j) {
      const F16 two = load_pair<kReal>(keys[j], keys[j + 4], i, width);
      for (int r = 0; r < R; ++r) acc[r][j] = fma(a[r], two, acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    store(score + r * kKeyTile, join_halves(half_sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3])));
}

template <int R, int V, Real kReal>
DIBIT_INLINE void weigh_wide(float* acc, int width, const float* factor, const float* weight,
                             const void* const* values, int column, int from, int to) {
  F16 a[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) a[r][v] = mul(load16(acc + r * width + column + v * 16), splat16(factor[r]));
  for (int j = from; j < to; ++j) {
    F16 w[R];
    for (int r = 0; r < R; ++r) w[r] = splat16(weight[r * kKeyTile + j]);
    for (int v = 0; v < V; ++v) {
      const F16 x = load_sixteen<kReal>(values[j], column + v * 16, width);
      for (int r = 0; r < R; ++r) a[r][v] = fma(w[r], x, a[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(acc + r * width + column + v * 16, a[r][v]);
}

// acc_r = acc_r * factor_r + sum over keys [from, to) of weight_r[j] * value_j.
template <int R, Real kReal>
DIBIT_INLINE void weigh(float* acc, int width, const float* factor, const float* weight, const void* const* values,
                        int from, int to) {
  int column = 0;
  for (; column + 64 <= width; column += 64)
    weigh_wide<R, 4, kReal>(acc, width, factor, weight, values, column, from, to);
  for (; column + 16 <= width; column += 16)
    weigh_wide<R, 1, kReal>(acc, width, factor, weight, values, column, from, to);
  if (column < width) weigh_tile<R, 1, kReal>(acc, width, factor, weight, values, column, from, to);
}

}  // namespace
}  // namespace dibit
