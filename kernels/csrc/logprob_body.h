// The log-probability of one score of a row, for the ISA of the including unit.
#pragma once
#include "vec.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

// The highest of a row's numbers.
DIBIT_INLINE float highest(const float* scores, int64_t width) {
  F8 high = splat(-__builtin_inff());
  int64_t i = 0;
  // The second operand where the first is NaN.
  for (; i + kLanes <= width; i += kLanes) high = max(load(scores + i), high);
  float lanes[kLanes], best = -__builtin_inff();
  store(lanes, high);
  for (float lane : lanes) best = lane > best ? lane : best;
  for (; i < width; ++i) best = scores[i] > best ? scores[i] : best;
  return best;
}

struct Sums {
  double powers;  // of e^(score - peak): eight sums side by side
  int64_t above;  // scores above one's own
};

DIBIT_INLINE Sums sums_of(const float* scores, int64_t width, float peak, float own) {
  constexpr int64_t kPiece = 128;
  double part[kLanes] = {};
  int64_t above = 0;
  float powers[kPiece];
  for (int64_t first = 0; first < width; first += kPiece) {
    const int64_t count = width - first < kPiece ? width - first : kPiece;
    const float* piece = scores + first;
    int64_t i = 0;
#ifdef DIBIT_VEC_AVX512
    for (; i + 16 <= count; i += 16) store(powers + i, exp_of(sub(load16(piece + i), splat16(peak))));
#endif
    for (; i + kLanes <= count; i += kLanes) store(powers + i, exp(sub(load(piece + i), splat(peak))));
    if (i < count) {
      float in[kLanes] = {}, out[kLanes];
      std::memcpy(in, piece + i, static_cast<size_t>(count - i) * sizeof(float));
      store(out, exp(sub(load(in), splat(peak))));
      std::memcpy(powers + i, out, static_cast<size_t>(count - i) * sizeof(float));
    }
    for (i = 0; i + kLanes <= count; i += kLanes)
      for (int j = 0; j < kLanes; ++j) part[j] += static_cast<double>(powers[i + j]);
    for (int j = 0; i < count; ++i, ++j) part[j] += static_cast<double>(powers[i]);
    int higher = 0;
    for (i = 0; i < count; ++i) higher += piece[i] > own;
    above += higher;
  }
  return {((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])), above};
}

void logprob(double* found, int64_t* rank, float* peak, const float* scores, int64_t width, int64_t id) {
  const float top = highest(scores, width), own = scores[id];
  const Sums sums = sums_of(scores, width, top, own);
  // Under a finite peak the sum is a number unless a score is none.
  *peak = sums.powers != sums.powers && top - top == 0.0f ? __builtin_nanf("") : top;
  *found = static_cast<double>(own) - (static_cast<double>(top) + __builtin_log(sums.powers));
  *rank = 1 + sums.above;
}

}  // namespace
}  // namespace dibit
