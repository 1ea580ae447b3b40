// RMS normalization of rows, for the ISA of the including unit. The sum of squares of a row runs in 32 lanes whose
// order depends on the row's length only.
#pragma once
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

void rms_norm(float* y, const float* x, float* residual, const float* weight, int64_t rows, int64_t k, float eps) {
  const int64_t vectors = k / kLanes * kLanes, blocks = k / (4 * kLanes) * (4 * kLanes);
  for (int64_t t = 0; t < rows; ++t, y += k, x += k) {
    if (residual != nullptr) {
      int64_t i = 0;
      for (; i < vectors; i += kLanes) store(residual + i, add(load(x + i), load(residual + i)));
      for (; i < k; ++i) residual[i] += x[i];
    }
    const float* h = residual != nullptr ? residual : x;
    F8 sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (; i < blocks; i += 4 * kLanes)
      for (int lane = 0; lane < 4; ++lane) {
        const F8 a = load(h + i + lane * kLanes);
        sums[lane] = fma(a, a, sums[lane]);
      }
    for (; i < vectors; i += kLanes) {
      const F8 a = load(h + i);
      sums[0] = fma(a, a, sums[0]);
    }
    float squares = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    for (; i < k; ++i) squares += h[i] * h[i];
    const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(k) + eps);
    for (i = 0; i < vectors; i += kLanes) store(y + i, mul(mul(load(h + i), splat(scale)), load(weight + i)));
    for (; i < k; ++i) y[i] = h[i] * scale * weight[i];
    if (residual != nullptr) residual += k;
  }
}

}  // namespace
}  // namespace dibit
