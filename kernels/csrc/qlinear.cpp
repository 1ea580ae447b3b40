// Entry points of the quantized linear and the quantized embedding: packing, activations, the split over threads.
#include "qlinear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "isa.h"
#include "memory.h"
#include "ops.h"
#include "pool.h"

namespace dibit {
namespace {

enum Status { kOk = 0, kBadLayout = 1, kCodeTooLarge = 2, kBadId = 3, kNoMemory = 4 };

const QKernels& kernels() {
#if defined(DIBIT_AMX)
  if (amx_int8()) return amx_kernels();
#endif
#if defined(__x86_64__)
  if (isa() == Isa::avx2) return avx512_vnni() ? avx512_kernels() : avx2_kernels();
#endif
  return portable_kernels();
}

bool valid(const QWeight& w) {
  const bool width = w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8;
  const bool block = w.block == 16 || w.block == 32 || w.block == 64;
  const bool scale = w.scale_bytes == 2 || w.scale_bytes == 4;
  return width && block && scale && w.n > 0 && w.k > 0 && w.blocks > 0 && w.padded == w.blocks * w.block &&
         w.padded >= w.k && w.padded % (w.bits == 3 ? 32 : 16) == 0 && w.blocks_per_group > 0 &&
         w.groups * w.blocks_per_group == w.blocks;
}

// One 64-byte cell as 16 words, 4 codes of a row each.
struct Cell {
  uint32_t row[kRows];
};

// Cells [first, first + 8) of a panel out of codes [N, K]; zero beyond the matrix. Returns the OR of all codes.
uint32_t gather(const QWeight& w, const uint8_t* codes, int64_t panel, int64_t first, Cell* cells) {
  uint32_t seen = 0;
  const int64_t column = first * 4;
  const int64_t columns = std::min<int64_t>(32, w.k - column);
  for (int r = 0; r < kRows; ++r) {
    const int64_t n = panel * kRows + r;
    uint32_t words[8] = {};
    if (n < w.n && columns > 0) std::memcpy(words, codes + n * w.k + column, static_cast<size_t>(columns));
    for (int c = 0; c < 8; ++c) cells[c].row[r] = words[c], seen |= words[c];
  }
  return seen;
}

// 8 cells into 64 * bits bytes.
void pack_cells(const Cell* cells, int64_t bits, uint8_t* out) {
  Cell vectors[8] = {};
  if (bits == 3) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 3; ++v) {
        const uint32_t top = (cells[6].row[r] >> v & 0x01010101) << 6 | (cells[7].row[r] >> v & 0x01010101) << 7;
        vectors[v].row[r] = cells[2 * v].row[r] | cells[2 * v + 1].row[r] << 3 | top;
      }
    }
  } else {
    const int per_vector = static_cast<int>(8 / bits);
    for (int c = 0; c < 8; ++c)
      for (int r = 0; r < kRows; ++r)
        vectors[c / per_vector].row[r] |= cells[c].row[r] << (c % per_vector * static_cast<int>(bits));
  }
  std::memcpy(out, vectors, static_cast<size_t>(bits * kCell));
}

void pack_meta(const QWeight& w, const uint8_t* zeros, const uint8_t* scales, int64_t real_groups, int64_t panel) {
  uint8_t* out_zeros = const_cast<uint8_t*>(w.zeros);
  uint8_t* out_scales = const_cast<uint8_t*>(static_cast<const uint8_t*>(w.scales));
  const size_t size = static_cast<size_t>(w.scale_bytes);
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = panel * kRows + r;
      const int64_t to = (panel * w.groups + g) * kRows + r;
      const int64_t from = n * real_groups + g;
      const bool real = n < w.n && g < real_groups;
      out_zeros[to] = real ? zeros[from] : 0;
      if (real) std::memcpy(out_scales + to * w.scale_bytes, scales + from * w.scale_bytes, size);
      else std::memset(out_scales + to * w.scale_bytes, 0, size);
    }
  }
}

// Work that is worth waking a second thread for, in bytes of weights times tokens.
constexpr int64_t kGrainBytes = 16 << 10;

