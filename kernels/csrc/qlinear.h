// The packed weight of the cpu backend and the kernels that run on it.
//
// Rows come in panels of 16. A cell is 64 bytes: 16 rows x 4 consecutive columns, row-major, so that one 32-bit lane
// holds 4 columns of one row and a broadcast of 4 activations feeds every row without a horizontal sum. Cells of
// narrow codes are stored several to a 64-byte vector, one above the other in each byte:
//
//   8 bits   one vector = cell c
//   4 bits   bits 0-3 = cell 2v, bits 4-7 = cell 2v + 1
//   2 bits   bits 2i, 2i + 1 = cell 4v + i
//   3 bits   three vectors A B C = 8 cells: bits 0-2 and 3-5 of A, B, C are cells 0..5, bit 6 of A, B, C are bits
//            0, 1, 2 of cell 6, bit 7 likewise of cell 7
//
// Columns are padded with zero codes to whole blocks (3 bits: to 32 columns at least), rows to whole panels.
//
// Activations are quantized once per call: symmetric int8 in [-127, 127], one float32 scale per block of
// min(group, 32) columns (the library takes 16, 32 or 64). A call may ask for activations of 4, 6 or 8 bits instead:
// then one scale holds for the whole row, and is repeated in its blocks. With integer sums per block, exact in int32,
//
//   y[m, n] = sum over blocks b in ascending order of  (isum - z * asum) * (s_w * s_a)     one fma each, from 0
//
// z = zero_first + zero_step * field, one fma; isum - z * asum another: exact where z is an integer (all below 2^24),
// rounded once where it is a fraction.
// then + bias. Every body (portable, AVX2, AVX-512, AMX; one token or many) follows exactly this order of float
// operations, so that they agree bit for bit and a row of y does not depend on the other rows. A block (or row) that
// holds a NaN or an infinity has scale NaN, hence a row of y that is NaN.
#pragma once
#include <cstdint>

#include "isa.h"

namespace dibit {

constexpr int kRows = 16;
constexpr int kCell = 64;
constexpr int kMaxBlock = 64;

// Mirrored by native.QWeight in kernels/qlinear_cpu.py.
struct QWeight {
  const uint8_t* codes;   // [panels, padded / 4 * kCell * bits / 8]
  const void* scales;     // [panels, groups, 16] float16, or float32 when scale_bytes is 4
  const uint8_t* zeros;   // [panels, groups, 16]
  int64_t n, k;           // rows and columns before padding
  int64_t padded;         // columns stored: blocks * block
  int64_t block;          // columns per activation scale: 16, 32 or 64
  int64_t blocks;         // per row
  int64_t groups;         // per row, those of the padding included
  int64_t blocks_per_group;
  int64_t bits;
  int64_t scale_bytes;
  float zero_first, zero_step;  // a zero field c stands for zero_first + zero_step * c

