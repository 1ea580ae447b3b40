// AVX-512 VNNI body of the quantized linear (algorithm and layout: qlinear.h).
//
// `vpdpbusd` multiplies 64 unsigned codes by 64 signed activations into 16 int32 sums, one per row of the panel, with
// nothing that could overflow. For one token the codes are not even shifted into place: a field that starts at bit s
// is masked where it stands, its sums are 2^s times too large, and one exact shift per block corrects them.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "qlinear.h"

// Below the includes: what the standard library inlines must stay runnable on every machine.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "qlinear_512.h"

namespace dibit {
namespace {

#define DIBIT_ROLLED _Pragma("GCC unroll 1")

struct __attribute__((may_alias, packed)) Four {
  int32_t value;
};

// Written out because gcc 12 loads the broadcast apart and moves every sum through a second register.
DIBIT_INLINE void dot(__m512i& sum, __m512i codes, const int8_t* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const Four*>(x)));
}

DIBIT_INLINE __m512i plus(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }

template <int SHIFT>
DIBIT_INLINE __m512i down(__m512i sums) {
  return _mm512_srai_epi32(sums, SHIFT);
}

// Integer sums of one block of one token straight from the packed codes.
template <int BITS, int BLOCK>
DIBIT_INLINE __m512i dot_block(const uint8_t* v, const int8_t* x) {
  const __m512i none = _mm512_setzero_si512();
  __m512i s0 = none, s1 = none, s2 = none, s3 = none;
  if constexpr (BITS == 8) {
    for (int c = 0; c < BLOCK / 16; ++c, v += 4 * kCell, x += 16) {
      dot(s0, load(v), x);
      dot(s1, load(v + kCell), x + 4);
      dot(s2, load(v + 2 * kCell), x + 8);
      dot(s3, load(v + 3 * kCell), x + 12);
    }
    return plus(plus(s0, s1), plus(s2, s3));
  } else if constexpr (BITS == 4) {
    for (int c = 0; c < BLOCK / 16; ++c, v += 2 * kCell, x += 16) {
      const __m512i p = load(v), q = load(v + kCell);
      dot(s0, field(p, 0x0f), x);
      dot(s1, field(p, 0xf0), x + 4);
      dot(s2, field(q, 0x0f), x + 8);
      dot(s3, field(q, 0xf0), x + 12);
    }
    return plus(plus(s0, s2), down<4>(plus(s1, s3)));
  } else if constexpr (BITS == 2) {
    for (int c = 0; c < BLOCK / 16; ++c, v += kCell, x += 16) {
      const __m512i p = load(v);
      dot(s0, field(p, 0x03), x);
      dot(s1, field(p, 0x0c), x + 4);
      dot(s2, field(p, 0x30), x + 8);
      dot(s3, field(p, 0xc0), x + 12);
    }
    return plus(plus(s0, down<2>(s1)), plus(down<4>(s2), down<6>(s3)));
  } else {
    for (int u = 0; u < BLOCK / 32; ++u, v += 3 * kCell, x += 32) {
      const __m512i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
      dot(s0, field(a, 0x07), x);
      dot(s1, field(a, 0x38), x + 4);
      dot(s0, field(b, 0x07), x + 8);
      dot(s1, field(b, 0x38), x + 12);
      dot(s2, field(c, 0x07), x + 16);
      dot(s1, field(c, 0x38), x + 20);
      dot(s3, sixth(a, b, c), x + 24);
      dot(s3, seventh(a, b, c), x + 28);
    }
    return plus(plus(s0, s2), plus(down<3>(s1), down<5>(s3)));
  }
}

// A 3-bit unit of 32 columns that is two blocks of 16: cells 0-3 and 4-7.
DIBIT_INLINE void dot_pair3(const uint8_t* v, const int8_t* x, __m512i& first, __m512i& second) {
  const __m512i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, t0 = s0, t1 = s0, t2 = s0;
  dot(s0, field(a, 0x07), x);
  dot(s1, field(a, 0x38), x + 4);
  dot(s0, field(b, 0x07), x + 8);
  dot(s1, field(b, 0x38), x + 12);
  dot(t0, field(c, 0x07), x + 16);
  dot(t1, field(c, 0x38), x + 20);
  dot(t2, sixth(a, b, c), x + 24);
  dot(t2, seventh(a, b, c), x + 28);
  first = plus(s0, down<3>(s1));
  second = plus(plus(t0, down<3>(t1)), down<5>(t2));
}

