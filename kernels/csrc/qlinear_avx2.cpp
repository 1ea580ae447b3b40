// AVX2 body of the quantized linear (algorithm and layout: qlinear.h).
//
// `vpmaddubsw` multiplies unsigned codes by signed activations and adds neighbours into int16, which holds
// 43 / 18 / 8 such sums of 2 / 3 / 4-bit codes and activations in [-127, 127]. A block of 64 columns gives each lane
// 16, so 4-bit sums are widened every 8. One product of 8-bit codes would already saturate: they are taken as two
// 4-bit planes, isum = low + 16 high. Up to 4 tokens meet the codes in registers; more share codes that were unpacked
// into L1.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "qlinear.h"

// Below the includes: what the standard library inlines must stay runnable on every machine.
#pragma GCC target("avx2,fma,f16c")

namespace dibit {
namespace {

// Columns unpacked at a time for several tokens: 16 KB of cells, twice that at 8 bits, stay in L1.
constexpr int kChunk = 1024;

#define DIBIT_INLINE static inline __attribute__((always_inline))
// Unrolled bodies make gcc hoist the loads and spill.
#define DIBIT_ROLLED _Pragma("GCC unroll 1")

DIBIT_INLINE __m256i load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

DIBIT_INLINE __m256i broadcast4(const int8_t* p) {
  return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)));
}

// The addition is written out because gcc 12 moves every sum through a second register, and spills for it.
DIBIT_INLINE void mad(__m256i& sum, __m256i codes, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs));
}

DIBIT_INLINE __m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

DIBIT_INLINE __m256i low(__m256i v, int shift, int mask) {
  return _mm256_and_si256(shift == 0 ? v : _mm256_srli_epi16(v, shift), _mm256_set1_epi8(static_cast<char>(mask)));
}

// Cells 6 and 7 of a 3-bit unit: bit `slot` of A, B and C.
DIBIT_INLINE __m256i top3(__m256i a, __m256i b, __m256i c, int slot) {
  const __m256i bits =
      _mm256_or_si256(low(a, slot, 1), _mm256_and_si256(_mm256_srli_epi16(b, slot - 1), _mm256_set1_epi8(2)));
  return _mm256_or_si256(bits, _mm256_and_si256(_mm256_srli_epi16(c, slot - 2), _mm256_set1_epi8(4)));
}

// The scales and zeros of 16 rows as floats.
struct Meta {
  __m256 scale[2], zero[2];
};

DIBIT_INLINE Meta load_meta(const QWeight& w, int64_t index) {
  Meta meta;
  for (int h = 0; h < 2; ++h) {
    const int64_t at = index + 8 * h;
    meta.scale[h] = w.scale_bytes == 2
                        ? _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(
                              static_cast<const uint16_t*>(w.scales) + at)))
                        : _mm256_load_ps(static_cast<const float*>(w.scales) + at);
    const __m256 field = _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zeros + at))));
    meta.zero[h] = _mm256_fmadd_ps(field, _mm256_set1_ps(w.zero_step), _mm256_set1_ps(w.zero_first));
  }
  return meta;
}

// sum += (dots - zero * asum) * (scale * xscale)
DIBIT_INLINE __m256 accumulate(__m256 sum, __m256i dots, __m256 zero, __m256 scale, float xscale, float asum) {
  const __m256 exact = _mm256_fnmadd_ps(zero, _mm256_set1_ps(asum), _mm256_cvtepi32_ps(dots));
  return _mm256_fmadd_ps(exact, _mm256_mul_ps(scale, _mm256_set1_ps(xscale)), sum);
}

