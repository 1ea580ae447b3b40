// What the 512-bit bodies of the quantized linear have in common (layout and arithmetic: qlinear.h). To be included
// below the `#pragma GCC target` of its one user each.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "qlinear.h"

namespace dibit {
namespace {

#define DIBIT_INLINE static inline __attribute__((always_inline))
#define DIBIT_INLINE_MEMBER __attribute__((always_inline))

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

DIBIT_INLINE __m512 load_scale(const QWeight& w, int64_t index) {
  if (w.scale_bytes == 4) return _mm512_load_ps(static_cast<const float*>(w.scales) + index);
  const uint16_t* half = static_cast<const uint16_t*>(w.scales) + index;
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(half)));
}

DIBIT_INLINE Meta load_meta(const QWeight& w, int64_t index) {
  const __m128i zeros = _mm_load_si128(reinterpret_cast<const __m128i*>(w.zeros + index));
  const __m512 zero = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros)),
                                      _mm512_set1_ps(w.zero_step), _mm512_set1_ps(w.zero_first));
  return {load_scale(w, index), zero};
}

// sum += exact * (scale * xscale)
DIBIT_INLINE __m512 scaled(__m512 sum, __m512 exact, __m512 scale, float xscale) {
  return _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(xscale)), sum);
}

// sum += (dots - zero * asum) * (scale * xscale)
DIBIT_INLINE __m512 accumulate(__m512 sum, __m512i dots, __m512 zero, __m512 scale, float xscale, float asum) {
  return scaled(sum, _mm512_fnmadd_ps(zero, _mm512_set1_ps(asum), _mm512_cvtepi32_ps(dots)), scale, xscale);
}

// Cell I of the 8 that lie packed at `v`, a code a byte.
template <int BITS, int I>
DIBIT_INLINE __m512i cell(const uint8_t* v) {
  if constexpr (BITS == 8) {
    return load(v + I * kCell);
  } else if constexpr (BITS == 3 && I < 6) {
    return field(_mm512_srli_epi16(load(v + I / 2 * kCell), I % 2 * 3), 7);
  } else if constexpr (BITS == 3) {
    const __m512i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
    return _mm512_srli_epi16(I == 6 ? sixth(a, b, c) : seventh(a, b, c), 5);
  } else {
    constexpr int kPer = 8 / BITS;
    return field(_mm512_srli_epi16(load(v + I / kPer * kCell), I % kPer * BITS), (1 << BITS) - 1);
  }
}

// 32 columns (8 cells) of packed codes into bytes. CENTERED: `first` is taken from cells 0-3 and `second` from 4-7.
template <int BITS, bool CENTERED, int I = 0>
DIBIT_INLINE void unpack8(const uint8_t* v, uint8_t* out, __m512i first, __m512i second) {
  __m512i own = cell<BITS, I>(v);
  if constexpr (CENTERED) own = _mm512_sub_epi8(own, I < 4 ? first : second);
  _mm512_store_si512(out + I * kCell, own);
  if constexpr (I < 7) unpack8<BITS, CENTERED, I + 1>(v, out, first, second);
}

// The group of one block after the other, without a division for each.
class Group {
 public:
  DIBIT_INLINE_MEMBER Group(const QWeight& w, int64_t panel, int64_t block)
      : meta_((panel * w.groups + block / w.blocks_per_group) * kRows),
        left_(w.blocks_per_group - block % w.blocks_per_group),
        blocks_(w.blocks_per_group) {}
  // Where its scales and zeros are.
  DIBIT_INLINE_MEMBER int64_t meta() const { return meta_; }
  DIBIT_INLINE_MEMBER void next() {
    if (--left_ != 0) return;
    meta_ += kRows;
    left_ = blocks_;
  }

 private:
  int64_t meta_, left_, blocks_;
};

// Writes the valid part of a panel's sums of one token, bias added, to y [N].
DIBIT_INLINE void store_rows(const QWeight& w, int64_t panel, __m512 sums, const float* bias, float* y) {
  const int64_t first = panel * kRows, count = w.n - first;
  const __mmask16 valid = count < kRows ? static_cast<__mmask16>((1 << count) - 1) : 0xffff;
  if (bias != nullptr) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(valid, bias + first));
  _mm512_mask_storeu_ps(y + first, valid, sums);
}