// Buffers of the calling thread for the quantized activations of some tokens; they only grow.
class Workspace {
 public:
  bool reserve(int64_t tokens, const QWeight& w) {
    const int64_t rows = rounded(tokens), codes = rows * w.padded;
    const int64_t needed = codes + 2 * rows * w.blocks * static_cast<int64_t>(sizeof(float));
    if (needed > capacity_) {
      buffer_.reset();
      capacity_ = 0;
      void* memory = nullptr;
      if (posix_memalign(&memory, 64, static_cast<size_t>(needed)) != 0) return false;
      buffer_.reset(static_cast<uint8_t*>(memory));
      capacity_ = needed;
    }
    codes_ = reinterpret_cast<int8_t*>(buffer_.get());
    scales_ = reinterpret_cast<float*>(buffer_.get() + codes);
    sums_ = scales_ + rows * w.blocks;
    return true;
  }

  // Quantizes x [tokens, w.k].
  Activations quantize(const QKernels& kernel, const QWeight& w, const float* x, int64_t tokens, int row_qmax) const {
    const Order order = kernel.order(w, tokens);
    const int64_t stride = tokens == 1 ? 1 : rounded(tokens);
    for (int64_t b = 0; b < w.blocks && stride != tokens; ++b)
      for (int64_t t = tokens; t < stride; ++t) scales_[b * stride + t] = sums_[b * stride + t] = 0.0f;
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t in_tile = t % kTokenTile;
        int8_t* codes = codes_ + (t - in_tile) * w.padded + in_tile * order.token;
        kernel.quantize(x + t * w.k, w, row_qmax, {codes, order.block, order.cell, scales_ + t, sums_ + t, stride});
      }
    };
    parallel_for(tokens, std::max<int64_t>(1, kGrainBytes / w.padded), body);
    return {codes_, scales_, sums_, stride};
  }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  static int64_t rounded(int64_t tokens) { return (tokens + kTokenTile - 1) / kTokenTile * kTokenTile; }

  std::unique_ptr<uint8_t, Free> buffer_;
  int64_t capacity_ = 0;
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  float* sums_ = nullptr;
};

// Tokens that share one unpacking of a panel: their activations should stay in a 1 MB L2.
int64_t token_block(const QWeight& w, int64_t m) {
  constexpr int64_t kBudget = 512 << 10;
  const int64_t most = std::clamp<int64_t>(kBudget / w.padded, 32, kMaxTokens);
  const int64_t count = (m + most - 1) / most;
  return std::min<int64_t>(((m + count - 1) / count + 15) / 16 * 16, kMaxTokens);
}

// y [M, N] of x [M, K]; false without memory for the activations.
bool linear(const QWeight& w, const float* x, int64_t m, const float* bias, int row_qmax, float* y,
            Workspace& space) {
  const QKernels& kernel = kernels();
  const int64_t step = token_block(w, m);
  if (!space.reserve(std::min(step, m), w)) return false;
  for (int64_t first = 0; first < m; first += step) {
    const int64_t tokens = std::min(step, m - first);
    const Activations a = space.quantize(kernel, w, x + first * w.k, tokens, row_qmax);
    float* out = y + first * w.n;
    auto body = [&](int64_t begin, int64_t end) {
      if (tokens == 1) kernel.gemv(w, a, bias, out, begin, end);
      else kernel.gemm(w, a, tokens, bias, out, begin, end);
    };
    // Several tokens: panels in pairs, which share loads of activations.
    const int64_t least = tokens == 1 ? 1 : 2;
    parallel_for(w.panels(), std::max<int64_t>(least, kGrainBytes / (w.panel_bytes() * tokens)), body);
  }
  return true;
}

