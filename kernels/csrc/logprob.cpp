#include <cstdint>

#include "isa.h"
#include "pool.h"
#include "vec_bodies.h"

// Of scores [rows, width] the log-probability of one id a row, log softmax in doubles, its rank (1: none is higher) and
// the row's highest score, NaN where a score is. Where that is not finite the other two mean nothing. 2: an id that is
// not in [0, width).
DIBIT_API int dibit_logprobs(double* logprobs, int64_t* ranks, float* peaks, const float* scores, const int64_t* ids,
                             int64_t rows, int64_t width) {
  if (rows < 0 || width < 1) return 1;
  for (int64_t r = 0; r < rows; ++r)
    if (ids[r] < 0 || ids[r] >= width) return 2;
  const dibit::VecBodies& bodies = dibit::vec_bodies();
  dibit::parallel_for(rows, 1, [=, &bodies](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      bodies.logprob(logprobs + r, ranks + r, peaks + r, scores + r * width, width, ids[r]);
  });
  return 0;
}
