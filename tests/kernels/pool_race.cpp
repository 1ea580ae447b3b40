// The moment at which a thread that comes late could take a piece twice, brought about on purpose.
//
// The worker looks at the ticket of the first range when that range is over, and loses its core before it looks at how
// many pieces there are. Meanwhile the caller writes the second, larger range. If the old ticket were still open, the
// worker would now find that it has a third piece, take it, and the piece would be computed again once the range is
// published. Prints "once" if every element of both ranges was computed exactly once.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace {

enum Place { entered, loaded, rewritten, left };

thread_local bool is_caller = false;
std::atomic<bool> first_over{false}, looked{false}, second_written{false}, let_go{false};
std::atomic<int> range{1};

void wait(const std::atomic<bool>& flag) {
  while (!flag) std::this_thread::yield();
}

void point(Place place) {
  if (is_caller) {
    if (place == rewritten && range == 2) {
      second_written = true;
      // Until the worker has done whatever it does with the old ticket.
      wait(let_go);
    }
    return;
  }
  if (place == entered) wait(first_over);
  if (place == loaded && !looked.exchange(true)) wait(second_written);
  else if (place == loaded || place == left) let_go = true;
}

}  // namespace

#define DIBIT_POOL_POINT(place) point(place)
#include "pool.cpp"

namespace {

constexpr int kFirst = 2, kSecond = 16;
std::atomic<int> counts[2][kSecond];

void body(void* context, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) ++static_cast<std::atomic<int>*>(context)[i];
}

}  // namespace

int main() {
  is_caller = true;
  dibit_set_threads(2);
  dibit::run_range(kFirst, 1, body, counts[0]);
  first_over = true;
  wait(looked);
  range = 2;
  dibit::run_range(kSecond, 1, body, counts[1]);
  for (int i = 0; i < kSecond; ++i)
    if (counts[0][i] != (i < kFirst ? 1 : 0) || counts[1][i] != 1) {
      std::printf("element %d: %d and %d times\n", i, counts[0][i].load(), counts[1][i].load());
      return 1;
    }
  std::puts("once");
  std::fflush(stdout);
  std::_Exit(0);
}
