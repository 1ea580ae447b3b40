// What the 512-bit bodies of the quantized linear have in common (layout and arithmetic: qlinear.h). To be included
// below the `#pragma GCC target` of its one user each.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "qlinear.h"

namespace dibit {
namespace {

#define DIBIT_INLINE static inline __attribute__((always_inline))

DIBIT_INLINE __m512i load(const uint8_t* p) { return _mm512_load_si512(p); }

DIBIT_INLINE __m512i field(__m512i v, int mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Where a mask bit is set the bit of `yes`, else of `no`.
DIBIT_INLINE __m512i select(int mask, __m512i yes, __m512i no) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), yes, no, 0xca);
}

// Cells 6 and 7 of a 3-bit unit, at bits 5-7.
DIBIT_INLINE __m512i sixth(__m512i a, __m512i b, __m512i c) {
  return field(select(0x80, _mm512_slli_epi16(c, 1), select(0x40, b, _mm512_srli_epi16(a, 1))), 0xe0);
}

DIBIT_INLINE __m512i seventh(__m512i a, __m512i b, __m512i c) {
  return field(select(0x80, c, select(0x40, _mm512_srli_epi16(b, 1), _mm512_srli_epi16(a, 2))), 0xe0);
}

struct Meta {
  __m512 scale, zero;
};

DIBIT_INLINE Meta load_meta(const QWeight& w, int64_t index) {
  const __m128i zeros = _mm_load_si128(reinterpret_cast<const __m128i*>(w.zeros + index));
  const __m512 zero = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros)),
                                      _mm512_set1_ps(w.zero_step), _mm512_set1_ps(w.zero_first));
  if (w.scale_bytes == 4) return {_mm512_load_ps(static_cast<const float*>(w.scales) + index), zero};
  const uint16_t* half = static_cast<const uint16_t*>(w.scales) + index;
  return {_mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(half))), zero};
}

// sum += exact * (scale * xscale)
DIBIT_INLINE __m512 scaled(__m512 sum, __m512 exact, __m512 scale, float xscale) {
  return _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(xscale)), sum);
}

// sum += (dots - zero * asum) * (scale * xscale)
DIBIT_INLINE __m512 accumulate(__m512 sum, __m512i dots, __m512 zero, __m512 scale, float xscale, float asum) {
  return scaled(sum, _mm512_fnmadd_ps(zero, _mm512_set1_ps(asum), _mm512_cvtepi32_ps(dots)), scale, xscale);
}

// 32 columns (8 cells) of packed codes into bytes, of which `first` is taken from cells 0-3 and `second` from 4-7.
template <int BITS>
DIBIT_INLINE void unpack8(const uint8_t* v, uint8_t* out, __m512i first, __m512i second) {
  auto put = [&](int slot, __m512i cell) {
    _mm512_store_si512(out + slot * kCell, _mm512_sub_epi8(cell, slot < 4 ? first : second));
  };
  if constexpr (BITS == 3) {
    const __m512i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
    put(0, field(a, 7));
    put(1, field(_mm512_srli_epi16(a, 3), 7));
    put(2, field(b, 7));
    put(3, field(_mm512_srli_epi16(b, 3), 7));
    put(4, field(c, 7));
    put(5, field(_mm512_srli_epi16(c, 3), 7));
    put(6, _mm512_srli_epi16(sixth(a, b, c), 5));
    put(7, _mm512_srli_epi16(seventh(a, b, c), 5));
  } else {
    constexpr int kPer = 8 / BITS;
    for (int i = 0; i < 8 / kPer; ++i) {
      const __m512i v4 = load(v + i * kCell);
      for (int s = 0; s < kPer; ++s)
        put(i * kPer + s, field(_mm512_srli_epi16(v4, static_cast<unsigned>(s * BITS)), (1 << BITS) - 1));
    }
  }
}

// The scales and zeros of a chunk of one panel, shared by its tokens.
struct ChunkMeta {
  alignas(64) float scales[kChunk / 16][kRows], zeros[kChunk / 16][kRows];
};

// The zero fields of a group, each in the 4 bytes of its row.
DIBIT_INLINE __m512i zero_bytes(const QWeight& w, int64_t index) {
  const __m128i zeros = _mm_load_si128(reinterpret_cast<const __m128i*>(w.zeros + index));
  return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(zeros), _mm512_set1_epi32(0x01010101));
}

// A panel's columns [first, first + columns) as bytes, in `unpacked` where they are not already: returns their cells.
// CENTERED: signed, the zero fields taken off.
template <int BITS, int BLOCK, bool CENTERED>
DIBIT_INLINE const uint8_t* unpack_chunk(const QWeight& w, int64_t panel, int64_t first, int64_t columns,
                                         uint8_t* unpacked) {
  const uint8_t* v = w.codes + panel * w.panel_bytes() + first / 4 * kCell * BITS / 8;
  if constexpr (BITS == 8) {
    for (int64_t c = 0; c < columns; c += 32) prefetch(v + c * kRows, 32 * kRows, columns * kRows);
    return v;
  } else {
    // Columns come in multiples of 16; of a last half unit, the second half is not used.
    for (int64_t c = 0; c < columns; c += 32) {
      const uint8_t* from = v + c / 4 * kCell * BITS / 8;
      prefetch(from, 8 * kCell * BITS / 8, columns / 4 * kCell * BITS / 8);
      alignas(64) uint8_t tail[8 * kCell];
      const bool half = c + 32 > columns;
      if (half) {
        std::memset(tail, 0, sizeof tail);
        std::memcpy(tail, from, 4 * kCell * BITS / 8);
        from = tail;
      }
      __m512i low = _mm512_setzero_si512(), high = low;
      if constexpr (CENTERED) {
        const int64_t block = (first + c) / BLOCK;
        low = high = zero_bytes(w, (panel * w.groups + block / w.blocks_per_group) * kRows);
        if (BLOCK == 16 && !half) high = zero_bytes(w, (panel * w.groups + (block + 1) / w.blocks_per_group) * kRows);
      }
      unpack8<BITS>(from, unpacked + c / 4 * kCell, low, high);
    }
    return unpacked;
  }
}

DIBIT_INLINE void load_chunk_meta(const QWeight& w, int64_t panel, int64_t block, int64_t blocks, ChunkMeta& meta) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Meta at = load_meta(w, (panel * w.groups + (block + b) / w.blocks_per_group) * kRows);
    _mm512_store_ps(meta.scales[b], at.scale);
    _mm512_store_ps(meta.zeros[b], at.zero);
  }
}

}  // namespace
}  // namespace dibit
