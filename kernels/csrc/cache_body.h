// What a row of the KV cache (one token's keys or values of one head) looks like, read and written eight elements at a
// time, for the ISA of the including unit. kernels/kv.py describes the rows.
//
// A stored code times its scale is exact in float32, so that every ISA widens to the same bits.
#pragma once
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

DIBIT_INLINE uint16_t half_at(const void* p, int64_t i) {
  uint16_t raw;
  std::memcpy(&raw, static_cast<const char*>(p) + 2 * i, sizeof raw);
  return raw;
}

// Eight codes from the bytes they begin with, as floats.
template <Real kReal>
DIBIT_INLINE F8 codes(const void* p) {
  if constexpr (kReal == Real::i8) return load_i8(static_cast<const int8_t*>(p));
  if constexpr (kReal == Real::i4) return load_u4(static_cast<const uint8_t*>(p));
}

// `code` eight codes of the row's elements from i on.
template <Real kReal>
DIBIT_INLINE F8 scaled(F8 code, const void* row, int64_t i, int d) {
  if constexpr (kReal == Real::i8)
    return mul(code, splat_half(half_at(static_cast<const char*>(row) + d, i / kCacheGroup)));
  const char* grid = static_cast<const char*>(row) + d / 2;
  const F8 scale = splat_half(half_at(grid, i / kCacheGroup * 2));
  return add(mul(code, scale), splat_half(half_at(grid, i / kCacheGroup * 2 + 1)));
}

// Elements [i, i + 8) of a row of d, i a multiple of 8.
template <Real kReal>
DIBIT_INLINE F8 load_real(const void* row, int64_t i, int d) {
  if constexpr (kReal == Real::f32) return load(static_cast<const float*>(row) + i);
  if constexpr (kReal == Real::f16) return load_half(static_cast<const uint16_t*>(row) + i);
  if constexpr (kReal == Real::bf16) return load_bfloat(static_cast<const uint16_t*>(row) + i);
  if constexpr (kReal == Real::e4m3) return load_e4m3(static_cast<const uint8_t*>(row) + i);
  if constexpr (is_codes(kReal)) {
    const char* code = static_cast<const char*>(row) + (kReal == Real::i8 ? i : i / 2);
    return scaled<kReal>(codes<kReal>(code), row, i, d);
  }
}

// The last, fewer than eight elements of a row from i on; what follows them in the result is any number.
template <Real kReal>
DIBIT_INLINE F8 load_tail(const void* row, int64_t i, int d) {
  alignas(32) char tail[kLanes * 4] = {};
  if constexpr (is_codes(kReal)) {
    constexpr int kPerByte = kReal == Real::i8 ? 1 : 2;
    std::memcpy(tail, static_cast<const char*>(row) + i / kPerByte, (d - i) / kPerByte);
    return scaled<kReal>(codes<kReal>(tail), row, i, d);
  }
  constexpr int64_t kBytes = real_bytes(kReal);
  std::memcpy(tail, static_cast<const char*>(row) + i * kBytes, (d - i) * kBytes);
  return load_real<kReal>(tail, 0, d);
}

DIBIT_INLINE uint16_t to_half(float a) {
  uint16_t raw[kLanes];
  store_half(raw, splat(a));
  return raw[0];
}

// A group's elements, the last one repeated up to kCacheGroup, as integers under a scale and an offset.
struct Group {
  F8 x[kCacheGroup / kLanes];

  Group(const float* from, int count) {
    alignas(32) float whole[kCacheGroup];
    for (int i = 0; i < kCacheGroup; ++i) whole[i] = from[i < count ? i : count - 1];
    for (int v = 0; v < kCacheGroup / kLanes; ++v) x[v] = load(whole + v * kLanes);
  }

  // 0, or NaN where an element is not finite.
  float poison() const {
    F8 zeros = splat(0.0f);
    for (const F8& a : x) zeros = add(zeros, mul(a, splat(0.0f)));
    return sum(zeros);
  }

  float most() const {
    F8 high = x[0];
    for (const F8& a : x) high = max(high, a);
    return peak(high);
  }

  float least() const {
    F8 low = sub(splat(0.0f), x[0]);
    for (const F8& a : x) low = max(low, sub(splat(0.0f), a));
    return -peak(low);
  }

  // code[i] = (x_i - offset) / scale to the nearest integer, halves to even, in [low, high].
  void encode(int32_t* code, float scale, float offset, float low, float high) const {
    const F8 by = splat(scale > 0.0f ? scale : 1.0f), shift = splat(0x1.8p23f);
    for (int v = 0; v < kCacheGroup / kLanes; ++v) {
      const F8 y = min(max(div(sub(x[v], splat(offset)), by), splat(low)), splat(high));
      alignas(32) float shifted[kLanes];
      store(shifted, add(y, shift));
      for (int i = 0; i < kLanes; ++i) {
        int32_t raw;
        std::memcpy(&raw, shifted + i, sizeof raw);
        code[v * kLanes + i] = raw - 0x4b400000;
      }
    }
  }
};

// One row of d floats, as codes and their grid.
template <Real kReal>
DIBIT_INLINE void store_row(void* row, const float* x, int d) {
  for (int first = 0; first < d; first += kCacheGroup) {
    const int count = d - first < kCacheGroup ? d - first : kCacheGroup, group = first / kCacheGroup;
    const Group values(x + first, count);
    int32_t code[kCacheGroup];
    if constexpr (kReal == Real::i8) {
      const float high = values.most(), low = -values.least(), most = high > low ? high : low;
      const uint16_t scale = to_half(most / 127.0f + values.poison());
      values.encode(code, first_of_half(scale), 0.0f, -127.0f, 127.0f);
      int8_t* out = static_cast<int8_t*>(row) + first;
      for (int i = 0; i < count; ++i) out[i] = static_cast<int8_t>(code[i]);
      std::memcpy(static_cast<char*>(row) + d + 2 * group, &scale, 2);
    } else {
      // Of zeros of both signs the positive one, whichever was found.
      const float high = values.most(), low = values.least() + 0.0f;
      const uint16_t grid[2] = {to_half((high - low) / 15.0f + values.poison()), to_half(low)};
      values.encode(code, first_of_half(grid[0]), first_of_half(grid[1]), 0.0f, 15.0f);
      uint8_t* out = static_cast<uint8_t*>(row) + first / 2;
      for (int i = 0; i < count; i += 2) out[i / 2] = static_cast<uint8_t>(code[i] | code[i + 1] << 4);
      std::memcpy(static_cast<char*>(row) + d / 2 + 4 * group, grid, 4);
    }
  }
}

}  // namespace
}  // namespace dibit
