#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "isa.h"

// Places where a test (tests/kernels/pool_race.cpp) holds a thread back.
#ifndef DIBIT_POOL_POINT
#define DIBIT_POOL_POINT(place)
#endif

namespace dibit {
namespace {

// About 50 us on a 3 GHz core: longer than the gap between two ops of a decode step, shorter than anything a
// neighbour on the same core would notice.
constexpr int kSpins = 2000;

// Small enough that the last piece keeps the others waiting for little, large enough to stream.
constexpr int kPiecesPerThread = 8;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A range is cut into pieces that threads take in turn, so that a thread whose core is busy with something else (or
// that has not woken up yet) delays nobody. The ticket holds the number of the range and its next piece in one word:
// a thread reads the range, then takes the piece by compare-and-swap, which fails if that range is not current. The
// ticket is closed before the range is rewritten: a late thread would else judge the old ticket by the new range, take
// a piece that the old one never had, and be counted twice.
constexpr uint32_t kClosed = UINT32_MAX;

class Pool {
 public:
  ~Pool() { resize(1); }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void resize(int threads) {
    std::lock_guard<std::mutex> turn(turn_);
    stop_workers();
    size_ = threads;
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, seen = range_of(ticket_.load())] { work(seen); });
  }

  void enter() {
    turn_.lock();
    in_session_ = true;
    {
      std::lock_guard<std::mutex> lock(sleep_);
      awake_ = true;
    }
    if (sleepers_.load(std::memory_order_acquire) != 0) wake_.notify_all();
  }

  void leave() {
    awake_ = false;
    in_session_ = false;
    turn_.unlock();
  }

  void run(int64_t n, int64_t grain, RangeFn fn, void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (!in_session_) turn.lock();
    const int64_t grains = (n + grain - 1) / grain;
    const int64_t pieces = size() == 1 ? 1 : std::min<int64_t>(size() * kPiecesPerThread, grains);
    if (pieces <= 1) {
      if (n > 0) fn(context, 0, n);
      return;
    }
    issue(kClosed);
    n_ = n, grain_ = grain, pieces_ = pieces, fn_ = fn, context_ = context;
    done_ = 0;
    DIBIT_POOL_POINT(rewritten);
    publish();
    take_pieces();
    for (int spins = 0; done_.load(std::memory_order_acquire) != pieces; ++spins) {
      if (spins < kSpins) pause();
      else std::this_thread::yield();
    }
  }

 private:
  static uint32_t range_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

  // A new range number, so that every compare-and-swap on an older ticket fails.
  void issue(uint32_t piece) { ticket_ = static_cast<uint64_t>(range_of(ticket_.load()) + 1) << 32 | piece; }

  void publish() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      issue(0);
    }
    if (sleepers_.load(std::memory_order_acquire) != 0) wake_.notify_all();
  }

  // Works until nothing of the current range is left to take; returns that range's number.
  uint32_t take_pieces() {
    DIBIT_POOL_POINT(entered);
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      DIBIT_POOL_POINT(loaded);
      const int64_t piece = static_cast<uint32_t>(ticket), pieces = pieces_, n = n_, grain = grain_;
      const RangeFn fn = fn_;
      void* context = context_;
      if (piece >= pieces) {
        DIBIT_POOL_POINT(left);
        return range_of(ticket);
      }
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      const int64_t grains = (n + grain - 1) / grain;
      const int64_t begin = grains * piece / pieces * grain;
      fn(context, begin, std::min(n, grains * (piece + 1) / pieces * grain));
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void work(uint32_t seen) {
    for (;;) {
      // A thread that was late for the last range may have taken the number of the one that ends it all for its own.
      auto waiting = [&] { return !stopping_ && range_of(ticket_.load(std::memory_order_acquire)) == seen; };
      for (int spins = 0; spins < kSpins && waiting(); ++spins) pause();
      // In a session, still awake, but out of the way of a thread that has work and no core.
      while (awake_.load(std::memory_order_relaxed) && waiting()) pause(), std::this_thread::yield();
      if (waiting()) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_release);
        wake_.wait(lock, [&] { return !waiting() || awake_; });
        sleepers_.fetch_sub(1, std::memory_order_release);
        if (waiting()) continue;
      }
      if (stopping_) return;
      seen = take_pieces();
    }
  }

  void stop_workers() {
    stopping_ = true;
    issue(kClosed);
    pieces_ = 0;
    publish();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
  }

  // Whether this thread holds turn_ for a session.
  static inline thread_local bool in_session_ = false;

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> sleepers_{0}, size_{1};
  std::atomic<bool> stopping_{false}, awake_{false};
  std::vector<std::thread> workers_;
  // The current range. Atomic because a late thread may read them while the next range is written.
  std::atomic<int64_t> n_{0}, grain_{1}, pieces_{0}, done_{0};
  std::atomic<RangeFn> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
};

// Never destroyed: workers may still spin while the process exits.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void run_range(int64_t n, int64_t grain, RangeFn fn, void* context) { pool().run(n, grain, fn, context); }

int thread_count() { return pool().size(); }

PoolSession::PoolSession() { pool().enter(); }

PoolSession::~PoolSession() { pool().leave(); }

}  // namespace dibit

DIBIT_API int dibit_threads() { return dibit::thread_count(); }

DIBIT_API void dibit_set_threads(int count) {
  if (count >= 1 && count != dibit::thread_count()) dibit::pool().resize(count);
}
