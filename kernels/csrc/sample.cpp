// A token drawn from each row of scores: temperature, min_p, top_k, top_p, and one uniform number through the inverse of
// the cumulative distribution, in the order of ids. engine/draw.py defines it.
//
// One body for every machine, so that a seed gives one token everywhere: plain vectors, no fused multiply-adds (the
// build sets -ffp-contract=off), sums in an order that is written down here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "ops.h"
#include "pool.h"
#include "vec.h"

namespace {

constexpr int64_t kBlock = 128;
constexpr float kLeastTemperature = 1e-6f;
constexpr int64_t kFirstTaken = 64;

// As kernels/sampling_cpu.py fills them.
struct Filters {
  double temperature, min_p, top_p;
};
struct Draw {
  int64_t greedy, top_k;
  uint64_t key[2], count;
};

struct Scratch {
  std::vector<float> weights, peaks, values;
  std::vector<double> sums;
};

// First word of Philox4x64-10 (Salmon et al. 2011), the counter advanced before use as numpy's generator does.
uint64_t philox(uint64_t key0, uint64_t key1, uint64_t counter) {
  uint64_t c0 = counter + 1, c1 = c0 == 0, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c0;
    const unsigned __int128 second = static_cast<unsigned __int128>(0xCA5A826395121157u) * c2;
    c0 = static_cast<uint64_t>(second >> 64) ^ c1 ^ key0;
    c2 = static_cast<uint64_t>(first >> 64) ^ c3 ^ key1;
    c1 = static_cast<uint64_t>(second);
    c3 = static_cast<uint64_t>(first);
    key0 += 0x9E3779B97F4A7C15u;
    key1 += 0xBB67AE8584CAA73Bu;
  }
  return c0;
}

