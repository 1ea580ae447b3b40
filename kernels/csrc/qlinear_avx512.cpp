// AVX-512 VNNI body of the quantized linear (algorithm and layout: qlinear.h).
//
// `vpdpbusd` multiplies 64 unsigned codes by 64 signed activations into 16 int32 sums, one per row of the panel, with
// nothing that could overflow. For few tokens the codes are not even shifted into place: a field that starts at bit s
// is masked where it stands, its sums are 2^s times too large, and one exact shift per block corrects them. Up to 12
// tokens meet the codes in registers; more share codes that were unpacked into L1.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "qlinear.h"

// Below the includes: what the standard library inlines must stay runnable on every machine.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "qlinear_512.h"

namespace dibit {
namespace {

// Columns unpacked at a time for several tokens: with their activations they stay in the L1 of two threads.
constexpr int64_t kColumns = kMostColumns;

#define DIBIT_ROLLED _Pragma("GCC unroll 1")

struct __attribute__((may_alias, packed)) Four {
  int32_t value;
};

// Written out because gcc 12 loads the broadcast apart and moves every sum through a second register.
DIBIT_INLINE void dot(__m512i& sum, __m512i codes, const int8_t* x) {
  // Not `sum` itself: an operand of assembly stays in memory where it is an element of an array.
  __m512i own = sum;
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(own) : "v"(codes), "m"(*reinterpret_cast<const Four*>(x)));
  sum = own;
}

DIBIT_INLINE __m512i plus(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }

template <int SHIFT>
DIBIT_INLINE __m512i down(__m512i sums) {
  return _mm512_srai_epi32(sums, SHIFT);
}

// Up to that many tokens the codes are not even shifted into place, see above; it takes four sums a token.
constexpr int kFew = 4;

// Bytes from a cell of activations to the next: of one token by row, of several by cell.
template <int T>
constexpr int kStep = T == 1 ? 4 : 4 * kTokenTile;

// Multiplies codes with cell C of T tokens' activations.
template <int C, int T>
DIBIT_INLINE void dot_each(__m512i (&sums)[T], __m512i codes, const int8_t* x) {
  _Pragma("GCC unroll 12") for (int t = 0; t < T; ++t) dot(sums[t], codes, x + C * kStep<T> + 4 * t);
}

template <int T>
DIBIT_INLINE void clear(__m512i (&sums)[T]) {
  _Pragma("GCC unroll 12") for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
}

// Multiplies cells [I, END) of the 8 at `v`.
template <int BITS, int I, int END, int T>
DIBIT_INLINE void dot_cells(const uint8_t* v, const int8_t* x, __m512i (&dots)[T]) {
  dot_each<I>(dots, cell<BITS, I>(v), x);
  if constexpr (I + 1 < END) dot_cells<BITS, I + 1, END>(v, x, dots);
}

// Integer sums of one block straight from the packed codes.
template <int BITS, int BLOCK, int T>
DIBIT_INLINE void dot_block(const uint8_t* v, const int8_t* x, __m512i (&dots)[T]) {
  if constexpr (T > kFew) {
    clear(dots);
    if constexpr (BLOCK == 16) return dot_cells<BITS, 0, 4>(v, x, dots);
    for (int u = 0; u < BLOCK / 32; ++u) dot_cells<BITS, 0, 8>(v + u * BITS * kCell, x + u * 8 * kStep<T>, dots);
    return;
  }
  __m512i s0[T], s1[T], s2[T], s3[T];
  clear(s0), clear(s1), clear(s2), clear(s3);
  if constexpr (BITS == 8) {
    for (int c = 0; c < BLOCK / 16; ++c, v += 4 * kCell, x += 4 * kStep<T>) {
      dot_each<0>(s0, load(v), x);
      dot_each<1>(s1, load(v + kCell), x);
      dot_each<2>(s2, load(v + 2 * kCell), x);
      dot_each<3>(s3, load(v + 3 * kCell), x);
    }
    for (int t = 0; t < T; ++t) dots[t] = plus(plus(s0[t], s1[t]), plus(s2[t], s3[t]));
  } else if constexpr (BITS == 4) {
    for (int c = 0; c < BLOCK / 16; ++c, v += 2 * kCell, x += 4 * kStep<T>) {
      const __m512i p = load(v), q = load(v + kCell);
      dot_each<0>(s0, field(p, 0x0f), x);
      dot_each<1>(s1, field(p, 0xf0), x);
      dot_each<2>(s2, field(q, 0x0f), x);
      dot_each<3>(s3, field(q, 0xf0), x);
    }
    for (int t = 0; t < T; ++t) dots[t] = plus(plus(s0[t], s2[t]), down<4>(plus(s1[t], s3[t])));
  } else if constexpr (BITS == 2) {
    for (int c = 0; c < BLOCK / 16; ++c, v += kCell, x += 4 * kStep<T>) {
      const __m512i p = load(v);
      dot_each<0>(s0, field(p, 0x03), x);
      dot_each<1>(s1, field(p, 0x0c), x);
      dot_each<2>(s2, field(p, 0x30), x);
      dot_each<3>(s3, field(p, 0xc0), x);
    }
    for (int t = 0; t < T; ++t)
      dots[t] = plus(plus(s0[t], down<2>(s1[t])), plus(down<4>(s2[t]), down<6>(s3[t])));
  } else {
    for (int u = 0; u < BLOCK / 32; ++u, v += 3 * kCell, x += 8 * kStep<T>) {
      const __m512i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
      dot_each<0>(s0, field(a, 0x07), x);
      dot_each<1>(s1, field(a, 0x38), x);
      dot_each<2>(s0, field(b, 0x07), x);
      dot_each<3>(s1, field(b, 0x38), x);
      dot_each<4>(s2, field(c, 0x07), x);
      dot_each<5>(s1, field(c, 0x38), x);
      dot_each<6>(s3, sixth(a, b, c), x);
      dot_each<7>(s3, seventh(a, b, c), x);
    }
    for (int t = 0; t < T; ++t)
      dots[t] = plus(plus(s0[t], s2[t]), plus(down<3>(s1[t]), down<5>(s3[t])));
  }
}

// A 3-bit unit of 32 columns that is two blocks of 16: cells 0-3 and 4-7.
template <int T>
DIBIT_INLINE void dot_pair3(const uint8_t* v, const int8_t* x, __m512i (&first)[T], __m512i (&second)[T]) {
  if constexpr (T > kFew) {
    clear(first), clear(second);
    dot_cells<3, 0, 4>(v, x, first);
    return dot_cells<3, 4, 8>(v, x, second);
  }
  const __m512i a = load(v), b = load(v + kCell), c = load(v + 2 * kCell);
  __m512i s0[T], s1[T], t0[T], t1[T], t2[T];
  clear(s0), clear(s1), clear(t0), clear(t1), clear(t2);
  dot_each<0>(s0, field(a, 0x07), x);
  dot_each<1>(s1, field(a, 0x38), x);
  dot_each<2>(s0, field(b, 0x07), x);
  dot_each<3>(s1, field(b, 0x38), x);
  dot_each<4>(t0, field(c, 0x07), x);
  dot_each<5>(t1, field(c, 0x38), x);
  dot_each<6>(t2, sixth(a, b, c), x);
  dot_each<7>(t2, seventh(a, b, c), x);
  for (int t = 0; t < T; ++t) {
    first[t] = plus(s0[t], down<3>(s1[t]));
    second[t] = plus(plus(t0[t], down<3>(t1[t])), down<5>(t2[t]));
  }
}

// Up to T tokens, m of them: codes are used where they are unpacked, and never written.
template <int BITS, int BLOCK, int T>
void some_tokens(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
                 int64_t end) {
  constexpr int64_t kBlockBytes = BLOCK / 4 * kCell * BITS / 8;
  constexpr int64_t kBlockStep = BLOCK / 4 * kStep<T>;
  const uint8_t* v = w.codes + begin * w.panel_bytes();
  for (int64_t panel = begin; panel < end; ++panel) {
    __m512 sums[T];
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
    const int8_t* x = a.codes;
    const float *xscales = a.scales, *xsums = a.sums;
    auto add = [&](const __m512i(&dots)[T], const Meta& meta) DIBIT_INLINE_MEMBER {
      for (int t = 0; t < T; ++t) sums[t] = accumulate(sums[t], dots[t], meta.zero, meta.scale, xscales[t], xsums[t]);
      const int64_t stride = T == 1 ? 1 : a.stride;
      x += kBlockStep, xscales += stride, xsums += stride;
    };
    for (int64_t g = 0; g < w.groups; ++g) {
      const Meta meta = load_meta(w, (panel * w.groups + g) * kRows);
      if constexpr (BITS == 3 && BLOCK == 16) {
        __m512i first[T], second[T];
        dot_pair3<T>(v, x, first, second);
        add(first, meta);
        add(second, load_meta(w, (panel * w.groups + ++g) * kRows));
        v += 3 * kCell;
      } else {
        for (int64_t i = 0; i < w.blocks_per_group; ++i, v += kBlockBytes) {
          prefetch(v, kBlockBytes, kAhead);
          __m512i dots[T];
          dot_block<BITS, BLOCK, T>(v, x, dots);
          add(dots, meta);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      if (t < m) store_rows(w, panel, sums[t], bias, y + t * w.n);
  }
}

template <int BITS, int BLOCK>
void gemv_body(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  some_tokens<BITS, BLOCK, 1>(w, a, 1, bias, y, begin, end);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Adds `blocks` blocks of T tokens, whose activations lie by cell, to their sums.
template <int T, int BLOCK>
void tile(const uint8_t* v, const ChunkMeta& meta, int64_t blocks, const int8_t* x, const float* xscales,
          const float* xsums, int64_t stride, float (*sums)[kRows]) {
  for (int64_t b = 0; b < blocks; ++b, xscales += stride, xsums += stride) {
    __m512i dots[T];
    for (int t = 0; t < T; ++t) dots[t] = _mm512_setzero_si512();
    DIBIT_ROLLED for (int c = 0; c < BLOCK / 4; ++c, v += kCell, x += 4 * kTokenTile) {
      const __m512i cell = load(v);
      for (int t = 0; t < T; ++t) dot(dots[t], cell, x + 4 * t);
    }
    const __m512 zero = _mm512_load_ps(meta.zeros[b]), scale = _mm512_load_ps(meta.scales[b]);
    for (int t = 0; t < T; ++t) {
      const __m512 sum = _mm512_load_ps(sums[t]);
      _mm512_store_ps(sums[t], accumulate(sum, dots[t], zero, scale, xscales[t], xsums[t]));
    }
  }
}

template <int BITS, int BLOCK>
void gemm_body(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
               int64_t end) {
  if (m == 2) return some_tokens<BITS, BLOCK, 2>(w, a, m, bias, y, begin, end);
  if (m == 3) return some_tokens<BITS, BLOCK, 3>(w, a, m, bias, y, begin, end);
  if (m == 4) return some_tokens<BITS, BLOCK, 4>(w, a, m, bias, y, begin, end);
  if (m <= 6) return some_tokens<BITS, BLOCK, 6>(w, a, m, bias, y, begin, end);
  if (m <= 8) return some_tokens<BITS, BLOCK, 8>(w, a, m, bias, y, begin, end);
  if (m <= 12) return some_tokens<BITS, BLOCK, 12>(w, a, m, bias, y, begin, end);
  alignas(64) uint8_t unpacked[kColumns / 4 * kCell];
  ChunkMeta meta;
  alignas(64) float sums[kMaxTokens][kRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    std::memset(sums, 0, sizeof sums[0] * static_cast<size_t>(m));
    for (int64_t first = 0; first < w.padded; first += kColumns) {
      const int64_t columns = w.padded - first < kColumns ? w.padded - first : kColumns;
      const int64_t block = first / BLOCK, blocks = columns / BLOCK;
      const uint8_t* v = unpack_slice<BITS, BLOCK, false>(w, {panel, first, columns, 1}, unpacked);
      load_chunk_meta<false>(w, panel, block, blocks, meta);
      auto run = [&](auto count, int64_t t) {
        const int8_t* x = a.codes + t / kTokenTile * kTokenTile * w.padded + first * kTokenTile + t % kTokenTile * 4;
        tile<decltype(count)::value, BLOCK>(v, meta, blocks, x, a.scales + block * a.stride + t,
                                            a.sums + block * a.stride + t, a.stride, sums + t);
      };
      int64_t t = 0;
      for (; t + 16 <= m; t += 16) run(Count<16>{}, t);
      if (m - t >= 8) run(Count<8>{}, t), t += 8;
      if (m - t >= 4) run(Count<4>{}, t), t += 4;
      if (m - t >= 2) run(Count<2>{}, t), t += 2;
      if (m - t >= 1) run(Count<1>{}, t);
    }
    for (int64_t t = 0; t < m; ++t) store_rows(w, panel, _mm512_load_ps(sums[t]), bias, y + t * w.n);
  }
}

Order order(const QWeight& w, int64_t tokens) { return tokens == 1 ? by_row(w) : by_cell(w); }

void gemv(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  DIBIT_BY_SHAPE(gemv_body, w, a, bias, y, begin, end);
}

void gemm(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
          int64_t end) {
  DIBIT_BY_SHAPE(gemm_body, w, a, m, bias, y, begin, end);
}

}  // namespace

const QKernels& avx512_kernels() {
  static const QKernels kernels{order, quantize_avx2, gemv, gemm};
  return kernels;
}

}  // namespace dibit
#endif
