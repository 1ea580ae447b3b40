// The backend's own threads: the caller and a fixed set of workers that share one range per call.
//
// Workers spin for a moment after a range, because the next op of a decode step follows within microseconds, and then
// sleep on a futex. One range runs at a time; a second caller waits its turn.
#pragma once
#include <cstdint>

namespace dibit {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Runs fn over [0, n) cut into contiguous pieces, each a multiple of `grain` but the last, taken in turn by the threads:
// which thread gets which piece is left to chance, so fn's result must not depend on the cut.
void run_range(int64_t n, int64_t grain, RangeFn fn, void* context);

int thread_count();

// While one exists, its thread alone runs ranges, and the workers wait for the next one awake instead of falling asleep.
class PoolSession {
 public:
  PoolSession();
  ~PoolSession();
  PoolSession(const PoolSession&) = delete;
  PoolSession& operator=(const PoolSession&) = delete;
};

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  run_range(
      n, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace dibit
