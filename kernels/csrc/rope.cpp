#include <cstdint>

#include "ops.h"
#include "pool.h"
#include "vec_bodies.h"

namespace {

// Floats a thread must have to do before it is worth handing over a range: about the time of one wake-up.
constexpr int64_t kFloatsPerThread = 16384;

enum Status { kOk = 0, kPositionOutOfTable = 1, kSlotOutOfCache = 2 };

}  // namespace

// Shapes in kernels/rope.py. Nothing is written unless every position and slot is in range.
DIBIT_API int dibit_rope_kv_write(float* q, const float* qkv, const int64_t* positions, const float* cos,
                                  const float* sin, void* k_cache, void* v_cache, const int64_t* slots, int64_t tokens,
                                  int64_t heads, int64_t kv_heads, int64_t d, int64_t half, int64_t table_rows,
                                  int64_t blocks, int64_t block_size, int64_t key_real, int64_t value_real) {
  for (int64_t t = 0; t < tokens; ++t) {
    if (positions[t] < 0 || positions[t] >= table_rows) return kPositionOutOfTable;
    if (slots[t] < -1 || slots[t] >= blocks * block_size) return kSlotOutOfCache;
  }
  const dibit::VecBodies& bodies = dibit::vec_bodies();
  const dibit::Real keys = static_cast<dibit::Real>(key_real), values = static_cast<dibit::Real>(value_real);
  const int64_t key_bytes = dibit::row_bytes(keys, d), value_bytes = dibit::row_bytes(values, d);
  const int64_t width = (heads + 2 * kv_heads) * d;
  const auto range = [=, &bodies](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = qkv + t * width;
      const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
      bodies.rotate(q + t * heads * d, dibit::Real::f32, 4 * d, row, heads, d, c, s, half);
      if (slots[t] < 0) continue;
      const int64_t first = slots[t] / block_size * kv_heads * block_size + slots[t] % block_size;
      bodies.rotate(static_cast<char*>(k_cache) + first * key_bytes, keys, block_size * key_bytes, row + heads * d,
                    kv_heads, d, c, s, half);
      bodies.rotate(static_cast<char*>(v_cache) + first * value_bytes, values, block_size * value_bytes,
                    row + (heads + kv_heads) * d, kv_heads, d, c, s, 0);
    }
  };
  if (tokens < 2 || tokens * width < 2 * kFloatsPerThread) range(0, tokens);
  else dibit::parallel_for(tokens, kFloatsPerThread / width + 1, range);
  return kOk;
}
