// Attention of a few query rows over one tile of keys, for the ISA of the including unit (vec.h).
//
// Every score is one chain of fused multiply-adds along the head dim in eight lanes, summed in one order; every output
// element is one chain along the keys. Rows and keys are tiled in registers around those chains, which leaves the
// result's bits alone: a row computed with two others equals the row computed by itself.
#pragma once
#include "cache_body.h"
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

// acc_r[0, V * 8) = acc_r * factor_r + sum over keys [from, to) of weight_r[j] * value_j.
template <int R, int V, Real kReal>
DIBIT_INLINE void weigh_tile(float* acc, int width, const float* factor, const float* weight,
                             const void* const* values, int column, int from, int to) {
  F8 a[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) a[r][v] = mul(load(acc + r * width + column + v * kLanes), splat(factor[r]));
  for (int j = from; j < to; ++j) {
    F8 w[R];
    for (int r = 0; r < R; ++r) w[r] = splat(weight[r * kKeyTile + j]);
    for (int v = 0; v < V; ++v) {
      const F8 x = load_real<kReal>(values[j], column + v * kLanes, width);
      for (int r = 0; r < R; ++r) a[r][v] = fma(w[r], x, a[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(acc + r * width + column + v * kLanes, a[r][v]);
}

#ifdef DIBIT_VEC_AVX512

}  // namespace
}  // namespace dibit

#include "attention_wide.h"

namespace dibit {
namespace {

#else

// Twelve sums, three queries or weights and a key or value fill the sixteen AVX2 registers.
inline constexpr int kRegisterRows = 3;

// Half the sums (vec.h) of q_r . key_j for R rows and 4 keys.
template <int R, Real kReal>
DIBIT_INLINE void dot_four(F8* half, const float* q, const void* const* keys, int width) {
  F8 acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 4; ++j) acc[r][j] = splat(0.0f);
  for (int i = 0; i < width; i += kLanes) {
    F8 a[R];
    for (int r = 0; r < R; ++r) a[r] = load(q + r * width + i);
    for (int j = 0; j < 4; ++j) {
      const F8 key = load_real<kReal>(keys[j], i, width);
      for (int r = 0; r < R; ++r) acc[r][j] = fma(a[r], key, acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) half[r] = half_sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

// score[r, j] = q_r . key_j for R rows and 8 keys. Stored whole: the softmax loads eight at once, and a load that spans
// two recent stores stalls.
template <int R, Real kReal>
DIBIT_INLINE void dot_tile(float* score, const float* q, const void* const* keys, int width) {
  if constexpr (R == 1) {
    // One row meets 8 keys at once: 4 sums would leave the multipliers waiting for each other.
    F8 acc[8];
    for (int j = 0; j < 8; ++j) acc[j] = splat(0.0f);
    for (int i = 0; i < width; i += kLanes) {
      const F8 a = load(q + i);
      for (int j = 0; j < 8; ++j) acc[j] = fma(a, load_real<kReal>(keys[j], i, width), acc[j]);
    }
    store(score, join_sums(half_sums(acc[0], acc[1], acc[2], acc[3]), half_sums(acc[4], acc[5], acc[6], acc[7])));
  } else {
    F8 low[R], high[R];
    dot_four<R, kReal>(low, q, keys, width);
    dot_four<R, kReal>(high, q, keys + 4, width);
    for (int r = 0; r < R; ++r) store(score + r * kKeyTile, join_sums(low[r], high[r]));
  }
}

template <int R, Real kReal>
DIBIT_INLINE void weigh(float* acc, int width, const float* factor, const float* weight, const void* const* values,
                        int from, int to) {
  constexpr int kBlock = R == 1 ? 8 : 4;
  int column = 0;
  for (; column + kBlock * kLanes <= width; column += kBlock * kLanes)
    weigh_tile<R, kBlock, kReal>(acc, width, factor, weight, values, column, from, to);
  for (; column + 2 * kLanes <= width; column += 2 * kLanes)
    weigh_tile<R, 2, kReal>(acc, width, factor, weight, values, column, from, to);
  if (column < width) weigh_tile<R, 1, kReal>(acc, width, factor, weight, values, column, from, to);
}

#endif

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
  const float factor = first(exp(splat(before - now)));
  *running_peak = now;
  *total = __builtin_fmaf(*total, factor, sum(sums));
  return factor;
}

DIBIT_INLINE int most_visible(const int32_t* visible, int rows) {
  int most = 0;
  for (int r = 0; r < rows; ++r) most = visible[r] > most ? visible[r] : most;
  return most;
}

DIBIT_INLINE void fetch_row(const void* row, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// Rows [from, to) of the next tile. All of them at once would wait for each other, and the work at hand for them.
DIBIT_INLINE void fetch(const KeyRows* next, int from, int to) {
  for (int j = from; j < to && j < next->count; ++j) {
    fetch_row(next->keys[j], next->key_bytes);
    fetch_row(next->values[j], next->value_bytes);
  }
}

template <int R, Real kReal>
DIBIT_INLINE void score_rows(const KeyTile& t, int row) {
  const int most = most_visible(t.visible + row, R);
  for (int j = 0; j < most; j += kLanes) {
    if (row == 0) fetch(t.next, j, j + kLanes);
    dot_tile<R, kReal>(t.score + row * kKeyTile + j, t.q + row * t.width, t.keys + j, t.width);
  }
  if (row == 0) fetch(t.next, (most + kLanes - 1) / kLanes * kLanes, kKeyTile);
}

template <int R, Real kReal>
DIBIT_INLINE void weigh_rows(const KeyTile& t, int row) {
  const int32_t* visible = t.visible + row;
  const float* score = t.score + row * kKeyTile;
  float* acc = t.acc + row * t.width;
  int least = visible[0];
  for (int r = 1; r < R; ++r) least = visible[r] < least ? visible[r] : least;
  if (most_visible(visible, R) == 0) return;
  weigh<R, kReal>(acc, t.width, t.factor + row, score, t.values, 0, least);
  // The causal edge: keys that only some of the rows see must not reach the others, not even as 0 * NaN.
  const float one = 1.0f;
  for (int r = 0; r < R; ++r)
    if (visible[r] > least)
      weigh<1, kReal>(acc + r * t.width, t.width, &one, score + r * kKeyTile, t.values, least, visible[r]);
}

template <int kRows>
struct Rows {
  static constexpr int count = kRows;
};

// step(row, Rows<count>) for runs of up to kRegisterRows rows, as even as they can be.
template <class Step>
DIBIT_INLINE void by_rows(int rows, Step step) {
  for (int row = 0, runs = (rows + kRegisterRows - 1) / kRegisterRows; runs > 0; --runs) {
    const int count = (rows - row + runs - 1) / runs;
    if (count == 1) step(row, Rows<1>{});
    if (count == 2) step(row, Rows<2>{});
    if (count == 3) step(row, Rows<3>{});
    if constexpr (kRegisterRows == 6) {
      if (count == 4) step(row, Rows<4>{});
      if (count == 5) step(row, Rows<5>{});
      if (count == 6) step(row, Rows<6>{});
    }
    row += count;
  }
}

// Three passes, so that the long dependent chains of one row's softmax overlap with other rows'.
template <Real kReal>
DIBIT_INLINE void score_tile(const KeyTile& t) {
  by_rows(t.rows, [&](int row, auto run) { score_rows<decltype(run)::count, kReal>(t, row); });
}

template <Real kReal>
DIBIT_INLINE void weigh_tile(const KeyTile& t) {
  by_rows(t.rows, [&](int row, auto run) { weigh_rows<decltype(run)::count, kReal>(t, row); });
}

void attend(const KeyTile& t) {
  switch (t.key_real) {
    case Real::f32: score_tile<Real::f32>(t); break;
    case Real::f16: score_tile<Real::f16>(t); break;
    case Real::bf16: score_tile<Real::bf16>(t); break;
    case Real::i8: score_tile<Real::i8>(t); break;
    case Real::i4: score_tile<Real::i4>(t); break;
    case Real::e4m3: score_tile<Real::e4m3>(t); break;
  }
  for (int row = 0; row < t.rows; ++row)
    t.factor[row] = t.visible[row] == 0 ? 1.0f
                                        : softmax_update(t.score + row * kKeyTile, t.visible[row], t.peak + row,
                                                         t.total + row);
  switch (t.value_real) {
    case Real::f32: weigh_tile<Real::f32>(t); break;
    case Real::f16: weigh_tile<Real::f16>(t); break;
    case Real::bf16: weigh_tile<Real::bf16>(t); break;
    case Real::i8: weigh_tile<Real::i8>(t); break;
    case Real::i4: weigh_tile<Real::i4>(t); break;
    case Real::e4m3: weigh_tile<Real::e4m3>(t); break;
  }
}

void merge(float* running_peak, float* total, float* acc, float next_peak, float next_total, const float* next_acc,
           int width) {
  const float now = next_peak > *running_peak ? next_peak : *running_peak;
  const float past = first(exp(splat(*running_peak - now))), next = first(exp(splat(next_peak - now)));
  *running_peak = now;
  *total = __builtin_fmaf(next_total, next, *total * past);
  for (int i = 0; i < width; i += kLanes)
    store(acc + i, fma(load(next_acc + i), splat(next), mul(load(acc + i), splat(past))));
}

void finish(float* out, const float* acc, float total, int d) {
  const F8 by = splat(total);
  int i = 0;
  for (; i + kLanes <= d; i += kLanes) store(out + i, div(load(acc + i), by));
  for (; i < d; ++i) out[i] = acc[i] / total;
}

template <Real kReal>
DIBIT_INLINE void widen_rows(float* out, const void* rows, int64_t count, int d, int width) {
  const int64_t stride = row_bytes(kReal, d);
  const int whole = d / kLanes * kLanes;
#ifdef DIBIT_VEC_AVX512
  if (!is_codes(kReal) && width == d && width % 16 == 0) {
    for (int64_t i = 0; i < count * d; i += 16) store(out + i, load_sixteen<kReal>(rows, i, d));
    return;
  }
#endif
  for (int64_t r = 0; r < count; ++r) {
    const char* row = static_cast<const char*>(rows) + r * stride;
    for (int i = 0; i < whole; i += kLanes) store(out + r * width + i, load_real<kReal>(row, i, d));
    if (whole < d) store(out + r * width + whole, load_tail<kReal>(row, whole, d));
  }
}

void widen(float* out, const void* rows, Real real, int64_t count, int d, int width) {
  switch (real) {
    case Real::f32: return widen_rows<Real::f32>(out, rows, count, d, width);
    case Real::f16: return widen_rows<Real::f16>(out, rows, count, d, width);
    case Real::bf16: return widen_rows<Real::bf16>(out, rows, count, d, width);
    case Real::i8: return widen_rows<Real::i8>(out, rows, count, d, width);
    case Real::i4: return widen_rows<Real::i4>(out, rows, count, d, width);
    case Real::e4m3: return widen_rows<Real::e4m3>(out, rows, count, d, width);
  }
}

}  // namespace
}  // namespace dibit
