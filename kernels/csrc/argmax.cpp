// The highest score of each row and the first place that holds it; NaN counts as the highest of all.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace {

constexpr int64_t kPiece = 4096;  // scores that one thread looks through: a few microseconds for four of them
constexpr int64_t kGrain = 4;
constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 256;

struct Best {
  float peak;
  int64_t index;
};

bool above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The maximum is taken in lanes without its place; a block that raises it is looked through once more.
Best best_of(const float* scores, int64_t begin, int64_t end) {
  Best best{scores[begin], begin};
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    const float* v = scores + first;
    float high[kLanes];
    int odd[kLanes] = {};
    for (int64_t j = 0; j < kLanes; ++j) high[j] = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) {
        high[j] = v[i + j] > high[j] ? v[i + j] : high[j];
        odd[j] |= v[i + j] != v[i + j];
      }
    bool look = i < count;
    for (int64_t j = 0; j < kLanes; ++j) look |= odd[j] != 0 || high[j] > best.peak;
    if (!look) continue;
    for (i = 0; i < count; ++i)
      if (above(v[i], best.peak)) best = {v[i], first + i};
    if (std::isnan(best.peak)) return best;
  }
  return best;
}

}  // namespace

// scores [rows, width], ids and peaks [rows].
DIBIT_API int dibit_argmax(int64_t* ids, float* peaks, const float* scores, int64_t rows, int64_t width) {
  if (rows < 0 || width < 1) return 1;
  static thread_local std::vector<Best> found;
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  found.resize(static_cast<size_t>(rows * pieces));
  Best* out = found.data();
  dibit::parallel_for(rows * pieces, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      const int64_t last = first + kPiece < width ? first + kPiece : width;
      out[i] = best_of(scores + i / pieces * width, first, last);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    Best best = out[r * pieces];
    for (int64_t p = 1; p < pieces; ++p)
      if (above(out[r * pieces + p].peak, best.peak)) best = out[r * pieces + p];
    ids[r] = best.index;
    peaks[r] = best.peak;
  }
  return 0;
}
