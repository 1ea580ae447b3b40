// silu(gate) * up over rows, for the ISA of the including unit.
#pragma once
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

DIBIT_INLINE F8 silu_product(F8 gate, F8 up) {
  return mul(div(gate, add(splat(1.0f), exp(sub(splat(0.0f), gate)))), up);
}

void silu_mul(float* y, const float* gate_up, int64_t rows, int64_t width) {
  for (int64_t t = 0; t < rows; ++t, y += width, gate_up += 2 * width) {
    const float* up = gate_up + width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(y + i, silu_product(load(gate_up + i), load(up + i)));
    if (i < width) {
      float gates[kLanes] = {}, ups[kLanes] = {}, products[kLanes];
      std::memcpy(gates, gate_up + i, (width - i) * sizeof(float));
      std::memcpy(ups, up + i, (width - i) * sizeof(float));
      store(products, silu_product(load(gates), load(ups)));
      std::memcpy(y + i, products, (width - i) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace dibit
