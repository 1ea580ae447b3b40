// Activations to int8 with AVX2, for the AVX2 and the AVX-512 body (arithmetic: qlinear.h).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "qlinear.h"

// Below the includes: what the standard library inlines must stay runnable on every machine.
#pragma GCC target("avx2,fma,f16c")

namespace dibit {
namespace {

// The largest magnitude of `count` numbers, a multiple of 8.
float largest(const float* x, int64_t count) {
  // Bit patterns of non-negative floats order like the floats, with infinity and then NaN on top.
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8)
    top = _mm256_max_epi32(top, _mm256_and_si256(magnitude, _mm256_castps_si256(_mm256_loadu_ps(x + i))));
  __m128i v = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(v));
}

// The larger one as bit patterns: NaN wins.
float larger(float a, float b) {
  int32_t first, second;
  std::memcpy(&first, &a, 4);
  std::memcpy(&second, &b, 4);
  return first > second ? a : b;
}

// Codes of a block under `scale`, and their sum.
void round_block(const float* x, int64_t block, float scale, int qmax, int8_t* codes, int64_t cell, float* sum_out) {
  *sum_out = 0.0f;
  if (!(scale > 0.0f)) {
    for (int64_t i = 0; i < block; i += 4) std::memset(codes + i / 4 * cell, 0, 4);
    return;
  }
  const __m256 divisor = _mm256_set1_ps(scale);
  const __m256i bound = _mm256_set1_epi32(qmax), lower = _mm256_set1_epi32(-qmax);
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < block; i += 8) {
    __m256i q = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + i), divisor));
    q = _mm256_max_epi32(_mm256_min_epi32(q, bound), lower);
    total = _mm256_add_epi32(total, q);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    std::memcpy(codes + i / 4 * cell, &bytes, 4);
    std::memcpy(codes + (i / 4 + 1) * cell, reinterpret_cast<const char*>(&bytes) + 4, 4);
  }
  __m128i v = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1));
  *sum_out = static_cast<float>(_mm_cvtsi128_si32(v));
}

}  // namespace

void quantize_avx2(const float* x, const QWeight& w, int row_qmax, const Quantized& to) {
  // Blocks up to the last column; the last of them is padded with zeros, those behind it hold nothing else.
  const int64_t whole = w.k / w.block * w.block;
  float tail[kMaxBlock] = {};
  std::memcpy(tail, x + whole, static_cast<size_t>(w.k - whole) * sizeof(float));
  static const float nothing[kMaxBlock] = {};
  float scale = 0.0f;
  if (row_qmax > 0) scale = activation_scale(larger(largest(x, whole), largest(tail, w.block)), row_qmax);
  for (int64_t b = 0; b < w.blocks; ++b) {
    const int64_t begin = b * w.block;
    const float* from = begin < whole ? x + begin : begin < w.k ? tail : nothing;
    if (row_qmax == 0) scale = activation_scale(largest(from, w.block), 127);
    to.scales[b * to.stride] = scale;
    round_block(from, w.block, scale, row_qmax > 0 ? row_qmax : 127, to.codes + b * to.block, to.cell,
                to.sums + b * to.stride);
  }
}

}  // namespace dibit
#endif