// Integer sums of one block of one token for rows 0-7 and 8-15 straight from the packed codes.
template <int BITS, int BLOCK>
DIBIT_INLINE void dot_block(const uint8_t* v, const int8_t* x, __m256i dots[2]) {
  const __m256i none = _mm256_setzero_si256();
  if constexpr (BITS == 8) {
    __m256i l0 = none, l1 = none, h0 = none, h1 = none, wide0 = none, wide1 = none;
    constexpr int kRun = BLOCK / 4 < 8 ? BLOCK / 4 : 8;
    DIBIT_ROLLED for (int run = 0; run < BLOCK / 4 / kRun; ++run) {
      l0 = l1 = h0 = h1 = none;
      DIBIT_ROLLED for (int c = 0; c < kRun; ++c, v += kCell, x += 4) {
        const __m256i p = load(v), q = load(v + 32), b = broadcast4(x);
        mad(l0, low(p, 0, 15), b);
        mad(l1, low(q, 0, 15), b);
        mad(h0, low(p, 4, 15), b);
        mad(h1, low(q, 4, 15), b);
      }
      wide0 = _mm256_add_epi32(wide0, _mm256_add_epi32(widen(l0), _mm256_slli_epi32(widen(h0), 4)));
      wide1 = _mm256_add_epi32(wide1, _mm256_add_epi32(widen(l1), _mm256_slli_epi32(widen(h1), 4)));
    }
    dots[0] = wide0;
    dots[1] = wide1;
  } else if constexpr (BITS == 4) {
    __m256i l0 = none, l1 = none, h0 = none, h1 = none;
    DIBIT_ROLLED for (int c = 0; c < BLOCK / 8; ++c, v += kCell, x += 8) {
      const __m256i p = load(v), q = load(v + 32), b = broadcast4(x), d = broadcast4(x + 4);
      mad(l0, low(p, 0, 15), b);
      mad(l1, low(q, 0, 15), b);
      mad(h0, low(p, 4, 15), d);
      mad(h1, low(q, 4, 15), d);
    }
    dots[0] = _mm256_add_epi32(widen(l0), widen(h0));
    dots[1] = _mm256_add_epi32(widen(l1), widen(h1));
  } else if constexpr (BITS == 2) {
    // Fields at bits 2-3 stay where they are: 4 times the code, of which int16 holds 10 sums and gets 8.
    __m256i s0 = none, s1 = none, t0 = none, t1 = none;
    DIBIT_ROLLED for (int c = 0; c < BLOCK / 16; ++c, v += kCell, x += 16) {
      __m256i p = load(v), q = load(v + 32), b = broadcast4(x), d = broadcast4(x + 4);
      mad(s0, low(p, 0, 3), b);
      mad(s1, low(q, 0, 3), b);
      mad(t0, low(p, 0, 12), d);
      mad(t1, low(q, 0, 12), d);
      p = _mm256_srli_epi16(p, 4), q = _mm256_srli_epi16(q, 4);
      b = broadcast4(x + 8), d = broadcast4(x + 12);
      mad(s0, low(p, 0, 3), b);
      mad(s1, low(q, 0, 3), b);
      mad(t0, low(p, 0, 12), d);
      mad(t1, low(q, 0, 12), d);
    }
    dots[0] = _mm256_add_epi32(widen(s0), _mm256_srai_epi32(widen(t0), 2));
    dots[1] = _mm256_add_epi32(widen(s1), _mm256_srai_epi32(widen(t1), 2));
  } else {
    // The halves of the panel one after the other: three vectors, their 8 cells and two sums fill the registers.
    DIBIT_ROLLED for (int h = 0; h < 2; ++h) {
      __m256i s = none, t = none;
      DIBIT_ROLLED for (int u = 0; u < BLOCK / 32; ++u) {
        const uint8_t* unit = v + u * 3 * kCell + h * 32;
        const int8_t* z = x + u * 32;
        const __m256i a = load(unit), b = load(unit + kCell), c = load(unit + 2 * kCell);
        mad(s, low(a, 0, 7), broadcast4(z));
        mad(t, low(a, 3, 7), broadcast4(z + 4));
        mad(s, low(b, 0, 7), broadcast4(z + 8));
        mad(t, low(b, 3, 7), broadcast4(z + 12));
        mad(s, low(c, 0, 7), broadcast4(z + 16));
        mad(t, low(c, 3, 7), broadcast4(z + 20));
        mad(s, top3(a, b, c, 6), broadcast4(z + 24));
        mad(t, top3(a, b, c, 7), broadcast4(z + 28));
      }
      dots[h] = widen(_mm256_add_epi16(s, t));
    }
  }
}

