// Activations to int8 with AVX2, for the AVX2 and the AVX-512 body (arithmetic: qlinear.h).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "qlinear.h"

// Below the includes: what the standard library inlines must stay runnable on every machine.
#pragma GCC target("avx2,fma,f16c")

namespace dibit {
namespace {

// Bit patterns of non-negative floats order like the floats, with infinity and then NaN on top.
float largest(const float* x, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8)
    top = _mm256_max_epi32(top, _mm256_and_si256(magnitude, _mm256_castps_si256(_mm256_loadu_ps(x + i))));
  __m128i v = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(v));
}

void quantize_block(const float* x, int64_t block, int8_t* codes, float* scale_out, float* sum_out) {
  const float top = largest(x, block);
  const bool finite = top <= 3.402823466e38f;
  const float scale = finite ? top / 127.0f : __builtin_nanf("");
  *scale_out = scale;
  *sum_out = 0.0f;
  if (!(scale > 0.0f)) {
    std::memset(codes, 0, static_cast<size_t>(block));
    return;
  }
  const __m256 divisor = _mm256_set1_ps(scale);
  const __m256i bound = _mm256_set1_epi32(127), lower = _mm256_set1_epi32(-127);
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < block; i += 8) {
    __m256i q = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + i), divisor));
    q = _mm256_max_epi32(_mm256_min_epi32(q, bound), lower);
    total = _mm256_add_epi32(total, q);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packs_epi16(words, words));
  }
  __m128i v = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1));
  *sum_out = static_cast<float>(_mm_cvtsi128_si32(v));
}

}  // namespace

void quantize_avx2(const float* x, const QWeight& w, int8_t* codes, float* scales, float* sums) {
  for (int64_t b = 0; b < w.blocks; ++b) {
    const int64_t begin = b * w.block;
    if (begin + w.block <= w.k) {
      quantize_block(x + begin, w.block, codes + begin, scales + b, sums + b);
    } else {
      float tail[kMaxBlock] = {};
      if (begin < w.k) std::memcpy(tail, x + begin, static_cast<size_t>(w.k - begin) * sizeof(float));
      quantize_block(tail, w.block, codes + begin, scales + b, sums + b);
    }
  }
}

}  // namespace dibit
#endif
