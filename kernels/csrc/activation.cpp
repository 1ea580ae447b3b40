#include <cstdint>

#include "ops.h"
#include "pool.h"
#include "vec_bodies.h"

// Outputs a thread must have to do before it is worth handing over a range: about the time of one wake-up.
static constexpr int64_t kFloatsPerThread = 8192;

// y[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i].
DIBIT_API int dibit_silu_mul(float* y, const float* gate_up, int64_t rows, int64_t width) {
  const dibit::VecBodies& bodies = dibit::vec_bodies();
  const auto range = [=, &bodies](int64_t begin, int64_t end) {
    bodies.silu_mul(y + begin * width, gate_up + 2 * begin * width, end - begin, width);
  };
  if (rows < 2 || rows * width < 2 * kFloatsPerThread) range(0, rows);
  else dibit::parallel_for(rows, kFloatsPerThread / width + 1, range);
  return 0;
}