// A 3-bit unit of 32 columns that is two blocks of 16: cells 0-3 and 4-7.
DIBIT_INLINE void dot_pair3(const uint8_t* v, const int8_t* x, __m256i first[2], __m256i second[2]) {
  for (int h = 0; h < 2; ++h, v += 32) {
    const __m256i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
    __m256i s = _mm256_setzero_si256(), t = s;
    mad(s, low(a, 0, 7), broadcast4(x));
    mad(s, low(a, 3, 7), broadcast4(x + 4));
    mad(s, low(b, 0, 7), broadcast4(x + 8));
    mad(s, low(b, 3, 7), broadcast4(x + 12));
    mad(t, low(c, 0, 7), broadcast4(x + 16));
    mad(t, low(c, 3, 7), broadcast4(x + 20));
    mad(t, top3(a, b, c, 6), broadcast4(x + 24));
    mad(t, top3(a, b, c, 7), broadcast4(x + 28));
    first[h] = widen(s);
    second[h] = widen(t);
  }
}

template <int BITS, int BLOCK>
void gemv_body(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  constexpr int64_t kBlockBytes = BLOCK / 4 * kCell * BITS / 8;
  const uint8_t* v = w.codes + begin * w.panel_bytes();
  for (int64_t panel = begin; panel < end; ++panel) {
    __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0;
    const int8_t* x = a.codes;
    int64_t b = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      const Meta meta = load_meta(w, (panel * w.groups + g) * kRows);
      if constexpr (BITS == 3 && BLOCK == 16) {
        __m256i first[2], second[2];
        dot_pair3(v, x, first, second);
        sum0 = accumulate(sum0, first[0], meta.zero[0], meta.scale[0], a.scales[b * a.stride], a.sums[b * a.stride]);
        sum1 = accumulate(sum1, first[1], meta.zero[1], meta.scale[1], a.scales[b * a.stride], a.sums[b * a.stride]);
        const Meta next = load_meta(w, (panel * w.groups + ++g) * kRows);
        ++b;
        sum0 = accumulate(sum0, second[0], next.zero[0], next.scale[0], a.scales[b * a.stride], a.sums[b * a.stride]);
        sum1 = accumulate(sum1, second[1], next.zero[1], next.scale[1], a.scales[b * a.stride], a.sums[b * a.stride]);
        ++b;
        v += 3 * kCell, x += 32;
      } else {
        for (int64_t i = 0; i < w.blocks_per_group; ++i, ++b, v += kBlockBytes, x += BLOCK) {
          prefetch(v, kBlockBytes, kAhead);
          __m256i dots[2];
          dot_block<BITS, BLOCK>(v, x, dots);
          sum0 = accumulate(sum0, dots[0], meta.zero[0], meta.scale[0], a.scales[b * a.stride], a.sums[b * a.stride]);
          sum1 = accumulate(sum1, dots[1], meta.zero[1], meta.scale[1], a.scales[b * a.stride], a.sums[b * a.stride]);
        }
      }
    }
    alignas(32) float sums[kRows];
    _mm256_store_ps(sums, sum0);
    _mm256_store_ps(sums + 8, sum1);
    store_panel(w, panel, sums, bias, y);
  }
}

// Plane PLANE of cell I of the 8 that lie packed at `v`, 8 rows of it.
template <int BITS, int I, int PLANE>
DIBIT_INLINE __m256i cell(const uint8_t* v) {
  if constexpr (BITS == 8) {
    return low(load(v + I * kCell), 4 * PLANE, 15);
  } else if constexpr (BITS == 3 && I < 6) {
    return low(load(v + I / 2 * kCell), I % 2 * 3, 7);
  } else if constexpr (BITS == 3) {
    return top3(load(v), load(v + kCell), load(v + 2 * kCell), I);
  } else {
    constexpr int kPer = 8 / BITS;
    return low(load(v + I / kPer * kCell), I % kPer * BITS, (1 << BITS) - 1);
  }
}

// Multiplies cells [I, END) with the activations of T tokens, which lie by cell.
template <int BITS, int PLANE, int I, int END, int T>
DIBIT_INLINE void dot_run(const uint8_t* v, const int8_t* x, __m256i (&sums)[T]) {
  const __m256i codes = cell<BITS, I, PLANE>(v);
  _Pragma("GCC unroll 4") for (int t = 0; t < T; ++t) {
    __m256i own = sums[t];
    mad(own, codes, broadcast4(x + 4 * (I * kTokenTile + t)));
    sums[t] = own;
  }
  if constexpr (I + 1 < END) dot_run<BITS, PLANE, I + 1, END>(v, x, sums);
}

