// Pages behind large arrays.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dibit {

// 2 MB pages for memory about to be written: a step streams through all weights and would miss the TLB on every
// 4 KB (on a virtual machine that alone can halve the bandwidth). Rounds outwards, because weights that are packed
// one after the other lie side by side and share the pages at their borders.
inline void advise_huge(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2u << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) + kHuge - 1) & ~(kHuge - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dibit
