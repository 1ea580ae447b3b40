// The vector kernels, one table per ISA: loops over a few rows, with no threads, no allocation and no checks in them.
// vec_avx512.cpp, vec_avx2.cpp and vec_portable.cpp compile the same *_body.h files and fill the table.
#pragma once
#include <cstdint>

namespace dibit {

// Storage of the KV cache, as kernels/kv.py describes and kernels/rope_cpu.py numbers it.
enum class Real : int { f32, f16, bf16, i8, i4, e4m3 };

inline constexpr int kCacheGroup = 32;  // elements of a row of i8 or i4 that share a scale

constexpr bool is_codes(Real real) { return real == Real::i8 || real == Real::i4; }

// Of an element that is no code.
constexpr int64_t real_bytes(Real real) { return real == Real::f32 ? 4 : real == Real::e4m3 ? 1 : 2; }

// Of a row of d elements.
inline int64_t row_bytes(Real real, int64_t d) {
  const int64_t groups = (d + kCacheGroup - 1) / kCacheGroup;
  if (real == Real::i8) return d + 2 * groups;
  if (real == Real::i4) return d / 2 + 4 * groups;
  return real_bytes(real) * d;
}

inline constexpr int kMaxRow = 1024;
inline constexpr int kKeyTile = 32;     // keys that one online-softmax update takes in
inline constexpr float kNoPeak = -3.40282347e38f;  // running maximum before the first key; finite, so that -inf scores
                                                   // weigh 0 instead of making NaN

// Where the rows of a tile of keys lie in the cache, and how long they are.
struct KeyRows {
  const void *keys[kKeyTile], *values[kKeyTile];
  int count, key_bytes, value_bytes;
};

// One tile of keys against some query rows; each row's state (peak, total, acc) is updated in place.
// A row's arithmetic depends on its own query and the keys it sees only, never on the other rows or on `rows`.
struct KeyTile {
  const void* const* keys;     // kKeyTile pointers to rows of `width` reals; past the last key, any valid row
  const void* const* values;
  Real key_real, value_real;
  const int32_t* visible;      // [rows] keys of the tile that the row sees, 0..kKeyTile
  int rows;
  int width;                   // head dim, rounded up to kLanes with zeros
  const float* q;              // [rows, width], scaled
  float* score;                // [rows, kKeyTile] scratch
  float* factor;               // [rows] scratch
  float* peak;                 // [rows] running maximum of the scores
  float* total;                // [rows] sum of exp(score - peak)
  float* acc;                  // [rows, width] the same sum weighted by the values
  const KeyRows* next;         // fetched into the cache meanwhile
};

// The same for many rows, transposed so that a row is a lane.
struct LaneTile {
  const float *keys, *values;  // [kKeyTile, width]; anything past the last key
  const int32_t* visible;      // [stride] keys of the tile that the row sees; 0 for what only pads
  int stride;                  // rows, rounded up to 16
  int width;
  const float* q;              // [width, stride], scaled
  float* score;                // [kKeyTile, stride] scratch
  float* factor;               // [stride] scratch
  float *peak, *total;         // [stride]
  float* acc;                  // [width, stride]
};

struct VecBodies {
  int register_rows;  // up to so many rows, `attend` is to read the cache itself; beyond, floats made by `widen`
  void (*attend)(const KeyTile& tile);
  int lane_rows;      // from so many rows on, `attend_lanes` is faster, and gives the same bits
  void (*attend_lanes)(const LaneTile& tile);
  // out[column, row] = in[row, column], counts multiples of 8.
  void (*transpose)(float* out, int64_t out_stride, const float* in, int64_t in_stride, int rows, int columns);
  // Folds a later range's state of one row into an earlier one's.
  void (*merge)(float* peak, float* total, float* acc, float next_peak, float next_total, const float* next_acc,
                int width);
  // out[0, d) = acc / total.
  void (*finish)(float* out, const float* acc, float total, int d);
  // Rows of d stored reals to rows of `width` floats, zeros past d.
  void (*widen)(float* out, const void* rows, Real real, int64_t count, int d, int width);

  // A token's heads rotated: src [heads, d] to rows of `real`, `stride` bytes apart. half = 0 only converts.
  // d is at most kMaxRow where a row is quantized.
  void (*rotate)(void* dst, Real real, int64_t stride, const float* src, int64_t heads, int d, const float* cos,
                 const float* sin, int half);

  // y = norm(x) * weight, or with a residual: residual += x, y = norm(residual) * weight.
  void (*rms_norm)(float* y, const float* x, float* residual, const float* weight, int64_t rows, int64_t k, float eps);
  void (*silu_mul)(float* y, const float* gate_up, int64_t rows, int64_t width);

  // Log-probability, rank and the row's peak for scores[id].
  void (*logprob)(double* found, int64_t* rank, float* peak, const float* scores, int64_t width, int64_t id);
};

const VecBodies& vec_bodies_portable();
#if defined(__x86_64__)
const VecBodies& vec_bodies_avx2();
const VecBodies& vec_bodies_avx512();
#endif

// The table for this machine.
const VecBodies& vec_bodies();

}  // namespace dibit
