// Attention of many query rows over one tile of keys, a row to a lane, for the AVX ISAs.
//
// With enough rows to fill a register no sum ever crosses lanes, and a key's element is one broadcast for all rows.
// The arithmetic is that of attention_body.h to the bit: a score is eight chains of fused multiply-adds summed in the
// order of half_sums and join_sums, a row's weights are summed in eight chains, an output element is one chain.
#pragma once
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

#ifdef DIBIT_VEC_AVX512
using Wide = F16;
inline constexpr int kWide = 16, kScoreKeys = 4, kColumns = 8;
DIBIT_INLINE Wide load_wide(const float* p) { return load16(p); }
DIBIT_INLINE Wide splat_wide(float a) { return splat16(a); }
// Lane by lane: `yes` where the row sees key j.
DIBIT_INLINE Wide where_seen(Wide yes, Wide no, const int32_t* visible, int j) {
  return _mm512_mask_mov_ps(no, _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(visible), _mm512_set1_epi32(j)), yes);
}
#else
using Wide = F8;
inline constexpr int kWide = 8, kScoreKeys = 2, kColumns = 4;
DIBIT_INLINE Wide load_wide(const float* p) { return load(p); }
DIBIT_INLINE Wide splat_wide(float a) { return splat(a); }
DIBIT_INLINE Wide where_seen(Wide yes, Wide no, const int32_t* visible, int j) {
  const I8 seen = _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const I8*>(visible)), _mm256_set1_epi32(j));
  return _mm256_blendv_ps(no, yes, floats(seen));
}
#endif

// out[v][j] = the sum of the chains [kFirst, kFirst + kCount) of q_v . key_j.
template <int V, int kFirst, int kCount>
DIBIT_INLINE void chain_sums(Wide (&out)[V][kScoreKeys], const float* q, int stride, const float* keys, int width) {
  if constexpr (kCount == 1) {
    for (int v = 0; v < V; ++v)
      for (int j = 0; j < kScoreKeys; ++j) out[v][j] = splat_wide(0.0f);
    for (int i = kFirst; i < width; i += kLanes) {
      Wide a[V];
      for (int v = 0; v < V; ++v) a[v] = load_wide(q + i * stride + v * kWide);
      for (int j = 0; j < kScoreKeys; ++j) {
        const Wide key = splat_wide(keys[j * width + i]);
        for (int v = 0; v < V; ++v) out[v][j] = fma(a[v], key, out[v][j]);
      }
    }
  } else {
    Wide other[V][kScoreKeys];
    chain_sums<V, kFirst, kCount / 2>(out, q, stride, keys, width);
    chain_sums<V, kFirst + kCount / 2, kCount / 2>(other, q, stride, keys, width);
    for (int v = 0; v < V; ++v)
      for (int j = 0; j < kScoreKeys; ++j) out[v][j] = add(out[v][j], other[v][j]);
  }
}

template <int V>
DIBIT_INLINE void score_lanes(const LaneTile& t, int row, int most) {
  for (int key = 0; key < most; key += kScoreKeys) {
    Wide sums[V][kScoreKeys];
    chain_sums<V, 0, kLanes>(sums, t.q + row, t.stride, t.keys + key * t.width, t.width);
    for (int j = 0; j < kScoreKeys; ++j)
      for (int v = 0; v < V; ++v) store(t.score + (key + j) * t.stride + row + v * kWide, sums[v][j]);
  }
}