// Adds cells [BEGIN, END) of a unit of 8 to the integer sums.
template <int BITS, int BEGIN, int END, int T>
DIBIT_INLINE void add_unit(const uint8_t* v, const int8_t* x, __m256i (&dots)[T]) {
  __m256i sums[T];
  _Pragma("GCC unroll 4") for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
  dot_run<BITS, 0, BEGIN, END>(v, x, sums);
  _Pragma("GCC unroll 4") for (int t = 0; t < T; ++t) dots[t] = _mm256_add_epi32(dots[t], widen(sums[t]));
  if constexpr (BITS == 8) {
    _Pragma("GCC unroll 4") for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
    dot_run<BITS, 1, BEGIN, END>(v, x, sums);
    _Pragma("GCC unroll 4") for (int t = 0; t < T; ++t)
        dots[t] = _mm256_add_epi32(dots[t], _mm256_slli_epi32(widen(sums[t]), 4));
  }
}

constexpr int kFew = 4;

// A few tokens, T of them: codes are used where they are unpacked, half a panel after the other.
template <int BITS, int BLOCK, int T>
void few_tokens(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  constexpr int64_t kStep = BLOCK * kTokenTile;
  // 3-bit codes come in units of 8 cells, which may be two blocks.
  constexpr bool kPair = BITS == 3 && BLOCK == 16;
  constexpr int64_t kBytes = (kPair ? 32 : BLOCK) / 4 * kCell * BITS / 8;
  alignas(32) float sums[T][kRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* v = w.codes + panel * w.panel_bytes();
    const int8_t* x = a.codes;
    const float *xscales = a.scales, *xsums = a.sums;
    std::memset(sums, 0, sizeof sums);
    auto add = [&](int h, const __m256i(&dots)[T], const Meta& meta, int64_t block) __attribute__((always_inline)) {
      for (int t = 0; t < T; ++t) {
        float* to = sums[t] + 8 * h;
        const int64_t at = block * a.stride + t;
        const __m256 sum = _mm256_load_ps(to);
        _mm256_store_ps(to, accumulate(sum, dots[t], meta.zero[h], meta.scale[h], xscales[at], xsums[at]));
      }
    };
    auto none = [](__m256i(&dots)[T]) __attribute__((always_inline)) {
      for (int t = 0; t < T; ++t) dots[t] = _mm256_setzero_si256();
    };
    for (int64_t g = 0; g < w.groups; ++g) {
      const Meta meta = load_meta(w, (panel * w.groups + g) * kRows);
      if constexpr (kPair) {
        const Meta next = load_meta(w, (panel * w.groups + ++g) * kRows);
        DIBIT_ROLLED for (int h = 0; h < 2; ++h) {
          __m256i dots[T];
          none(dots);
          add_unit<BITS, 0, 4>(v + 32 * h, x, dots);
          add(h, dots, meta, 0);
          none(dots);
          add_unit<BITS, 4, 8>(v + 32 * h, x, dots);
          add(h, dots, next, 1);
        }
        v += kBytes, x += 2 * kStep, xscales += 2 * a.stride, xsums += 2 * a.stride;
      } else {
        for (int64_t i = 0; i < w.blocks_per_group; ++i) {
          prefetch(v, kBytes, kAhead);
          DIBIT_ROLLED for (int h = 0; h < 2; ++h) {
            __m256i dots[T];
            none(dots);
            if constexpr (BLOCK == 16) add_unit<BITS, 0, 4>(v + 32 * h, x, dots);
            else for (int u = 0; u < BLOCK / 32; ++u)
              add_unit<BITS, 0, 8>(v + 32 * h + u * BITS * kCell, x + u * 32 * kTokenTile, dots);
            add(h, dots, meta, 0);
          }
          v += kBytes, x += kStep, xscales += a.stride, xsums += a.stride;
        }
      }
    }
    for (int t = 0; t < T; ++t) store_panel(w, panel, sums[t], bias, y + t * w.n);
  }
}