double sum_of(const float* weights, int64_t count) {
  double part[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int64_t j = 0; j < 4; ++j) part[j] += weights[i + j];
  for (; i < count; ++i) part[0] += weights[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

class Row {
 public:
  Row(const float* scores, int64_t width, float peak, double temperature, Scratch& scratch)
      : scores_(scores), width_(width), blocks_((width + kBlock - 1) / kBlock), peak_(peak), scratch_(scratch) {
    temperature_ = std::max(static_cast<float>(temperature), kLeastTemperature);
    scratch.weights.resize(static_cast<size_t>(width));
    scratch.sums.resize(static_cast<size_t>(blocks_));
    weights_ = scratch.weights.data();
    weigh();
  }

  void at_least(float least) {
    for (int64_t i = 0; i < width_; ++i) weights_[i] = weights_[i] >= least ? weights_[i] : 0.0f;
  }

  int64_t left() const {
    int64_t count = 0;
    for (int64_t i = 0; i < width_; ++i) count += weights_[i] > 0.0f;
    return count;
  }

  // Weights of scores below the k-th highest become zero; ties stay.
  void highest(int64_t k) {
    const float least = scaled(kth_score(k));
    for (int64_t i = 0; i < width_; ++i) weights_[i] = scaled(scores_[i]) >= least ? weights_[i] : 0.0f;
  }

  // Keeps the fewest that hold `share` of the weight, but one at least, likeliest first and lower ids on ties.
  void nucleus(double share) {
    const double total = add_up();
    const double wanted = share * total;
    // All that lies below this, together, is less than the share that may be lost.
    const double low = 0.5 * (1.0 - share) * total / static_cast<double>(width_);
    std::vector<float>& values = scratch_.values;
    values.clear();
    for (int64_t i = 0; i < width_; ++i)
      if (weights_[i] > 0.0f && weights_[i] >= low) values.push_back(weights_[i]);
    const int64_t count = static_cast<int64_t>(values.size());
    if (count == 0) return;
    int64_t sorted = 0, kept = 0;
    double held = 0.0;
    const auto more = [&] { return kept == 0 || held < wanted; };
    for (int64_t take = kFirstTaken; kept < count && more(); take *= 4) {
      const int64_t end = std::min(count, sorted + take);
      if (end < count)
        std::nth_element(values.begin() + sorted, values.begin() + end - 1, values.end(), std::greater<float>());
      std::sort(values.begin() + sorted, values.begin() + end, std::greater<float>());
      for (; kept < end && more(); ++kept) held += values[static_cast<size_t>(kept)];
      sorted = end;
    }
    const float least = values[static_cast<size_t>(kept - 1)];
    int64_t ties = 0;
    for (int64_t i = kept; i > 0 && values[static_cast<size_t>(i - 1)] == least; --i) ++ties;
    for (int64_t i = 0; i < width_; ++i) {
      const bool tie = weights_[i] == least;
      if (weights_[i] < least || (tie && ties == 0)) weights_[i] = 0.0f;
      else if (tie) --ties;
    }
  }

  // The id whose share of the weights `number` in [0, 1) falls into.
  int64_t draw(double number) {
    const double target = number * add_up();
    double before = 0.0;
    int64_t block = 0, last = 0;
    for (;; ++block) {
      if (block == blocks_) {  // target was rounded up to the sum of all
        block = last;
        before = std::numeric_limits<double>::lowest();
        break;
      }
      const double sum = scratch_.sums[static_cast<size_t>(block)];
      if (before + sum > target) break;
      if (sum > 0.0) last = block;
      before += sum;
    }
    int64_t possible = block * kBlock;
    double sum = 0.0;
    for (int64_t i = block * kBlock; i < std::min(width_, (block + 1) * kBlock); ++i) {
      if (weights_[i] == 0.0f) continue;
      possible = i;
      sum += weights_[i];
      if (sum > target - before) break;
    }
    return possible;  // the block's last one where its two sums differ in the last bit
  }

 private:
  float scaled(float score) const { return (score - peak_) / temperature_; }

  void weigh() {
    using namespace dibit;
    const F8 peak = splat(peak_), temperature = splat(temperature_);
    int64_t i = 0;
    for (; i + kLanes <= width_; i += kLanes) store(weights_ + i, exp(div(sub(load(scores_ + i), peak), temperature)));
    if (i < width_) {
      float in[kLanes] = {}, out[kLanes];
      std::copy(scores_ + i, scores_ + width_, in);
      store(out, exp(div(sub(load(in), peak), temperature)));
      std::copy(out, out + (width_ - i), weights_ + i);
    }
  }

  double add_up() {
    double total = 0.0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t first = b * kBlock;
      total += scratch_.sums[static_cast<size_t>(b)] = sum_of(weights_ + first, std::min(kBlock, width_ - first));
    }
    return total;
  }

  // Blocks with a peak of at least the k-th highest block peak hold the k highest scores.
  float kth_score(int64_t k) {
    std::vector<float>& values = scratch_.values;
    float least = -std::numeric_limits<float>::infinity();
    if (k < blocks_) {
      std::vector<float>& peaks = scratch_.peaks;
      peaks.resize(static_cast<size_t>(blocks_));
      for (int64_t b = 0; b < blocks_; ++b) {
        const float* first = scores_ + b * kBlock;
        const int64_t count = std::min(kBlock, width_ - b * kBlock);
        float high[8];
        for (float& lane : high) lane = first[0];
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
          for (int64_t j = 0; j < 8; ++j) high[j] = first[i + j] > high[j] ? first[i + j] : high[j];
        for (; i < count; ++i) high[0] = std::max(high[0], first[i]);
        peaks[static_cast<size_t>(b)] = *std::max_element(high, high + 8);
      }
      values = peaks;
      std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
      least = values[static_cast<size_t>(k - 1)];
      values.clear();
      for (int64_t b = 0; b < blocks_; ++b) {
        if (peaks[static_cast<size_t>(b)] < least) continue;
        for (int64_t i = b * kBlock; i < std::min(width_, (b + 1) * kBlock); ++i)
          if (scores_[i] >= least) values.push_back(scores_[i]);
      }
    } else {
      values.assign(scores_, scores_ + width_);
    }
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    return values[static_cast<size_t>(k - 1)];
  }

  const float* scores_;
  int64_t width_, blocks_;
  float peak_, temperature_ = 1.0f;
  Scratch& scratch_;
  float* weights_ = nullptr;
};

double uniform(const Draw& draw) {
  return static_cast<double>(philox(draw.key[0], draw.key[1], draw.count) >> 11) * 0x1p-53;
}

int64_t drawn(const float* scores, int64_t width, float peak, const Filters& filters, const Draw& draw) {
  static thread_local Scratch scratch;
  Row row(scores, width, peak, filters.temperature, scratch);
  int64_t left = width;
  if (filters.min_p > 0.0) {
    row.at_least(static_cast<float>(filters.min_p));
    left = draw.top_k > 0 ? row.left() : left;
  }
  if (draw.top_k > 0 && draw.top_k < left) row.highest(draw.top_k);
  if (filters.top_p < 1.0) row.nucleus(filters.top_p);
  return row.draw(uniform(draw));
}

}  // namespace

// ids [rows]: for a greedy row, and one whose peak is not finite, best[row]. scores [rows, width]; best and peaks [rows]
// as dibit_argmax finds them; filters and draws as the structures above.
DIBIT_API int dibit_sample(int64_t* ids, const float* scores, const int64_t* best, const float* peaks,
                           const double* filters, const int64_t* draws, int64_t rows, int64_t width) {
  if (rows < 0 || width < 1) return 1;
  const Filters* filter = reinterpret_cast<const Filters*>(filters);
  const Draw* draw = reinterpret_cast<const Draw*>(draws);
  bool idle = true;
  for (int64_t r = 0; r < rows; ++r) {
    ids[r] = best[r];
    idle = idle && draw[r].greedy;
  }
  if (idle) return 0;
  dibit::parallel_for(rows, 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      if (!draw[r].greedy && std::isfinite(peaks[r]))
        ids[r] = drawn(scores + r * width, width, peaks[r], filter[r], draw[r]);
  });
  return 0;
}

// numbers [rows]: what each row is drawn with.
DIBIT_API int dibit_uniform(double* numbers, const int64_t* draws, int64_t rows) {
  const Draw* draw = reinterpret_cast<const Draw*>(draws);
  for (int64_t r = 0; r < rows; ++r) numbers[r] = uniform(draw[r]);
  return 0;
}
