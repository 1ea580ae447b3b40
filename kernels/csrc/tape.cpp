// Replays a list of recorded calls in one go: the pool is entered once, its workers stay awake from the first op to the
// last, and nothing but the ops runs in between. kernels/tape.py records.
//
// A tape is words of 64 bits: for each call the number of its op, then its arguments, one word each; integers and
// pointers as they are, floats in the low 32 bits.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <utility>

#include "ops.h"
#include "pool.h"

namespace dibit {
namespace {

struct Op {
  const char* name;
  int64_t arity;
  int (*call)(const uint64_t* words);
};

template <class T>
T argument(uint64_t word) {
  static_assert(sizeof(T) == 8 || sizeof(T) == 4);
  T value;
  if constexpr (sizeof(T) == 8) {
    std::memcpy(&value, &word, 8);
  } else {
    const uint32_t low = static_cast<uint32_t>(word);
    std::memcpy(&value, &low, 4);
  }
  return value;
}

template <class... Args>
constexpr int64_t arity_of(int (*)(Args...)) {
  return sizeof...(Args);
}

template <class... Args, size_t... kIndex>
int apply(int (*function)(Args...), const uint64_t* words, std::index_sequence<kIndex...>) {
  return function(argument<Args>(words[kIndex])...);
}

template <auto kFunction>
int call(const uint64_t* words) {
  return apply(kFunction, words, std::make_index_sequence<arity_of(kFunction)>());
}

template <auto kFunction>
constexpr Op op(const char* name) {
  return {name, arity_of(kFunction), call<kFunction>};
}

constexpr Op kOps[] = {
    op<dibit_embedding>("dibit_embedding"),
    op<dibit_qlinear>("dibit_qlinear"),
    op<dibit_rms_norm>("dibit_rms_norm"),
    op<dibit_head_norm>("dibit_head_norm"),
    op<dibit_rope_kv_write>("dibit_rope_kv_write"),
    op<dibit_paged_attention>("dibit_paged_attention"),
    op<dibit_silu_mul>("dibit_silu_mul"),
    op<dibit_copy_columns>("dibit_copy_columns"),
    op<dibit_argmax>("dibit_argmax"),
    op<dibit_sample>("dibit_sample"),
};
constexpr int64_t kOpCount = sizeof(kOps) / sizeof(kOps[0]);

}  // namespace
}  // namespace dibit

// Number of the op with this entry point and this many arguments; -1 when a tape cannot hold it.
DIBIT_API int dibit_tape_op(const char* name, int64_t arity) {
  for (int64_t i = 0; i < dibit::kOpCount; ++i)
    if (std::strcmp(name, dibit::kOps[i].name) == 0) return dibit::kOps[i].arity == arity ? static_cast<int>(i) : -1;
  return -1;
}

// Runs `count` words up to the first call that is refused; then *index is that call's place and its status is returned.
// -1: the words are no tape. Unless `nanoseconds` is null, each call's time goes to its place there.
DIBIT_API int dibit_tape_run(const uint64_t* words, int64_t count, int64_t* index, int64_t* nanoseconds) {
  using Clock = std::chrono::steady_clock;
  const dibit::PoolSession session;
  *index = 0;
  Clock::time_point begun = nanoseconds ? Clock::now() : Clock::time_point();
  for (int64_t at = 0; at < count; ++*index) {
    if (words[at] >= static_cast<uint64_t>(dibit::kOpCount)) return -1;
    const dibit::Op& op = dibit::kOps[words[at]];
    if (op.arity >= count - at) return -1;
    if (const int status = op.call(words + at + 1); status != 0) return status;
    at += 1 + op.arity;
    if (nanoseconds != nullptr) {
      const Clock::time_point now = Clock::now();
      nanoseconds[*index] = std::chrono::duration_cast<std::chrono::nanoseconds>(now - begun).count();
      begun = now;
    }
  }
  return 0;
}
