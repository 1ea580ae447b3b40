// AMX body of the quantized linear for several tokens (algorithm and layout: qlinear.h). One token has nothing to gain.
//
// `tdpbssd` multiplies 16 tokens of activations by a block of 16 rows of codes into 16 x 16 int32 sums. An unpacked
// panel is the right operand as it lies in memory: a tile row wants 4 consecutive columns of 16 rows, which is a cell.
// Where zero points are whole and codes narrow they are taken off while unpacking, so that the sums come out as
// isum - z * asum. Sums go through L1 to the vector units, which scale them block by block as every other body does:
// three instructions for 16 sums, which bound the whole. Activations lie block by block, 16 tokens in 512 bytes.
//
// Instructions are written out: gcc 12's intrinsics do not say what memory they read.
#include "qlinear.h"
#if defined(DIBIT_AMX)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

// Below the includes: what the standard library inlines must stay runnable on every machine.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#include "qlinear_512.h"

namespace dibit {
namespace {

template <int I>
using Index = std::integral_constant<int, I>;

// Panels that share a load of activations.
constexpr int kPanels = 2;
// Blocks whose products are made while those of as many before are scaled.
constexpr int kSub = 4;
// Products in between: they are made in turn in as many tiles.
constexpr int kInFlight = 2;
// Columns unpacked at a time: with activations and sums of two threads they stay in L1.
constexpr int64_t kColumns = 256;
static_assert(kColumns <= kMostColumns);
// With fewer tokens the vector units alone are as fast.
constexpr int64_t kLeastTokens = 9;

enum Tiles { kTokens = 0, kCodes = 2, kSums = 4 };

// Tiles of this thread for blocks of `block` columns: two of up to 16 tokens, two of codes, four of sums.
class Configured {
 public:
  Configured(int block, int tokens) {
    for (int i = 0; i < 2; ++i) set(kTokens + i, tokens, block), set(kCodes + i, block / 4, kCell);
    for (int i = 0; i < 4; ++i) set(kSums + i, tokens, kCell);
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

// Integer sums of a block of 16 tokens in both panels.
using Dots = int32_t[kPanels][kTokenTile][kRows];
using Sums = float[kPanels][kRows];

// A chunk of both panels, unpacked, and the activations that go with it.
template <int BLOCK>
struct Chunk {
  const uint8_t* cells[kPanels];
  ChunkMeta meta[kPanels];
  const int8_t* codes;
  const float *scales, *sums;
  int64_t blocks, token_bytes, stride;

  const int8_t* tokens(int64_t t, int64_t block) const {
    return codes + t * token_bytes + block * BLOCK * kTokenTile;
  }
};

// Blocks [block, block + count) of a chunk for tokens [t, t + 16), `tokens` of which there are.
struct Place {
  int64_t t, tokens, block, count;
};

template <int TILE>
DIBIT_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
DIBIT_INLINE void store_tile(void* to) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{kCell}), "i"(TILE) : "memory");
}

// Stores product I of a place.
template <int I>
DIBIT_INLINE void store_product(const Place& at, Dots* dots) {
  if (I / kPanels < at.count) store_tile<kSums + I % 4>(dots[I / kPanels][I % kPanels]);
}

// Product I of a place: block I / 2 in panel I % 2. The one before last is stored first: by now it is done.
template <int BLOCK, bool CENTERED, int I>
DIBIT_INLINE void multiply(const Chunk<BLOCK>& chunk, const Place& at, Dots* dots) {
  constexpr int kBlock = I / kPanels, kPanel = I % kPanels;
  constexpr int kOwn = kSums + I % 4, kX = kTokens + kBlock % 2, kV = kCodes + kPanel;
  if (kBlock < at.count) {
    const int64_t block = at.block + kBlock;
    if constexpr (kPanel == 0) load_tile<kX>(chunk.tokens(at.t, block), BLOCK);
    load_tile<kV>(chunk.cells[kPanel] + block * BLOCK * kRows, kCell);
  }
  if constexpr (I >= kInFlight) store_product<I - kInFlight>(at, dots);
  if (kBlock < at.count) {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kOwn));
    if constexpr (CENTERED) __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kOwn), "i"(kX), "i"(kV));
    else __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kOwn), "i"(kX), "i"(kV));
  }
}

