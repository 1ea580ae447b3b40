// Reads a buffer with the backend's own threads and does nothing else: the limit that memory-bound ops are held
// against.
#include <atomic>
#include <cstdint>

#include "isa.h"
#include "memory.h"
#include "pool.h"

namespace {

typedef uint64_t Word __attribute__((vector_size(16)));

// As a thread reads its rows of a weight: one ascending stream, prefetched as far ahead as the kernels do it.
uint64_t sum(const Word* data, int64_t count) {
  Word total[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    __builtin_prefetch(reinterpret_cast<const char*>(data + i) + 2048);
    __builtin_prefetch(reinterpret_cast<const char*>(data + i) + 2048 + 64);
    for (int j = 0; j < 8; ++j) total[j] += data[i + j];
  }
  uint64_t out = 0;
  for (const Word& word : total) out += word[0] + word[1];
  return out;
}

}  // namespace

// Asks for 2 MB pages, like the packed weights have; before the first touch.
DIBIT_API int dibit_advise_huge(const void* data, int64_t bytes) {
  dibit::advise_huge(data, bytes);
  return 0;
}

// data: 16-byte aligned. Reads bytes / 128 * 128 bytes; *total depends on all of them, so none can be left out.
DIBIT_API int dibit_read(const void* data, int64_t bytes, uint64_t* total) {
  std::atomic<uint64_t> all{0};
  const Word* words = static_cast<const Word*>(data);
  dibit::parallel_for(bytes / 16 / 8 * 8, 4096, [&](int64_t begin, int64_t end) {
    all.fetch_add(sum(words + begin, end - begin), std::memory_order_relaxed);
  });
  *total = all.load();
  return 0;
}