void embedding_row(const QWeight& w, int64_t id, float* y) {
  const int64_t panel = id / kRows, row = id % kRows;
  const uint8_t* base = w.codes + panel * w.panel_bytes() + row * 4;
  const int64_t columns_per_group = w.block * w.blocks_per_group;
  const int per_vector = static_cast<int>(8 / w.bits);
  const int mask = (1 << w.bits) - 1;
  for (int64_t g = 0, k = 0; k < w.k; ++g) {
    const int64_t meta = (panel * w.groups + g) * kRows + row;
    const float scale = scale_at(w, meta);
    const float zero = zero_at(w, meta);
    for (const int64_t stop = std::min(w.k, k + columns_per_group); k < stop;) {
      const int64_t cell = k / 4;
      const int64_t slot = cell % 8;
      for (int j = static_cast<int>(k % 4); j < 4 && k < stop; ++j, ++k) {
        int code;
        if (w.bits == 3) {
          const uint8_t* v = base + cell / 8 * 3 * kCell + j;
          if (slot < 6) code = v[slot / 2 * kCell] >> (slot % 2 * 3) & 7;
          else code = (v[0] >> slot & 1) | (v[kCell] >> slot & 1) << 1 | (v[2 * kCell] >> slot & 1) << 2;
        } else {
          code = base[cell / per_vector * kCell + j] >> (cell % per_vector * w.bits) & mask;
        }
        y[k] = (static_cast<float>(code) - zero) * scale;
      }
    }
  }
}

}  // namespace
}  // namespace dibit

using dibit::QWeight;

// codes [N, K], zeros and scales [N, groups] (scales in w->scale_bytes) into the arrays that `w` points to.
DIBIT_API int dibit_qlinear_pack(const QWeight* w, const uint8_t* codes, const uint8_t* zeros, const void* scales,
                                 int64_t groups) {
  if (!dibit::valid(*w) || groups < 1 || groups > w->groups) return dibit::kBadLayout;
  dibit::advise_huge(w->codes, w->panels() * w->panel_bytes());
  std::atomic<uint32_t> seen{0};
  uint8_t* out = const_cast<uint8_t*>(w->codes);
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t mine = 0;
    for (int64_t panel = begin; panel < end; ++panel) {
      uint8_t* to = out + panel * w->panel_bytes();
      for (int64_t cell = 0; cell * 4 < w->padded; cell += 8) {
        dibit::Cell cells[8];
        mine |= dibit::gather(*w, codes, panel, cell, cells);
        const int64_t count = std::min<int64_t>(8, w->padded / 4 - cell);
        uint8_t packed[8 * dibit::kCell];
        dibit::pack_cells(cells, w->bits, packed);
        std::memcpy(to, packed, static_cast<size_t>(count * dibit::kCell * w->bits / 8));
        to += count * dibit::kCell * w->bits / 8;
      }
      dibit::pack_meta(*w, zeros, static_cast<const uint8_t*>(scales), groups, panel);
    }
    seen.fetch_or(mine);
  };
  dibit::parallel_for(w->panels(), 4, body);
  const uint32_t above = 0x01010101u * (0xffu & ~((1u << w->bits) - 1));
  return (seen.load() & above) != 0 ? dibit::kCodeTooLarge : dibit::kOk;
}

// x [M, K], bias [N] or null, y [M, N]; contiguous float32. activation_bits: 2 to 8, or 0 for a scale per block.
DIBIT_API int dibit_qlinear(const QWeight* w, const float* x, int64_t m, const float* bias, int64_t activation_bits,
                            float* y) {
  static thread_local dibit::Workspace space;
  const bool width = activation_bits == 0 || (activation_bits >= 2 && activation_bits <= 8);
  if (!dibit::valid(*w) || m < 0 || !width) return dibit::kBadLayout;
  if (m == 0) return dibit::kOk;
  const int row_qmax = activation_bits == 0 ? 0 : (1 << (activation_bits - 1)) - 1;
  return dibit::linear(*w, x, m, bias, row_qmax, y, space) ? dibit::kOk : dibit::kNoMemory;
}

// ids [T], y [T, K].
DIBIT_API int dibit_embedding(const QWeight* w, const int64_t* ids, int64_t count, float* y) {
  if (!dibit::valid(*w)) return dibit::kBadLayout;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= w->n) return dibit::kBadId;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dibit::embedding_row(*w, ids[i], y + i * w->k);
  };
  dibit::parallel_for(count, std::max<int64_t>(1, dibit::kGrainBytes / w->k), body);
  return dibit::kOk;
}
