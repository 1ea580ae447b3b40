// Which instruction set the kernels use, decided once at run time. Every ISA has its own translation unit with a
// `#pragma GCC target` below its includes, so one library serves every x86-64 and, through the portable bodies,
// everything else.
#pragma once

// Matrix units, where the compiler knows them and the system hands them out.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxint8intrin.h>)
#define DIBIT_AMX
#endif

#define DIBIT_API extern "C" __attribute__((visibility("default")))

namespace dibit {

enum class Isa { portable, avx2 };

// The best ISA of this machine, or what DIBIT_ISA=portable|avx2|avx512|amx asks for (never more than the machine has).
Isa isa();

// True when, on top of avx2, the AVX-512 kernels (VNNI among them) are to be used.
bool avx512_vnni();

// True when, on top of those, the matrix units are to be used.
bool amx_int8();

}  // namespace dibit