// Scales the products of one block for 8 tokens, `token` and those after it, and adds them up.
template <int BLOCK, bool CENTERED, int HALF>
DIBIT_INLINE void add(const Chunk<BLOCK>& chunk, int64_t block, int64_t token, const Dots& dots,
                      __m512 (&sum)[8][kPanels]) {
  const float* scales = chunk.scales + block * chunk.stride + token;
  const float* asums = chunk.sums + block * chunk.stride + token;
  for (int p = 0; p < kPanels; ++p) {
    const __m512 scale = _mm512_load_ps(chunk.meta[p].scales[block]);
    const __m512 zero = CENTERED ? scale : _mm512_load_ps(chunk.meta[p].zeros[block]);
    for (int t = 0; t < 8; ++t) {
      const __m512i own = _mm512_load_si512(dots[p][8 * HALF + t]);
      if constexpr (CENTERED) sum[t][p] = scaled(sum[t][p], _mm512_cvtepi32_ps(own), scale, scales[t]);
      else sum[t][p] = accumulate(sum[t][p], own, zero, scale, scales[t], asums[t]);
    }
  }
}

// Adds the products `made` at a place to the sums of tokens [HALF * 8, HALF * 8 + 8) of it, and meanwhile makes those
// of the place after it. Beside tile instructions the vector units start one 512-bit instruction a cycle instead of
// two, and neither side hides behind the other unless they alternate.
template <int BLOCK, bool CENTERED, int HALF>
DIBIT_INLINE void half_step(const Chunk<BLOCK>& chunk, const Place& at, const Dots* made, Sums* sums,
                            const Place& after, Dots* next) {
  const int64_t token = at.t + 8 * HALF;
  const int64_t count = at.tokens > 8 * HALF ? at.count : 0;
  __m512 sum[8][kPanels];
  auto each = [&](auto&& visit) DIBIT_INLINE_MEMBER {
    for (int t = 0; t < 8; ++t)
      for (int p = 0; p < kPanels; ++p) visit(sum[t][p], sums[token + t][p]);
  };
  each([](__m512& own, const float* from) DIBIT_INLINE_MEMBER { own = _mm512_load_ps(from); });
  auto both = [&](auto index) DIBIT_INLINE_MEMBER {
    constexpr int kBlock = decltype(index)::value;
    multiply<BLOCK, CENTERED, HALF * kSub + kBlock>(chunk, after, next);
    if (kBlock < count) add<BLOCK, CENTERED, HALF>(chunk, at.block + kBlock, token, made[kBlock], sum);
  };
  both(Index<0>{}), both(Index<1>{}), both(Index<2>{}), both(Index<3>{});
  each([](const __m512& own, float* to) DIBIT_INLINE_MEMBER { _mm512_store_ps(to, own); });
}

// Adds a chunk to the sums of all tokens.
template <int BLOCK, bool CENTERED>
DIBIT_INLINE void add_chunk(const Chunk<BLOCK>& chunk, int64_t m, Sums* sums) {
  alignas(64) Dots dots[2][kSub];
  auto place = [&](int64_t t, int64_t block) {
    return Place{t, m - t, block, t < m ? std::min<int64_t>(kSub, chunk.blocks - block) : 0};
  };
  auto following = [&](const Place& at) {
    const int64_t block = at.block + at.count;
    return block < chunk.blocks ? place(at.t, block) : place(at.t + kTokenTile, 0);
  };
  const Place nowhere{0, 0, 0, 0};
  Place at = place(0, 0);
  int turn = 0;
  // The first products have nothing to be made beside.
  half_step<BLOCK, CENTERED, 0>(chunk, nowhere, nullptr, sums, at, dots[turn]);
  half_step<BLOCK, CENTERED, 1>(chunk, nowhere, nullptr, sums, at, dots[turn]);
  store_product<2 * kSub - 2>(at, dots[turn]);
  store_product<2 * kSub - 1>(at, dots[turn]);
  while (at.count != 0) {
    const Place after = following(at);
    half_step<BLOCK, CENTERED, 0>(chunk, at, dots[turn], sums, after, dots[turn ^ 1]);
    half_step<BLOCK, CENTERED, 1>(chunk, at, dots[turn], sums, after, dots[turn ^ 1]);
    store_product<2 * kSub - 2>(after, dots[turn ^ 1]);
    store_product<2 * kSub - 1>(after, dots[turn ^ 1]);
    at = after;
    turn ^= 1;
  }
}

