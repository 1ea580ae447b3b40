#include <cstring>

#include "ops.h"

// Rows of x [rows, width] into the columns of a wider array whose rows are `stride` apart; y points to the first one.
DIBIT_API int dibit_copy_columns(float* y, const float* x, int64_t rows, int64_t width, int64_t stride) {
  if (rows < 0 || width < 0 || stride < width) return 1;
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(y + r * stride, x + r * width, static_cast<size_t>(width) * sizeof(float));
  return 0;
}