template <int BITS, int BLOCK>
void gemv_body(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  constexpr int64_t kBlockBytes = BLOCK / 4 * kCell * BITS / 8;
  const uint8_t* v = w.codes + begin * w.panel_bytes();
  for (int64_t panel = begin; panel < end; ++panel) {
    __m512 sum = _mm512_setzero_ps();
    const int8_t* x = a.codes;
    int64_t b = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      const Meta meta = load_meta(w, (panel * w.groups + g) * kRows);
      if constexpr (BITS == 3 && BLOCK == 16) {
        __m512i first, second;
        dot_pair3(v, x, first, second);
        sum = accumulate(sum, first, meta.zero, meta.scale, a.scales[b], a.sums[b]);
        const Meta next = load_meta(w, (panel * w.groups + ++g) * kRows);
        ++b;
        sum = accumulate(sum, second, next.zero, next.scale, a.scales[b], a.sums[b]);
        ++b;
        v += 3 * kCell, x += 32;
      } else {
        for (int64_t i = 0; i < w.blocks_per_group; ++i, ++b, v += kBlockBytes, x += BLOCK) {
          prefetch(v, kBlockBytes, kAhead);
          sum = accumulate(sum, dot_block<BITS, BLOCK>(v, x), meta.zero, meta.scale, a.scales[b], a.sums[b]);
        }
      }
    }
    alignas(64) float sums[kRows];
    _mm512_store_ps(sums, sum);
    store_panel(w, panel, sums, bias, y);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Adds `blocks` blocks of T tokens to their sums.
template <int T, int BLOCK>
void tile(const uint8_t* v, const ChunkMeta& meta, int64_t blocks, const int8_t* x, int64_t x_stride,
          const float* xscales, const float* xsums, int64_t block_stride, float (*sums)[kRows]) {
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i dots[T];
    for (int t = 0; t < T; ++t) dots[t] = _mm512_setzero_si512();
    DIBIT_ROLLED for (int c = 0; c < BLOCK / 4; ++c, v += kCell, x += 4) {
      const __m512i cell = load(v);
      for (int t = 0; t < T; ++t) dot(dots[t], cell, x + t * x_stride);
    }
    const __m512 zero = _mm512_load_ps(meta.zeros[b]), scale = _mm512_load_ps(meta.scales[b]);
    for (int t = 0; t < T; ++t) {
      const __m512 sum = _mm512_load_ps(sums[t]);
      _mm512_store_ps(sums[t], accumulate(sum, dots[t], zero, scale, xscales[t * block_stride + b],
                                          xsums[t * block_stride + b]));
    }
  }
}

template <int BITS, int BLOCK>
void gemm_body(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
               int64_t end) {
  alignas(64) uint8_t unpacked[kChunk / 4 * kCell];
  ChunkMeta meta;
  alignas(64) float sums[kMaxTokens][kRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    std::memset(sums, 0, sizeof sums[0] * static_cast<size_t>(m));
    for (int64_t first = 0; first < w.padded; first += kChunk) {
      const int64_t columns = w.padded - first < kChunk ? w.padded - first : kChunk;
      const int64_t block = first / BLOCK, blocks = columns / BLOCK;
      const uint8_t* v = unpack_chunk<BITS, BLOCK, false>(w, panel, first, columns, unpacked);
      load_chunk_meta(w, panel, block, blocks, meta);
      auto run = [&](auto count, int64_t t) {
        tile<decltype(count)::value, BLOCK>(v, meta, blocks, a.codes + t * w.padded + first, w.padded,
                                            a.scales + t * w.blocks + block, a.sums + t * w.blocks + block,
                                            w.blocks, sums + t);
      };
      int64_t t = 0;
      for (; t + 12 <= m; t += 12) run(Count<12>{}, t);
      if (m - t >= 8) run(Count<8>{}, t), t += 8;
      if (m - t >= 4) run(Count<4>{}, t), t += 4;
      if (m - t >= 2) run(Count<2>{}, t), t += 2;
      if (m - t >= 1) run(Count<1>{}, t);
    }
    for (int64_t t = 0; t < m; ++t) store_panel(w, panel, sums[t], bias, y + t * w.n);
  }
}

void gemv(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  DIBIT_BY_SHAPE(gemv_body, w, a, bias, y, begin, end);
}

void gemm(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
          int64_t end) {
  DIBIT_BY_SHAPE(gemm_body, w, a, m, bias, y, begin, end);
}

}  // namespace

const QKernels& avx512_kernels() {
  static const QKernels kernels{quantize_avx2, gemv, gemm};
  return kernels;
}

}  // namespace dibit
#endif
