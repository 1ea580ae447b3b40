// The entry points that compute a step. Defined in the op's own file, called one by one through ctypes or, in a row, by
// the tape. Each returns 0, or what its kernels/*_cpu.py makes a message of.
#pragma once
#include <cstdint>

#include "isa.h"

namespace dibit {
struct QWeight;
}

DIBIT_API int dibit_embedding(const dibit::QWeight* w, const int64_t* ids, int64_t count, float* y);

DIBIT_API int dibit_qlinear(const dibit::QWeight* w, const float* x, int64_t m, const float* bias,
                            int64_t activation_bits, float* y);

DIBIT_API int dibit_rms_norm(float* y, const float* x, float* residual, const float* weight, int64_t rows, int64_t k,
                             float eps);

DIBIT_API int dibit_head_norm(float* qkv, const float* q_norm, const float* k_norm, int64_t tokens, int64_t heads,
                              int64_t kv_heads, int64_t d, float eps);

DIBIT_API int dibit_rope_kv_write(float* q, const float* qkv, const int64_t* positions, const float* cos,
                                  const float* sin, void* k_cache, void* v_cache, const int64_t* slots, int64_t tokens,
                                  int64_t heads, int64_t kv_heads, int64_t d, int64_t half, int64_t table_rows,
                                  int64_t blocks, int64_t block_size, int64_t key_real, int64_t value_real);

DIBIT_API int dibit_paged_attention(float* out, const float* q, const void* k_cache, const void* v_cache,
                                    const int32_t* cu_seqlens, const int32_t* seq_lens, const int32_t* block_tables,
                                    int64_t tokens, int64_t sequences, int64_t table_stride, int64_t table_width,
                                    int64_t heads, int64_t kv_heads, int64_t d, int64_t blocks, int64_t block_size,
                                    int64_t key_real, int64_t value_real, float scale);

DIBIT_API int dibit_silu_mul(float* y, const float* gate_up, int64_t rows, int64_t width);

DIBIT_API int dibit_copy_columns(float* y, const float* x, int64_t rows, int64_t width, int64_t stride);

DIBIT_API int dibit_argmax(int64_t* ids, float* peaks, const float* scores, int64_t rows, int64_t width);

DIBIT_API int dibit_sample(int64_t* ids, const float* scores, const int64_t* best, const float* peaks,
                           const double* filters, const int64_t* draws, int64_t rows, int64_t width);
