#include "activation_body.h"
#include "attention_body.h"
#include "isa.h"
#include "logprob_body.h"
#include "norm_body.h"
#include "rope_body.h"
#include "vec_bodies.h"

namespace dibit {

const VecBodies& vec_bodies_portable() {
  static constexpr VecBodies bodies = {kRegisterRows, attend, INT32_MAX, nullptr,  nullptr, merge,
                                       finish,        widen,  rotate,    rms_norm, silu_mul,     logprob};
  return bodies;
}

const VecBodies& vec_bodies() {
#if defined(__x86_64__)
  if (avx512_vnni()) return vec_bodies_avx512();
  if (isa() == Isa::avx2) return vec_bodies_avx2();
#endif
  return vec_bodies_portable();
}

}  // namespace dibit