// softmax_update of attention_body.h for kWide rows. A row that sees none of the keys keeps its state.
DIBIT_INLINE void softmax_lanes(const LaneTile& t, int row, int least, int most) {
  const int32_t* visible = t.visible + row;
  float* score = t.score + row;
  const int padded = (most + kLanes - 1) / kLanes * kLanes;
  const Wide nothing = splat_wide(-__builtin_inff());
  Wide tile_peak = nothing;
  for (int j = 0; j < padded; ++j) {
    Wide s = load_wide(score + j * t.stride);
    if (j >= least) {
      s = where_seen(s, nothing, visible, j);
      store(score + j * t.stride, s);
    }
    tile_peak = max(tile_peak, s);
  }
  const Wide before = load_wide(t.peak + row), now = max(tile_peak, before);
  Wide sums[kLanes];
  for (int l = 0; l < kLanes; ++l) sums[l] = splat_wide(0.0f);
  for (int j = 0; j < padded; j += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const Wide weight = exp_of(sub(load_wide(score + (j + l) * t.stride), now));
      store(score + (j + l) * t.stride, weight);
      sums[l] = add(sums[l], weight);
    }
  for (int l = 0; l < 4; ++l) sums[l] = add(sums[l], sums[l + 4]);
  const Wide sum = add(add(sums[0], sums[2]), add(sums[1], sums[3]));
  const Wide factor = exp_of(sub(before, now));
  store(t.factor + row, factor);
  store(t.peak + row, now);
  store(t.total + row, fma(load_wide(t.total + row), factor, sum));
}

template <int V>
DIBIT_INLINE void weigh_lanes(const LaneTile& t, int row, int least, int most) {
  for (int column = 0; column < t.width; column += kColumns) {
    float* acc = t.acc + column * t.stride + row;
    Wide a[kColumns][V];
    for (int v = 0; v < V; ++v) {
      const Wide factor = load_wide(t.factor + row + v * kWide);
      for (int c = 0; c < kColumns; ++c) a[c][v] = mul(load_wide(acc + c * t.stride + v * kWide), factor);
    }
    int j = 0;
    for (; j < least; ++j) {
      Wide w[V];
      for (int v = 0; v < V; ++v) w[v] = load_wide(t.score + j * t.stride + row + v * kWide);
      for (int c = 0; c < kColumns; ++c) {
        const Wide value = splat_wide(t.values[j * t.width + column + c]);
        for (int v = 0; v < V; ++v) a[c][v] = fma(w[v], value, a[c][v]);
      }
    }
    // The causal edge: a value that a row does not see must not reach it, not even as 0 * NaN.
    for (; j < most; ++j)
      for (int v = 0; v < V; ++v) {
        const Wide w = load_wide(t.score + j * t.stride + row + v * kWide);
        for (int c = 0; c < kColumns; ++c) {
          const Wide more = fma(w, splat_wide(t.values[j * t.width + column + c]), a[c][v]);
          a[c][v] = where_seen(more, a[c][v], t.visible + row + v * kWide, j);
        }
      }
    for (int c = 0; c < kColumns; ++c)
      for (int v = 0; v < V; ++v) store(acc + c * t.stride + v * kWide, a[c][v]);
  }
}

template <int V>
DIBIT_INLINE void attend_some(const LaneTile& t, int row) {
  int least = t.visible[row], most = least;
  for (int r = row + 1; r < row + V * kWide; ++r) {
    least = t.visible[r] < least ? t.visible[r] : least;
    most = t.visible[r] > most ? t.visible[r] : most;
  }
  if (most == 0) return;
  score_lanes<V>(t, row, most);
  for (int v = 0; v < V; ++v) softmax_lanes(t, row + v * kWide, least, most);
  weigh_lanes<V>(t, row, least, most);
}

void attend_lanes(const LaneTile& t) {
  int row = 0;
  for (; row + 3 * kWide <= t.stride; row += 3 * kWide) attend_some<3>(t, row);
  if (row + 2 * kWide <= t.stride) attend_some<2>(t, row), row += 2 * kWide;
  if (row < t.stride) attend_some<1>(t, row);
}

// out[column, row] = in[row, column]; both counts multiples of kLanes.
void transpose(float* out, int64_t out_stride, const float* in, int64_t in_stride, int rows, int columns) {
  for (int r = 0; r < rows; r += kLanes)
    for (int c = 0; c < columns; c += kLanes) {
      F8 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = load(in + (r + i) * in_stride + c);
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; ++h) {
          a[i + 2 * h] = _mm256_shuffle_ps(b[i + h], b[i + h + 2], 0x44);
          a[i + 2 * h + 1] = _mm256_shuffle_ps(b[i + h], b[i + h + 2], 0xee);
        }
      for (int i = 0; i < 4; ++i) {
        store(out + (c + i) * out_stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        store(out + (c + i + 4) * out_stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
      }
    }
}

}  // namespace
}  // namespace dibit
