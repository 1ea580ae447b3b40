// The paged KV cache as attention reads it: whose rows meet which keys, and where the keys lie.
#pragma once
#include <algorithm>
#include <cstdint>

#include "vec_bodies.h"

namespace dibit {
namespace {

constexpr int64_t kKeyRange = 256;  // a unit of work for one thread at batch 1, 8 key tiles
static_assert(kKeyRange % kKeyTile == 0, "a key tile must not straddle two ranges");

struct Problem {
  float* out;
  const float* q;
  const void *k_cache, *v_cache;
  const int32_t *cu_seqlens, *seq_lens, *block_tables;
  int64_t tokens, sequences, table_stride, table_width;
  int64_t heads, kv_heads, d, blocks, block_size;
  Real key_real, value_real;
  float scale;

  int64_t group() const { return heads / kv_heads; }
  int64_t width() const { return (d + kLaneFloats - 1) / kLaneFloats * kLaneFloats; }
  int64_t key_bytes() const { return row_bytes(key_real, d); }
  int64_t value_bytes() const { return row_bytes(value_real, d); }
  bool floats() const { return key_real == Real::f32 && value_real == Real::f32; }
  static constexpr int64_t kLaneFloats = 8;
};

// Rows [first_row, first_row + rows) of one sequence and kv head. Row r is head r % group of token r / group.
struct RowTile {
  int64_t sequence, kv_head, first_row, rows;
  int64_t keys;  // seen by the tile's last row

  int64_t ranges() const { return (keys + kKeyRange - 1) / kKeyRange; }
  int64_t work() const { return keys * rows; }
};

// The run of cache rows from `key` on that lie together, at most `most`, and where they start.
struct Run {
  const char *keys, *values;
  int64_t count;
};

inline Run run_of(const Problem& p, const RowTile& tile, int64_t key, int64_t most) {
  const int32_t* table = p.block_tables + tile.sequence * p.table_stride;
  const int64_t block = key / p.block_size, within = key % p.block_size;
  const int64_t row = (table[block] * p.kv_heads + tile.kv_head) * p.block_size + within;
  return {static_cast<const char*>(p.k_cache) + row * p.key_bytes(),
          static_cast<const char*>(p.v_cache) + row * p.value_bytes(), std::min(most, p.block_size - within)};
}

// The rows of keys [begin, begin + count), count up to kKeyTile; past the last one the first again.
inline void find_rows(const Problem& p, const RowTile& tile, int64_t begin, int64_t count, KeyRows* rows) {
  const int64_t key_bytes = p.key_bytes(), value_bytes = p.value_bytes();
  for (int64_t j = 0; j < count;) {
    const Run run = run_of(p, tile, begin + j, count - j);
    for (int64_t i = 0; i < run.count; ++i, ++j) {
      rows->keys[j] = run.keys + i * key_bytes;
      rows->values[j] = run.values + i * value_bytes;
    }
  }
  for (int64_t j = count; j < kKeyTile; ++j) rows->keys[j] = rows->keys[0], rows->values[j] = rows->values[0];
  rows->count = static_cast<int>(count);
  rows->key_bytes = static_cast<int>(key_bytes);
  rows->value_bytes = static_cast<int>(value_bytes);
}

}  // namespace
}  // namespace dibit