// Columns unpacked at a time, at most.
constexpr int64_t kMostColumns = 512;

// The scales and zeros of a chunk of one panel, shared by its tokens.
struct ChunkMeta {
  alignas(64) float scales[kMostColumns / 16][kRows], zeros[kMostColumns / 16][kRows];
};

// The zero fields of a group, each in the 4 bytes of its row.
DIBIT_INLINE __m512i zero_bytes(const QWeight& w, int64_t index) {
  const __m128i zeros = _mm_load_si128(reinterpret_cast<const __m128i*>(w.zeros + index));
  const __m512i rows = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a,
                                        0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                                        0x03030303, 0x02020202, 0x01010101, 0x00000000);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(zeros), rows);
}

// Columns [first, first + columns) of a panel: whole blocks. `panels` are worked on together.
struct Slice {
  int64_t panel, first, columns, panels;
};

// From these bytes to those that are wanted next.
template <int BITS>
DIBIT_INLINE int64_t next_slice(const QWeight& w, const Slice& at) {
  const int64_t next = at.first + at.columns;
  return next < w.padded ? at.columns / 4 * kCell * BITS / 8
                         : at.panels * w.panel_bytes() - at.first / 4 * kCell * BITS / 8;
}

// A slice as bytes, in `unpacked` where they are not already: returns their cells. CENTERED: signed, the zero fields
// taken off.
template <int BITS, int BLOCK, bool CENTERED>
DIBIT_INLINE const uint8_t* unpack_slice(const QWeight& w, const Slice& at, uint8_t* unpacked) {
  const uint8_t* v = w.codes + at.panel * w.panel_bytes() + at.first / 4 * kCell * BITS / 8;
  const int64_t ahead = next_slice<BITS>(w, at);
  if constexpr (BITS == 8) {
    for (int64_t c = 0; c < at.columns; c += 32) prefetch(v + c * kRows, 32 * kRows, ahead);
    return v;
  } else {
    Group group(w, at.panel, at.first / BLOCK);
    // Columns come in multiples of 16; of a last half unit, the second half is not used.
    for (int64_t c = 0; c < at.columns; c += 32) {
      const uint8_t* from = v + c / 4 * kCell * BITS / 8;
      prefetch(from, 8 * kCell * BITS / 8, ahead);
      alignas(64) uint8_t tail[8 * kCell];
      const bool half = c + 32 > at.columns;
      if (half) {
        std::memset(tail, 0, sizeof tail);
        std::memcpy(tail, from, 4 * kCell * BITS / 8);
        from = tail;
      }
      __m512i low = _mm512_setzero_si512(), high = low;
      if constexpr (CENTERED) {
        low = high = zero_bytes(w, group.meta());
        if constexpr (BLOCK == 16) {
          group.next();
          if (!half) high = zero_bytes(w, group.meta());
          group.next();
        } else if (BLOCK == 32 || (c + 32) % BLOCK == 0) {
          group.next();
        }
      }
      unpack8<BITS, CENTERED>(from, unpacked + c / 4 * kCell, low, high);
    }
    return unpacked;
  }
}

// Of blocks [block, block + blocks); no zeros where they are taken off the codes.
template <bool CENTERED>
DIBIT_INLINE void load_chunk_meta(const QWeight& w, int64_t panel, int64_t block, int64_t blocks, ChunkMeta& meta) {
  Group group(w, panel, block);
  for (int64_t b = 0; b < blocks; ++b, group.next()) {
    if constexpr (CENTERED) {
      _mm512_store_ps(meta.scales[b], load_scale(w, group.meta()));
    } else {
      const Meta at = load_meta(w, group.meta());
      _mm512_store_ps(meta.scales[b], at.scale);
      _mm512_store_ps(meta.zeros[b], at.zero);
    }
  }
}

}  // namespace
}  // namespace dibit
