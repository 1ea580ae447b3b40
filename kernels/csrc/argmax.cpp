// The highest score of each row and the first place that holds it; NaN counts as the highest of all.
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace {

constexpr int64_t kPiece = 4096;  // scores that one thread looks through: a microsecond
constexpr int64_t kGrain = 8;
constexpr int64_t kLanes = 32;
constexpr int64_t kBlock = 64;

bool above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The highest of `count` scores, NaN where there is one. In lanes, without its place: that a compiler vectorizes.
float highest(const float* scores, int64_t count) {
  float high[kLanes];
  int odd[kLanes] = {};
  for (float& lane : high) lane = -__builtin_inff();
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      high[j] = scores[i + j] > high[j] ? scores[i + j] : high[j];
      odd[j] |= scores[i + j] != scores[i + j];
    }
  float best = -__builtin_inff();
  int any = 0;
  for (int64_t j = 0; j < kLanes; ++j) {
    best = high[j] > best ? high[j] : best;
    any |= odd[j];
  }
  for (int64_t i = whole; i < count; ++i) {
    best = scores[i] > best ? scores[i] : best;
    any |= scores[i] != scores[i];
  }
  return any != 0 ? __builtin_nanf("") : best;
}

bool is(float score, float peak) { return score == peak || (std::isnan(score) && std::isnan(peak)); }

// The first place of a peak that is there.
int64_t place_of(float peak, const float* scores, int64_t count) {
  int64_t first = 0;
  for (; first + kBlock < count; first += kBlock) {
    int found = 0;
    for (int64_t j = 0; j < kBlock; ++j) found |= is(scores[first + j], peak);
    if (found != 0) break;
  }
  while (!is(scores[first], peak)) ++first;
  return first;
}

}  // namespace

// scores [rows, width], ids and peaks [rows].
DIBIT_API int dibit_argmax(int64_t* ids, float* peaks, const float* scores, int64_t rows, int64_t width) {
  if (rows < 0 || width < 1) return 1;
  static thread_local std::vector<float> found;
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  const auto size = [=](int64_t piece) { return piece + 1 < pieces ? kPiece : width - piece * kPiece; };
  found.resize(static_cast<size_t>(rows * pieces));
  float* out = found.data();
  dibit::parallel_for(rows * pieces, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = highest(scores + i / pieces * width + i % pieces * kPiece, size(i % pieces));
  });
  for (int64_t r = 0; r < rows; ++r) {
    const float *row = scores + r * width, *high = out + r * pieces;
    int64_t best = 0;
    for (int64_t p = 1; p < pieces; ++p)
      if (above(high[p], high[best])) best = p;
    ids[r] = best * kPiece + place_of(high[best], row + best * kPiece, size(best));
    peaks[r] = row[ids[r]];
  }
  return 0;
}
