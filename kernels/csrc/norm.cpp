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
