// Rotation of one token's heads, stored as floats or as the cache's reals, for the ISA of the including unit.
#pragma once
#include "cache_body.h"
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

template <Real kReal>
DIBIT_INLINE void store_real(void* p, int64_t i, F8 a) {
  if constexpr (kReal == Real::f32) store(static_cast<float*>(p) + i, a);
  if constexpr (kReal == Real::f16) store_half(static_cast<uint16_t*>(p) + i, a);
  if constexpr (kReal == Real::bf16) store_bfloat(static_cast<uint16_t*>(p) + i, a);
  if constexpr (kReal == Real::e4m3) store_e4m3(static_cast<uint8_t*>(p) + i, a);
}

// A short run of `n` < kLanes elements, through a full vector on the stack.
template <Real kReal>
DIBIT_INLINE void store_tail(void* p, int64_t i, const float* values, int n) {
  constexpr int64_t kBytes = real_bytes(kReal);
  alignas(32) float whole[kLanes] = {};
  alignas(32) char stored[kLanes * 4];
  std::memcpy(whole, values, n * sizeof(float));
  store_real<kReal>(stored, 0, load(whole));
  std::memcpy(static_cast<char*>(p) + i * kBytes, stored, n * kBytes);
}

// Heads of elements that are no codes, `stride` bytes apart.
template <Real kReal>
DIBIT_INLINE void rotate_heads(void* dst, int64_t stride, const float* src, int64_t heads, int d, const float* cos,
                               const float* sin, int half) {
  for (int64_t h = 0; h < heads; ++h, src += d) {
    void* out = static_cast<char*>(dst) + h * stride;
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const F8 a = load(src + i), b = load(src + half + i), c = load(cos + i), s = load(sin + i);
      store_real<kReal>(out, i, sub(mul(a, c), mul(b, s)));
      store_real<kReal>(out, half + i, add(mul(b, c), mul(a, s)));
    }
    if (i < half) {
      float low[kLanes], high[kLanes];
      for (int j = i; j < half; ++j) {
        low[j - i] = src[j] * cos[j] - src[half + j] * sin[j];
        high[j - i] = src[half + j] * cos[j] + src[j] * sin[j];
      }
      store_tail<kReal>(out, i, low, half - i);
      store_tail<kReal>(out, half + i, high, half - i);
    }
    for (i = 2 * half; i + kLanes <= d; i += kLanes) store_real<kReal>(out, i, load(src + i));
    if (i < d) store_tail<kReal>(out, i, src + i, d - i);
  }
}

void rotate(void* dst, Real real, int64_t stride, const float* src, int64_t heads, int d, const float* cos,
            const float* sin, int half) {
  if (real == Real::f16) return rotate_heads<Real::f16>(dst, stride, src, heads, d, cos, sin, half);
  if (real == Real::bf16) return rotate_heads<Real::bf16>(dst, stride, src, heads, d, cos, sin, half);
  if (real == Real::f32) return rotate_heads<Real::f32>(dst, stride, src, heads, d, cos, sin, half);
  if (real == Real::e4m3) return rotate_heads<Real::e4m3>(dst, stride, src, heads, d, cos, sin, half);
  alignas(32) float rotated[kMaxRow];
  for (int64_t h = 0; h < heads; ++h) {
    void* row = static_cast<char*>(dst) + h * stride;
    rotate_heads<Real::f32>(rotated, 0, src + h * d, 1, d, cos, sin, half);
    if (real == Real::i8) store_row<Real::i8>(row, rotated, d);
    else store_row<Real::i4>(row, rotated, d);
  }
}

}  // namespace
}  // namespace dibit