// 32 columns (8 cells) of packed codes into bytes. 8 bits: each cell becomes its low plane, then its high plane.
template <int BITS>
DIBIT_INLINE void unpack8(const uint8_t* v, uint8_t* out) {
  for (int h = 0; h < 2; ++h, v += 32, out += 32) {
    auto put = [&](int slot, __m256i cell) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + slot * kCell), cell);
    };
    if constexpr (BITS == 3) {
      const __m256i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
      put(0, low(a, 0, 7));
      put(1, low(a, 3, 7));
      put(2, low(b, 0, 7));
      put(3, low(b, 3, 7));
      put(4, low(c, 0, 7));
      put(5, low(c, 3, 7));
      put(6, top3(a, b, c, 6));
      put(7, top3(a, b, c, 7));
    } else if constexpr (BITS == 8) {
      for (int i = 0; i < 8; ++i) {
        const __m256i cell = load(v + i * kCell);
        put(2 * i, low(cell, 0, 15));
        put(2 * i + 1, low(cell, 4, 15));
      }
    } else {
      constexpr int kPer = 8 / BITS;
      for (int i = 0; i < 8 / kPer; ++i) {
        const __m256i cell = load(v + i * kCell);
        for (int s = 0; s < kPer; ++s) put(i * kPer + s, low(cell, s * BITS, (1 << BITS) - 1));
      }
    }
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// What several tokens share of a chunk of one panel.
struct Chunk {
  alignas(64) uint8_t cells[kChunk / 4 * kCell * 2];
  alignas(64) float scales[kChunk / 16][kRows], zeros[kChunk / 16][kRows];
};

