#include <cstdint>

#include "ops.h"
#include "pool.h"
#include "vec_bodies.h"

// Floats a thread must have to do before it is worth handing over a range: about the time of one wake-up.
static constexpr int64_t kFloatsPerThread = 16384;

// y = norm(x) * weight over rows of k; with a residual, residual += x first and y = norm(residual) * weight.
DIBIT_API int dibit_rms_norm(float* y, const float* x, float* residual, const float* weight, int64_t rows, int64_t k,
                             float eps) {
  const dibit::VecBodies& bodies = dibit::vec_bodies();
  const auto range = [=, &bodies](int64_t begin, int64_t end) {
    bodies.rms_norm(y + begin * k, x + begin * k, residual == nullptr ? nullptr : residual + begin * k, weight,
                    end - begin, k, eps);
  };
  if (rows < 2 || rows * k < 2 * kFloatsPerThread) range(0, rows);
  else dibit::parallel_for(rows, kFloatsPerThread / k + 1, range);
  return 0;
}

// Heads of queries, then of keys, then of values, each of d floats: the first two kinds are normalized in place.
DIBIT_API int dibit_head_norm(float* qkv, const float* q_norm, const float* k_norm, int64_t tokens, int64_t heads,
                              int64_t kv_heads, int64_t d, float eps) {
  const dibit::VecBodies& bodies = dibit::vec_bodies();
  const int64_t width = (heads + 2 * kv_heads) * d;
  const auto range = [=, &bodies](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float *q = qkv + t * width, *k = q + heads * d;
      bodies.rms_norm(q, q, nullptr, q_norm, heads, d, eps);
      bodies.rms_norm(k, k, nullptr, k_norm, kv_heads, d, eps);
    }
  };
  if (tokens < 2 || tokens * width < 2 * kFloatsPerThread) range(0, tokens);
  else dibit::parallel_for(tokens, kFloatsPerThread / width + 1, range);
  return 0;
}