  __attribute__((always_inline)) int64_t panels() const { return (n + kRows - 1) / kRows; }
  __attribute__((always_inline)) int64_t panel_bytes() const { return padded / 4 * kCell * bits / 8; }
};

// Tokens whose activations lie together.
constexpr int kTokenTile = 16;

// How the codes of 16 tokens lie: the bytes from one token, block and cell of 4 columns to the next.
struct Order {
  int64_t token, block, cell;
};

// Row after row.
static inline Order by_row(const QWeight& w) { return {w.padded, w.block, 4}; }
// A cell of every token, then the next: what is multiplied with a cell of weights has one address and 16 offsets.
static inline Order by_cell(const QWeight& w) { return {4, kTokenTile * w.block, 4 * kTokenTile}; }
// A block of every token, then the next: the operand of a matrix unit.
static inline Order by_block(const QWeight& w) { return {w.block, kTokenTile * w.block, 4}; }

// Quantized activations of M tokens. There is memory for a multiple of 16; the scales and sums of what is not there
// are 0, its codes anything.
struct Activations {
  const int8_t* codes;   // [M / 16] times 16 tokens of `padded` bytes, in the order that the body asked for
  const float* scales;   // [blocks, stride]
  const float* sums;     // [blocks, stride]; sum of the codes of a block, an integer
  int64_t stride;        // M rounded up to a multiple of 16; 1 for one token
};

// Where one token's go.
struct Quantized {
  int8_t* codes;
  int64_t block, cell;   // as in Order
  float *scales, *sums;
  int64_t stride;        // from one block's to the next
};

// One body per ISA.
struct QKernels {
  // The order in which gemm wants that many tokens; by row for one, which gemv takes.
  Order (*order)(const QWeight& w, int64_t tokens);
  // One row of x, w.k columns and zeros up to w.padded. `row_qmax` is the largest code under one scale for the whole
  // row; 0: a scale for each block, and codes up to 127.
  void (*quantize)(const float* x, const QWeight& w, int row_qmax, const Quantized& to);
  // y[n] for the rows of panels [begin, end), one token.
  void (*gemv)(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end);
  // y[m, n] (row stride w.n) for tokens [0, m), m <= kMaxTokens.
  void (*gemm)(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
               int64_t end);
};

constexpr int kMaxTokens = 128;

const QKernels& portable_kernels();
#if defined(__x86_64__)
const QKernels& avx2_kernels();
const QKernels& avx512_kernels();
#if defined(DIBIT_AMX)
const QKernels& amx_kernels();
#endif
// The activations of the AVX-512 body too: a division per element bounds it.
void quantize_avx2(const float* x, const QWeight& w, int row_qmax, const Quantized& to);
#endif

// Calls body<bits, block> for the shape of `w`.
#define DIBIT_BY_SHAPE(body, ...)                          \
  do {                                                     \
    switch (w.bits * 100 + w.block) {                      \
      case 216: return body<2, 16>(__VA_ARGS__);           \
      case 232: return body<2, 32>(__VA_ARGS__);           \
      case 264: return body<2, 64>(__VA_ARGS__);           \
      case 316: return body<3, 16>(__VA_ARGS__);           \
      case 332: return body<3, 32>(__VA_ARGS__);           \
      case 364: return body<3, 64>(__VA_ARGS__);           \
      case 416: return body<4, 16>(__VA_ARGS__);           \
      case 432: return body<4, 32>(__VA_ARGS__);           \
      case 464: return body<4, 64>(__VA_ARGS__);           \
      case 816: return body<8, 16>(__VA_ARGS__);           \
      case 832: return body<8, 32>(__VA_ARGS__);           \
      default: return body<8, 64>(__VA_ARGS__);            \
    }                                                      \
  } while (false)

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    // Subnormal: the integer times 2^-24, exact in float32.
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

static inline float scale_at(const QWeight& w, int64_t index) {
  return w.scale_bytes == 2 ? half_to_float(static_cast<const uint16_t*>(w.scales)[index])
                            : static_cast<const float*>(w.scales)[index];
}

static inline float zero_at(const QWeight& w, int64_t index) {
  return __builtin_fmaf(static_cast<float>(w.zeros[index]), w.zero_step, w.zero_first);
}

// Scale of numbers up to `top`, of which the largest becomes the code `qmax`; NaN where top is not finite.
static inline float activation_scale(float top, int qmax) {
  return top <= 3.402823466e38f ? top / static_cast<float>(qmax) : __builtin_nanf("");
}

// How far ahead one token reads: across a page border the hardware does not look. Several tokens fetch the next chunk
// while they work on this one.
constexpr int64_t kAhead = 2048;

// Asks for the cache lines that lie `ahead` bytes past a block about to be used.
static inline void prefetch(const uint8_t* block, int64_t bytes, int64_t ahead) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(block + ahead + i);
}

// Writes the valid part of a panel's 16 sums, bias added.
static inline void store_panel(const QWeight& w, int64_t panel, const float* sums, const float* bias, float* y) {
  const int64_t first = panel * kRows;
  const int64_t count = w.n - first < kRows ? w.n - first : kRows;
  for (int64_t r = 0; r < count; ++r) y[first + r] = bias == nullptr ? sums[r] : sums[r] + bias[first + r];
}

}  // namespace dibit
