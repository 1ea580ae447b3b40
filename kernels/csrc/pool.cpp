#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "isa.h"

namespace dibit {
namespace {

// About 50 us on a 3 GHz core: longer than the gap between two ops of a decode step, shorter than anything a
// neighbour on the same core would notice.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  ~Pool() { resize(1); }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void resize(int threads) {
    std::lock_guard<std::mutex> turn(turn_);
    stop_workers();
    size_ = threads;
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i, seen = generation_.load()] { work(i, seen); });
  }

  void run(int64_t n, int64_t grain, RangeFn fn, void* context) {
    std::lock_guard<std::mutex> turn(turn_);
    const int64_t grains = (n + grain - 1) / grain;
    const int parts = static_cast<int>(std::min<int64_t>(size_, grains));
    if (parts <= 1) {
      if (n > 0) fn(context, 0, n);
      return;
    }
    n_ = n, grain_ = grain, parts_ = parts, fn_ = fn, context_ = context;
    pending_.store(size_ - 1, std::memory_order_relaxed);
    publish();
    part(0);
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) pause();
      else std::this_thread::yield();
    }
  }

 private:
  void publish() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_acquire) != 0) wake_.notify_all();
  }

  void part(int index) {
    if (index >= parts_) return;
    const int64_t grains = (n_ + grain_ - 1) / grain_;
    const int64_t begin = grains * index / parts_ * grain_;
    const int64_t end = std::min(n_, grains * (index + 1) / parts_ * grain_);
    if (begin < end) fn_(context_, begin, end);
  }

  void work(int index, unsigned seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_release);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_release);
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_) return;
      part(index);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  void stop_workers() {
    stopping_ = true;
    publish();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
  }

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> pending_{0}, sleepers_{0}, size_{1};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
  int64_t n_ = 0, grain_ = 1;
  int parts_ = 0;
  RangeFn fn_ = nullptr;
  void* context_ = nullptr;
};

// Never destroyed: workers may still spin while the process exits.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void run_range(int64_t n, int64_t grain, RangeFn fn, void* context) { pool().run(n, grain, fn, context); }

int thread_count() { return pool().size(); }

}  // namespace dibit

DIBIT_API int dibit_threads() { return dibit::thread_count(); }

DIBIT_API void dibit_set_threads(int count) {
  if (count >= 1 && count != dibit::thread_count()) dibit::pool().resize(count);
}
