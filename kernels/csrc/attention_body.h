// Attention of a few query rows over one tile of keys, for the ISA of the including unit (vec.h).
//
// Every score is one chain of fused multiply-adds along the head dim in eight lanes, summed in one order; every output
// element is one chain along the keys. Rows and keys are tiled in registers around those chains, which leaves the
// result's bits alone: a row computed with two others equals the row computed by itself.
#pragma once
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

// score[r * kKeyTile + j] = q_r . key_j for R rows and K keys, K a multiple of 4.
template <int R, int K>
DIBIT_INLINE void dot_tile(float* score, const float* q, const float* const* keys, int width) {
  F8 acc[R][K];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < K; ++j) acc[r][j] = splat(0.0f);
  for (int i = 0; i < width; i += kLanes) {
    F8 a[R];
    for (int r = 0; r < R; ++r) a[r] = load(q + r * width + i);
    for (int j = 0; j < K; ++j) {
      const F8 key = load(keys[j] + i);
      for (int r = 0; r < R; ++r) acc[r][j] = fma(a[r], key, acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < K; j += 4)
      store_sums(score + r * kKeyTile + j, acc[r][j], acc[r][j + 1], acc[r][j + 2], acc[r][j + 3]);
}

// Scores to weights in place; returns the factor that brings the row's earlier sums to the new peak.
DIBIT_INLINE float softmax_update(float* score, int visible, float* running_peak, float* total) {
  const int padded = (visible + kLanes - 1) / kLanes * kLanes;
  for (int j = visible; j < padded; ++j) score[j] = -__builtin_inff();
  F8 most = load(score);
  for (int j = kLanes; j < padded; j += kLanes) most = max(most, load(score + j));
  const float tile_peak = peak(most), before = *running_peak;
  const float now = tile_peak > before ? tile_peak : before;
  F8 sums = splat(0.0f);
  for (int j = 0; j < padded; j += kLanes) {
    const F8 weight = exp(sub(load(score + j), splat(now)));
    store(score + j, weight);
    sums = add(sums, weight);
  }
  float factor[kLanes];
  store(factor, exp(splat(before - now)));
  *running_peak = now;
  *total = __builtin_fmaf(*total, factor[0], sum(sums));
  return factor[0];
}

// acc_r[0, V * 8) = acc_r * factor_r + sum over keys [from, to) of weight_r[j] * value_j.
template <int R, int V>
DIBIT_INLINE void weigh_tile(float* acc, int width, const float* factor, const float* weight,
                             const float* const* values, int column, int from, int to) {
  F8 a[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) a[r][v] = mul(load(acc + r * width + column + v * kLanes), splat(factor[r]));
  for (int j = from; j < to; ++j) {
    const float* value = values[j] + column;
    F8 w[R];
    for (int r = 0; r < R; ++r) w[r] = splat(weight[r * kKeyTile + j]);
    for (int v = 0; v < V; ++v) {
      const F8 x = load(value + v * kLanes);
      for (int r = 0; r < R; ++r) a[r][v] = fma(w[r], x, a[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(acc + r * width + column + v * kLanes, a[r][v]);
}

template <int R>
DIBIT_INLINE void weigh(float* acc, int width, const float* factor, const float* weight, const float* const* values,
                        int from, int to) {
  constexpr int kBlock = R == 1 ? 8 : 4;
  int column = 0;
  for (; column + kBlock * kLanes <= width; column += kBlock * kLanes)
    weigh_tile<R, kBlock>(acc, width, factor, weight, values, column, from, to);
  for (; column + 2 * kLanes <= width; column += 2 * kLanes)
    weigh_tile<R, 2>(acc, width, factor, weight, values, column, from, to);
  if (column < width) weigh_tile<R, 1>(acc, width, factor, weight, values, column, from, to);
}

template <int R>
DIBIT_INLINE void attend_rows(const KeyTile& t, int row) {
  constexpr int kKeys = R == 1 ? 8 : 4;
  alignas(32) float score[R * kKeyTile];
  float factor[R];
  const int32_t* visible = t.visible + row;
  int least = visible[0], most = visible[0];
  for (int r = 1; r < R; ++r) {
    least = visible[r] < least ? visible[r] : least;
    most = visible[r] > most ? visible[r] : most;
  }
  if (most == 0) return;
  for (int j = 0; j < most; j += kKeys)
    dot_tile<R, kKeys>(score + j, t.q + static_cast<int64_t>(row) * t.width, t.keys + j, t.width);
  for (int r = 0; r < R; ++r)
    factor[r] = visible[r] == 0
                    ? 1.0f
                    : softmax_update(score + r * kKeyTile, visible[r], t.peak + row + r, t.total + row + r);
  float* acc = t.acc + static_cast<int64_t>(row) * t.width;
  weigh<R>(acc, t.width, factor, score, t.values, 0, least);
  // The causal edge: keys that only some of the rows see must not reach the others, not even as 0 * NaN.
  const float one = 1.0f;
  for (int r = 0; r < R; ++r)
    if (visible[r] > least)
      weigh<1>(acc + r * t.width, t.width, &one, score + r * kKeyTile, t.values, least, visible[r]);
}

// Three rows fill the sixteen AVX2 registers (12 sums, 3 queries or weights, 1 key or value).
void attend(const KeyTile& t) {
  int row = 0;
  while (t.rows - row >= 3 && t.rows - row != 4) attend_rows<3>(t, row), row += 3;
  while (t.rows - row >= 2) attend_rows<2>(t, row), row += 2;
  if (row < t.rows) attend_rows<1>(t, row);
}

void merge(float* running_peak, float* total, float* acc, float next_peak, float next_total, const float* next_acc,
           int width) {
  const float now = next_peak > *running_peak ? next_peak : *running_peak;
  float past[kLanes], next[kLanes];
  store(past, exp(splat(*running_peak - now)));
  store(next, exp(splat(next_peak - now)));
  *running_peak = now;
  *total = __builtin_fmaf(next_total, next[0], *total * past[0]);
  for (int i = 0; i < width; i += kLanes)
    store(acc + i, fma(load(next_acc + i), splat(next[0]), mul(load(acc + i), splat(past[0]))));
}

void finish(float* out, const float* acc, float total, int d) {
  const F8 by = splat(total);
  int i = 0;
  for (; i + kLanes <= d; i += kLanes) store(out + i, div(load(acc + i), by));
  for (; i < d; ++i) out[i] = acc[i] / total;
}

template <Real kReal>
DIBIT_INLINE F8 load_real(const void* p, int64_t i) {
  if constexpr (kReal == Real::f32) return load(static_cast<const float*>(p) + i);
  if constexpr (kReal == Real::f16) return load_half(static_cast<const uint16_t*>(p) + i);
  if constexpr (kReal == Real::bf16) return load_bfloat(static_cast<const uint16_t*>(p) + i);
}

template <Real kReal>
DIBIT_INLINE void widen_rows(float* out, const void* rows, int64_t count, int d, int width) {
  constexpr int64_t kBytes = kReal == Real::f32 ? 4 : 2;
  const int whole = d / kLanes * kLanes;
  for (int64_t r = 0; r < count; ++r) {
    const char* row = static_cast<const char*>(rows) + r * d * kBytes;
    for (int i = 0; i < whole; i += kLanes) store(out + r * width + i, load_real<kReal>(row, i));
    if (whole < d) {
      alignas(32) char tail[kLanes * 4] = {};
      std::memcpy(tail, row + whole * kBytes, (d - whole) * kBytes);
      store(out + r * width + whole, load_real<kReal>(tail, 0));
    }
  }
}

void widen(float* out, const void* rows, Real real, int64_t count, int d, int width) {
  if (real == Real::f16) widen_rows<Real::f16>(out, rows, count, d, width);
  else if (real == Real::bf16) widen_rows<Real::bf16>(out, rows, count, d, width);
  else widen_rows<Real::f32>(out, rows, count, d, width);
}

}  // namespace
}  // namespace dibit