// Panels `panel` and the one after it; or it twice, where `last` is it.
template <int BITS, int BLOCK, bool CENTERED>
void gemm_pair(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t panel,
               int64_t last) {
  alignas(64) uint8_t unpacked[kPanels][kColumns / 4 * kCell];
  alignas(64) Sums sums[kMaxTokens];
  const int64_t panels[kPanels] = {panel, std::min(panel + 1, last)};
  // Every token's results are a page or more apart: asked for now, they are there when they are written.
  for (int64_t t = 0; t < m; ++t) __builtin_prefetch(y + t * w.n + panel * kRows, 1);
  Chunk<BLOCK> chunk;
  chunk.token_bytes = w.padded;
  chunk.stride = a.stride;
  std::memset(sums, 0, sizeof sums[0] * static_cast<size_t>(a.stride));
  for (int64_t first = 0; first < w.padded; first += kColumns) {
    const int64_t columns = std::min(kColumns, w.padded - first), block = first / BLOCK;
    for (int p = 0; p < kPanels; ++p) {
      chunk.cells[p] = unpack_slice<BITS, BLOCK, CENTERED>(w, {panels[p], first, columns, kPanels}, unpacked[p]);
      load_chunk_meta<CENTERED>(w, panels[p], block, columns / BLOCK, chunk.meta[p]);
    }
    chunk.codes = a.codes + first * kTokenTile;
    chunk.scales = a.scales + block * a.stride;
    chunk.sums = a.sums + block * a.stride;
    chunk.blocks = columns / BLOCK;
    add_chunk<BLOCK, CENTERED>(chunk, m, sums);
  }
  for (int64_t t = 0; t < m; ++t)
    for (int p = 0; p < kPanels; ++p) store_rows(w, panels[p], _mm512_load_ps(sums[t][p]), bias, y + t * w.n);
}

template <int BITS, int BLOCK, bool CENTERED>
void gemm_panels(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
                 int64_t end) {
  const Configured tiles(BLOCK, static_cast<int>(std::min<int64_t>(m, kTokenTile)));
  for (; begin < end; begin += kPanels) gemm_pair<BITS, BLOCK, CENTERED>(w, a, m, bias, y, begin, end - 1);
}

template <int BITS, int BLOCK>
void gemm_body(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
               int64_t end) {
  if constexpr (BITS < 8) {
    if (w.zero_first == 0 && w.zero_step == 1) return gemm_panels<BITS, BLOCK, true>(w, a, m, bias, y, begin, end);
  }
  gemm_panels<BITS, BLOCK, false>(w, a, m, bias, y, begin, end);
}

Order order(const QWeight& w, int64_t tokens) {
  return tokens < kLeastTokens ? avx512_kernels().order(w, tokens) : by_block(w);
}

void gemm(const QWeight& w, const Activations& a, int64_t m, const float* bias, float* y, int64_t begin,
          int64_t end) {
  if (m < kLeastTokens) return avx512_kernels().gemm(w, a, m, bias, y, begin, end);
  DIBIT_BY_SHAPE(gemm_body, w, a, m, bias, y, begin, end);
}

}  // namespace

const QKernels& amx_kernels() {
  static const QKernels kernels{order, quantize_avx2, avx512_kernels().gemv, gemm};
  return kernels;
}

}  // namespace dibit
#endif
