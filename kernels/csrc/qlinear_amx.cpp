// AMX body of the quantized linear for several tokens (algorithm and layout: qlinear.h). One token has nothing to gain.
//
// `tdpbssd` multiplies 16 tokens of activations by a block of 16 rows of codes into 16 x 16 int32 sums. An unpacked
// panel is the right operand as it lies in memory: a tile row wants 4 consecutive columns of 16 rows, which is a cell.
// Where zero points are whole and codes narrow they are taken off while unpacking, so that the sums come out as
// isum - z * asum. Sums go through L1 to the vector units, which scale them block by block as every other body does.
//
// Instructions are written out: gcc 12's intrinsics do not say what memory they read.
#include "qlinear.h"
#if defined(DIBIT_AMX)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

// Below the includes: what the standard library inlines must stay runnable on every machine.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#include "qlinear_512.h"

namespace dibit {
namespace {

constexpr int kTile = 16;
// Blocks whose sums are made while those of as many before are scaled.
constexpr int kSub = 4;
// Columns unpacked at a time: with activations and sums they stay in L1.
constexpr int64_t kColumns = 512;
// With fewer tokens the vector units alone are as fast.
constexpr int64_t kLeastTokens = 16;

// Tokens, and sums, of 16 and of the last few; the codes of a block.
enum Tiles { kTokens, kLastTokens, kCodes, kSums, kLastSums };

// Tiles of this thread for blocks of `block` columns and `last` tokens beyond a multiple of 16.
class Configured {
 public:
  Configured(int block, int last) {
    set(kTokens, kTile, block);
    if (last != 0) set(kLastTokens, last, block);
    set(kCodes, block / 4, kCell);
    set(kSums, kTile, kCell);
    if (last != 0) set(kLastSums, last, kCell);
    __asm__ volatile("ldtilecfg %0" ::"m"(config_));
  }
  // Tiles in use are 8 KB more to save with every switch of threads.
  ~Configured() { __asm__ volatile("tilerelease"); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  void set(int tile, int rows, int bytes) {
    config_.rows[tile] = static_cast<uint8_t>(rows);
    config_.row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
  Config config_;
};

using Dots = int32_t[kTile][kRows];

template <int TILE>
DIBIT_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

// Activations of some tokens from one block on.
struct Tokens {
  const int8_t* codes;
  const float *scales, *sums;
  int64_t stride, block_stride;
};

// Blocks [first, first + count) of a chunk.
struct Span {
  int64_t first, count;
};

// An unpacked chunk of a panel.
struct Chunk {
  const uint8_t* cells;
  ChunkMeta meta;
};

// dots[block][token][row] of a span.
template <int BLOCK, bool CENTERED, int TOKENS, int SUMS>
DIBIT_INLINE void multiply(const Chunk& chunk, const Span& span, const Tokens& x, Dots* dots) {
  for (int64_t b = 0; b < span.count; ++b) {
    const int64_t block = span.first + b;
    load_tile<TOKENS>(x.codes + block * BLOCK, x.stride);
    load_tile<kCodes>(chunk.cells + block * BLOCK * kRows, kCell);
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(SUMS));
    if constexpr (CENTERED)
      __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(TOKENS), "i"(kCodes));
    else
      __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(TOKENS), "i"(kCodes));
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(&dots[b]), "r"(int64_t{kCell}), "i"(SUMS) : "memory");
  }
}

// Scales a span's sums of T tokens, from `token` on, and adds them up.
template <int T, bool CENTERED>
DIBIT_INLINE void add(const Dots* dots, int token, const ChunkMeta& meta, const Span& span, const Tokens& x,
                      float (*sums)[kRows]) {
  __m512 sum[T];
  for (int t = 0; t < T; ++t) sum[t] = _mm512_load_ps(sums[token + t]);
  for (int64_t b = 0; b < span.count; ++b) {
    const __m512 zero = _mm512_load_ps(meta.zeros[span.first + b]);
    const __m512 scale = _mm512_load_ps(meta.scales[span.first + b]);
    for (int t = 0; t < T; ++t) {
      const int64_t at = (token + t) * x.block_stride + span.first + b;
      const __m512i own = _mm512_load_si512(dots[b][token + t]);
      if constexpr (CENTERED) sum[t] = scaled(sum[t], _mm512_cvtepi32_ps(own), scale, x.scales[at]);
      else sum[t] = accumulate(sum[t], own, zero, scale, x.scales[at], x.sums[at]);
    }
  }
  for (int t = 0; t < T; ++t) _mm512_store_ps(sums[token + t], sum[t]);
}

