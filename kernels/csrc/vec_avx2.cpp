#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define DIBIT_VEC_AVX2

#include "activation_body.h"
#include "attention_body.h"
#include "attention_lanes.h"
#include "logprob_body.h"
#include "norm_body.h"
#include "rope_body.h"
#include "vec_bodies.h"

namespace dibit {

const VecBodies& vec_bodies_avx2() {
  static constexpr VecBodies bodies = {kRegisterRows, attend, 8,      attend_lanes, transpose, merge,
                                       finish,        widen,  rotate, rms_norm,     silu_mul,     logprob};
  return bodies;
}

}  // namespace dibit
#endif