// Sums of RUN cells of one plane for T tokens, widened to int32.
template <int T, int PLANES, int RUN>
DIBIT_INLINE void dot_cells(const uint8_t* cell, const int8_t* x, int64_t x_stride, __m256i (*dots)[2]) {
  for (int t = 0; t < T; ++t) dots[t][0] = dots[t][1] = _mm256_setzero_si256();
  DIBIT_ROLLED for (int c = 0; c < RUN; ++c, cell += kCell * PLANES, x += 4) {
    const __m256i p = load(cell), q = load(cell + 32);
    for (int t = 0; t < T; ++t) {
      const __m256i four = broadcast4(x + t * x_stride);
      mad(dots[t][0], p, four);
      mad(dots[t][1], q, four);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < 2; ++h) dots[t][h] = widen(dots[t][h]);
}

// Adds `blocks` blocks of T tokens to their sums. RUN cells go into an int16 sum before it is widened.
template <int T, int PLANES, int RUN, int BLOCK>
__attribute__((noinline)) void tile(const Chunk& chunk, int64_t blocks, const int8_t* x, int64_t x_stride,
                                    const float* xscales, const float* xsums, int64_t block_stride,
                                    float (*sums)[kRows]) {
  constexpr int kRuns = BLOCK / 4 / RUN;
  const uint8_t* v = chunk.cells;
  for (int64_t b = 0; b < blocks; ++b) {
    __m256i dots[T][2];
    // All partial sums but the last wait in memory: with the running ones they would not fit the 16 registers.
    alignas(32) __m256i wide[T][2];
    _Pragma("GCC unroll 4") for (int part = 0; part < kRuns * PLANES; ++part) {
      const int run = part / PLANES, plane = part % PLANES;
      dot_cells<T, PLANES, RUN>(v + (run * RUN * PLANES + plane) * kCell, x + run * RUN * 4, x_stride, dots);
      for (int t = 0; t < T; ++t) {
        for (int h = 0; h < 2; ++h) {
          if (PLANES == 2 && plane == 1) dots[t][h] = _mm256_slli_epi32(dots[t][h], 4);
          if (part > 0) dots[t][h] = _mm256_add_epi32(dots[t][h], wide[t][h]);
          if (part + 1 < kRuns * PLANES) wide[t][h] = dots[t][h];
        }
      }
    }
    v += BLOCK / 4 * PLANES * kCell;
    x += BLOCK;
    for (int t = 0; t < T; ++t) {
      for (int h = 0; h < 2; ++h) {
        float* to = sums[t] + 8 * h;
        const __m256 zero = _mm256_load_ps(chunk.zeros[b] + 8 * h), scale = _mm256_load_ps(chunk.scales[b] + 8 * h);
        _mm256_store_ps(to, accumulate(_mm256_load_ps(to), dots[t][h], zero, scale, xscales[b * block_stride + t],
                                       xsums[b * block_stride + t]));
      }
    }
  }
}

template <int BITS, int BLOCK>
void gemm_body(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
               int64_t end) {
  if (m == 2) return few_tokens<BITS, BLOCK, 2>(w, a, bias, y, begin, end);
  if (m == 3) return few_tokens<BITS, BLOCK, 3>(w, a, bias, y, begin, end);
  if (m == kFew) return few_tokens<BITS, BLOCK, kFew>(w, a, bias, y, begin, end);
  constexpr int kPlanes = BITS == 8 ? 2 : 1;
  constexpr int kMost = BITS < 4 ? 16 : 8;
  constexpr int kRun = BLOCK / 4 < kMost ? BLOCK / 4 : kMost;
  Chunk chunk;
  alignas(64) float sums[kMaxTokens][kRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    std::memset(sums, 0, sizeof sums[0] * static_cast<size_t>(m));
    for (int64_t first = 0; first < w.padded; first += kChunk) {
      const int64_t columns = w.padded - first < kChunk ? w.padded - first : kChunk;
      const int64_t block = first / BLOCK, blocks = columns / BLOCK;
      const uint8_t* v = w.codes + panel * w.panel_bytes() + first / 4 * kCell * BITS / 8;
      // Columns come in multiples of 16; a last half unit is unpacked with whatever follows and not used.
      for (int64_t c = 0; c < columns; c += 32) {
        prefetch(v + c / 4 * kCell * BITS / 8, 8 * kCell * BITS / 8, columns / 4 * kCell * BITS / 8);
        if (c + 32 <= columns) {
          unpack8<BITS>(v + c / 4 * kCell * BITS / 8, chunk.cells + c / 4 * kCell * kPlanes);
        } else {
          alignas(32) uint8_t tail[8 * kCell] = {};
          std::memcpy(tail, v + c / 4 * kCell * BITS / 8, 4 * kCell * BITS / 8);
          unpack8<BITS>(tail, chunk.cells + c / 4 * kCell * kPlanes);
        }
      }
      for (int64_t b = 0; b < blocks; ++b) {
        const Meta meta = load_meta(w, (panel * w.groups + (block + b) / w.blocks_per_group) * kRows);
        for (int h = 0; h < 2; ++h) {
          _mm256_store_ps(chunk.scales[b] + 8 * h, meta.scale[h]);
          _mm256_store_ps(chunk.zeros[b] + 8 * h, meta.zero[h]);
        }
      }
      auto run = [&](auto count, int64_t t) {
        tile<decltype(count)::value, kPlanes, kRun, BLOCK>(chunk, blocks, a.codes + t * w.padded + first, w.padded,
                                                           a.scales + block * a.stride + t,
                                                           a.sums + block * a.stride + t, a.stride, sums + t);
      };
      int64_t t = 0;
      for (; t + 4 <= m; t += 4) run(Count<4>{}, t);
      if (m - t == 3) run(Count<3>{}, t);
      if (m - t == 2) run(Count<2>{}, t);
      if (m - t == 1) run(Count<1>{}, t);
    }
    for (int64_t t = 0; t < m; ++t) store_panel(w, panel, sums[t], bias, y + t * w.n);
  }
}

Order order(const QWeight& w, int64_t tokens) { return tokens == 1 || tokens > kFew ? by_row(w) : by_cell(w); }

void gemv(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  DIBIT_BY_SHAPE(gemv_body, w, a, bias, y, begin, end);
}

void gemm(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
          int64_t end) {
  DIBIT_BY_SHAPE(gemm_body, w, a, m, bias, y, begin, end);
}

}  // namespace

const QKernels& avx2_kernels() {
  static const QKernels kernels{order, quantize_avx2, gemv, gemm};
  return kernels;
}

}  // namespace dibit
#endif
