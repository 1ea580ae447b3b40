#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace dibit {
namespace {

Isa detect() {
  const char* wanted = std::getenv("DIBIT_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return Isa::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace dibit

DIBIT_API int dibit_abi_version() { return 1; }

DIBIT_API const char* dibit_isa() { return dibit::isa() == dibit::Isa::avx2 ? "avx2" : "portable"; }
