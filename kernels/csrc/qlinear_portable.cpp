// The body that any C++17 compiler can build, and the plainest statement of the algorithm in qlinear.h.
#include <cmath>
#include <cstring>

#include "qlinear.h"

namespace dibit {
namespace {

// The largest magnitude of `count` numbers.
float largest(const float* x, int64_t count) {
  // Bit patterns of non-negative floats order like the floats, with infinity and then NaN on top.
  uint32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    if (bits > top) top = bits;
  }
  float magnitude;
  std::memcpy(&magnitude, &top, 4);
  return magnitude;
}

void quantize(const float* x, const QWeight& w, int row_qmax, const Quantized& to) {
  const int qmax = row_qmax > 0 ? row_qmax : 127;
  const float bound = static_cast<float>(qmax);
  const float row_scale = row_qmax > 0 ? activation_scale(largest(x, w.k), qmax) : 0.0f;
  for (int64_t b = 0; b < w.blocks; ++b) {
    const int64_t begin = b * w.block;
    const int64_t real = w.k <= begin ? 0 : (w.k - begin < w.block ? w.k - begin : w.block);
    const float scale = row_qmax > 0 ? row_scale : activation_scale(largest(x + begin, real), qmax);
    int32_t sum = 0;
    for (int64_t i = 0; i < w.block; ++i) {
      float q = 0.0f;
      if (scale > 0.0f && i < real) {
        q = std::nearbyint(x[begin + i] / scale);
        q = q < -bound ? -bound : q > bound ? bound : q;
      }
      to.codes[b * to.block + i / 4 * to.cell + i % 4] = static_cast<int8_t>(q);
      sum += static_cast<int8_t>(q);
    }
    to.scales[b * to.stride] = scale;
    to.sums[b * to.stride] = static_cast<float>(sum);
  }
}

// Cells [first, first + count) of a panel, one byte a code.
void unpack(const QWeight& w, const uint8_t* panel, int64_t first, int64_t count, uint8_t* cells) {
  for (int64_t c = 0; c < count; ++c, cells += kCell) {
    const int64_t cell = first + c;
    if (w.bits == 3) {
      const uint8_t* v = panel + cell / 8 * 3 * kCell;
      const int64_t slot = cell % 8;
      for (int i = 0; i < kCell; ++i) {
        if (slot < 6) cells[i] = v[slot / 2 * kCell + i] >> (slot % 2 * 3) & 7;
        else cells[i] = (v[i] >> slot & 1) | (v[kCell + i] >> slot & 1) << 1 | (v[2 * kCell + i] >> slot & 1) << 2;
      }
    } else {
      const int64_t per_vector = 8 / w.bits;
      const uint8_t* v = panel + cell / per_vector * kCell;
      const int shift = static_cast<int>(cell % per_vector * w.bits);
      const uint8_t mask = static_cast<uint8_t>((1 << w.bits) - 1);
      for (int i = 0; i < kCell; ++i) cells[i] = v[i] >> shift & mask;
    }
  }
}

void gemm(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
          int64_t end) {
  uint8_t cells[kMaxBlock / 4 * kCell];
  float sums[kMaxTokens][kRows];
  for (int64_t panel = begin; panel < end; ++panel) {
    std::memset(sums, 0, sizeof sums[0] * static_cast<size_t>(m));
    for (int64_t b = 0; b < w.blocks; ++b) {
      unpack(w, w.codes + panel * w.panel_bytes(), b * (w.block / 4), w.block / 4, cells);
      const int64_t meta = (panel * w.groups + b / w.blocks_per_group) * kRows;
      float zeros[kRows];
      for (int r = 0; r < kRows; ++r) zeros[r] = zero_at(w, meta + r);
      for (int64_t t = 0; t < m; ++t) {
        const int8_t* x = a.codes + t * w.padded + b * w.block;
        int32_t dots[kRows] = {};
        for (int64_t c = 0; c < w.block / 4; ++c)
          for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < 4; ++j) dots[r] += cells[c * kCell + r * 4 + j] * x[c * 4 + j];
        const float scale = a.scales[b * a.stride + t];
        const float sum = a.sums[b * a.stride + t];
        for (int r = 0; r < kRows; ++r) {
          const float dot = std::fma(-zeros[r], sum, static_cast<float>(dots[r]));
          sums[t][r] = std::fma(dot, scale_at(w, meta + r) * scale, sums[t][r]);
        }
      }
    }
    for (int64_t t = 0; t < m; ++t) store_panel(w, panel, sums[t], bias, y + t * w.n);
  }
}

void gemv(const QWeight& w, const Activations& a, const float* bias, float* y, int64_t begin, int64_t end) {
  gemm(w, a, 1, bias, y, begin, end);
}

}  // namespace

const QKernels& portable_kernels() {
  static const QKernels kernels{[](const QWeight& w, int64_t) { return by_row(w); }, quantize, gemv, gemm};
  return kernels;
}

}  // namespace dibit