template <bool CENTERED>
DIBIT_INLINE void add_all(const Dots* dots, int tokens, const ChunkMeta& meta, const Span& span, const Tokens& x,
                          float (*sums)[kRows]) {
  if (tokens == kTile) return add<kTile, CENTERED>(dots, 0, meta, span, x, sums);
  int t = 0;
  if (tokens - t >= 8) add<8, CENTERED>(dots, t, meta, span, x, sums), t += 8;
  if (tokens - t >= 4) add<4, CENTERED>(dots, t, meta, span, x, sums), t += 4;
  if (tokens - t >= 2) add<2, CENTERED>(dots, t, meta, span, x, sums), t += 2;
  if (tokens - t >= 1) add<1, CENTERED>(dots, t, meta, span, x, sums);
}

// Adds `blocks` blocks of 16 tokens, or of the `tokens` last ones, to their sums.
template <int BLOCK, bool CENTERED, bool LAST>
DIBIT_INLINE void tile(const Chunk& chunk, int64_t blocks, const Tokens& x, int tokens, float (*sums)[kRows]) {
  alignas(64) Dots dots[2][kSub];
  auto span = [&](int64_t first) { return Span{first, std::min<int64_t>(kSub, blocks - first)}; };
  auto begin = [&](int64_t first, int64_t turn) {
    multiply<BLOCK, CENTERED, LAST ? kLastTokens : kTokens, LAST ? kLastSums : kSums>(chunk, span(first), x,
                                                                                       dots[turn]);
  };
  begin(0, 0);
  for (int64_t first = 0, turn = 0; first < blocks; first += kSub, turn ^= 1) {
    if (first + kSub < blocks) begin(first + kSub, turn ^ 1);
    add_all<CENTERED>(dots[turn], LAST ? tokens : kTile, chunk.meta, span(first), x, sums);
  }
}

template <int BITS, int BLOCK, bool CENTERED>
void gemm_panel(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t panel) {
  alignas(64) uint8_t unpacked[kColumns / 4 * kCell];
  alignas(64) float sums[kMaxTokens][kRows];
  Chunk chunk;
  std::memset(sums, 0, sizeof sums[0] * static_cast<size_t>(m));
  for (int64_t first = 0; first < w.padded; first += kColumns) {
    const int64_t columns = std::min(kColumns, w.padded - first);
    const int64_t block = first / BLOCK, blocks = columns / BLOCK;
    chunk.cells = unpack_chunk<BITS, BLOCK, CENTERED>(w, panel, first, columns, unpacked);
    load_chunk_meta(w, panel, block, blocks, chunk.meta);
    for (int64_t t = 0; t < m; t += kTile) {
      const Tokens x{a.codes + t * w.padded + first, a.scales + t * w.blocks + block, a.sums + t * w.blocks + block,
                     w.padded, w.blocks};
      if (m - t >= kTile) tile<BLOCK, CENTERED, false>(chunk, blocks, x, kTile, sums + t);
      else tile<BLOCK, CENTERED, true>(chunk, blocks, x, static_cast<int>(m - t), sums + t);
    }
  }
  for (int64_t t = 0; t < m; ++t) store_panel(w, panel, sums[t], bias, y + t * w.n);
}

template <int BITS, int BLOCK, bool CENTERED>
void gemm_panels(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
                 int64_t end) {
  const Configured tiles(BLOCK, static_cast<int>(m % kTile));
  for (; begin < end; ++begin) gemm_panel<BITS, BLOCK, CENTERED>(w, a, m, bias, y, begin);
}

template <int BITS, int BLOCK>
void gemm_body(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
               int64_t end) {
  if constexpr (BITS < 8) {
    if (w.zero_first == 0 && w.zero_step == 1) return gemm_panels<BITS, BLOCK, true>(w, a, m, bias, y, begin, end);
  }
  gemm_panels<BITS, BLOCK, false>(w, a, m, bias, y, begin, end);
}

void gemm(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
          int64_t end) {
  if (m < kLeastTokens) return avx512_kernels().gemm(w, a, m, bias, y, begin, end);
  DIBIT_BY_SHAPE(gemm_body, w, a, m, bias, y, begin, end);
}

}  // namespace

const QKernels& amx_kernels() {
  static const QKernels kernels{quantize_avx2, avx512_kernels().gemv, gemm};
  return kernels;
}

}  // namespace dibit
#endif
