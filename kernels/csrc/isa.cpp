#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(DIBIT_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dibit {
namespace {

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };
constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};

// Whether the processor multiplies tiles of int8, and Linux lets this process: tiles are 8 KB of state that a process
// has to ask for, once and for all of its threads (Documentation/arch/x86/xstate.rst).
bool granted_amx() {
#if defined(DIBIT_AMX)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kInt8) != 0;
  return has && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

int find_machine_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return kPortable;
  const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  if (!vnni) return kAvx2;
  return granted_amx() ? kAmx : kAvx512;
#else
  return kPortable;
#endif
}

int machine_level() {
  static const int found = find_machine_level();
  return found;
}

// The level called `name`, or -1.
int level_of(const char* name) {
  for (int level = kPortable; level <= kAmx; ++level)
    if (std::strcmp(name, kNames[level]) == 0) return level;
  return -1;
}

std::atomic<int>& level() {
  static std::atomic<int> chosen{[] {
    const int most = machine_level();
    const char* name = std::getenv("DIBIT_ISA");
    const int wanted = name == nullptr ? -1 : level_of(name);
    return wanted < 0 || wanted > most ? most : wanted;
  }()};
  return chosen;
}

}  // namespace

Isa isa() { return level().load(std::memory_order_relaxed) >= kAvx2 ? Isa::avx2 : Isa::portable; }

bool avx512_vnni() { return level().load(std::memory_order_relaxed) >= kAvx512; }

bool amx_int8() { return level().load(std::memory_order_relaxed) >= kAmx; }

}  // namespace dibit

DIBIT_API int dibit_abi_version() { return 6; }

DIBIT_API const char* dibit_isa() { return dibit::kNames[dibit::level().load()]; }

// Switches every op from the next call on. 1: unknown name; 2: this machine lacks it.
DIBIT_API int dibit_set_isa(const char* name) {
  const int wanted = dibit::level_of(name);
  if (wanted < 0) return 1;
  if (wanted > dibit::machine_level()) return 2;
  dibit::level().store(wanted);
  return 0;
}
