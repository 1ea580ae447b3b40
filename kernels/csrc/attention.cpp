// Paged attention: which rows meet which keys, on which thread. The arithmetic is in attention_body.h.
//
// The rows of a kv head are its (token, query head) pairs; a tile of up to kRowTile of them shares every key and value
// it loads. Keys are taken in tiles of kKeyTile and the softmax state starts afresh every kKeyRange keys, both counted
// from key 0; the states of a row's ranges are merged one after another. That order is the same whether one thread
// walks all ranges of a tile or several threads take one each, so a token's result never depends on the step around it.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_cache.h"
#include "isa.h"
#include "ops.h"
#include "pool.h"
#include "vec_bodies.h"

namespace dibit {
namespace {

constexpr int64_t kRowTile = 48;    // rows of fp32 sums beside a key and a value tile stay in a 256 KB L2

// Multiply-adds below which the caller does all the work itself: a few microseconds, as long as a wake-up.
constexpr int64_t kInlineWork = 1 << 17;

enum Status { kOk = 0, kBadCuSeqlens = 1, kBadSeqLen = 2, kBadBlock = 3 };

// One thread's unit: a whole tile (range < 0), or one key range of a tile that several threads share.
struct Item {
  int64_t tile, range;
};

// A tile shared by several threads: the state of each range, and how many ranges are not done.
struct Shared {
  int64_t first_state = 0;
  std::atomic<int64_t> pending{0};
};

// Floats that are kept from call to call and only ever grow.
class Arena {
 public:
  float* reserve(int64_t floats) {
    if (static_cast<int64_t>(floats_.size()) < floats + kAlign) floats_.resize(floats + kAlign);
    const auto address = reinterpret_cast<uintptr_t>(floats_.data());
    return floats_.data() + (64 - address % 64) % 64 / sizeof(float);
  }

 private:
  static constexpr int64_t kAlign = 16;
  std::vector<float> floats_;
};

Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

// Rows rounded up so that what follows them starts on a cache line.
int64_t padded(int64_t rows) { return (rows + 15) / 16 * 16; }

// Softmax states of a tile's rows over some keys.
struct States {
  float *peak, *total, *acc;

  States(float* memory, int64_t rows) : peak(memory), total(peak + padded(rows)), acc(total + padded(rows)) {}

  static int64_t floats(int64_t rows, int64_t width) { return 2 * padded(rows) + rows * width; }

  void clear(int64_t rows, int64_t width) const {
    std::fill(peak, peak + padded(rows), kNoPeak);
    std::fill(total, total + padded(rows), 0.0f);
    std::fill(acc, acc + rows * width, 0.0f);
  }
};

class Step {
 public:
  explicit Step(const Problem& problem) : p_(problem), bodies_(vec_bodies()) {}

  void run() {
    plan_tiles();
    if (tiles_.empty()) return;
    int64_t work = 0;
    for (const RowTile& tile : tiles_) work += tile.work();
    const int64_t threads = work * p_.width() * 2 < kInlineWork ? 1 : thread_count();
    plan_items(threads, work);
    if (threads == 1) return run_items();
    parallel_for(threads, 1, [&](int64_t, int64_t) { run_items(); });
  }

 private:
  // Last tokens first: they see the most keys, and short items at the end even out the threads.
  void plan_tiles() {
    for (int64_t b = 0; b < p_.sequences; ++b) {
      const int64_t tokens = p_.cu_seqlens[b + 1] - p_.cu_seqlens[b];
      const int64_t all_rows = tokens * p_.group(), past = p_.seq_lens[b] - tokens;
      for (int64_t stop = all_rows; stop > 0; stop -= std::min(stop, kRowTile))
        for (int64_t h = 0; h < p_.kv_heads; ++h) {
          const int64_t first = std::max<int64_t>(0, stop - kRowTile);
          tiles_.push_back({b, h, first, stop - first, past + (stop - 1) / p_.group() + 1});
        }
    }
  }

  // Tiles that alone would take more than a quarter of a thread's share are cut into their key ranges.
  void plan_items(int64_t threads, int64_t work) {
    const int64_t count = static_cast<int64_t>(tiles_.size());
    shared_ = std::make_unique<Shared[]>(threads == 1 ? 0 : count);
    int64_t states = 0;
    for (int64_t i = 0; i < count; ++i) {
      const RowTile& tile = tiles_[i];
      if (threads == 1 || tile.ranges() == 1 || tile.work() * threads * 4 <= work) {
        items_.push_back({i, -1});
        continue;
      }
      shared_[i].first_state = states;
      shared_[i].pending.store(tile.ranges(), std::memory_order_relaxed);
      states += tile.ranges() * States::floats(tile.rows, p_.width());
      for (int64_t r = 0; r < tile.ranges(); ++r) items_.push_back({i, r});
    }
    static thread_local Arena arena;
    shared_states_ = arena.reserve(states);
  }

  // A thread's memory for one item. Lanes: q and acc are transposed, q [width, padded rows] and likewise acc.
  struct Scratch {
    float *q, *rows, *score, *factor, *states, *acc;
    int32_t *position, *visible;
    bool lanes;
  };

  Scratch scratch(const RowTile& tile) const {
    const int64_t n = padded(tile.rows), width = p_.width(), states = 2 * States::floats(tile.rows, width);
    const int64_t acc = n * width;
    float* memory = thread_arena().reserve(n * (width + kKeyTile + 3) + 2 * kKeyTile * width + acc + states);
    Scratch s;
    s.lanes = tile.rows >= bodies_.lane_rows;
    s.rows = memory;
    s.q = s.rows + 2 * kKeyTile * width;
    s.score = s.q + n * width;
    s.factor = s.score + n * kKeyTile;
    s.position = reinterpret_cast<int32_t*>(s.factor + n);
    s.visible = s.position + n;
    s.acc = s.factor + 3 * n;
    s.states = s.acc + acc;
    return s;
  }

  // What one thread works on and will work on next. Blocks lie anywhere, so the hardware's prefetcher loses the stream
  // at each one's end: rows are found one tile of keys ahead, and fetched during the work on the tile before.
  struct Ahead {
    KeyRows rows[2];
    int turn = 0;  // whose rows are those of the tile at hand
    const Item* item;
    const Item* next_item = nullptr;
  };

  // The next item of nobody; null when there is none.
  const Item* take() {
    const int64_t i = taken_.fetch_add(1, std::memory_order_relaxed);
    return i < static_cast<int64_t>(items_.size()) ? &items_[i] : nullptr;
  }

  void run_items() {
    Ahead ahead;
    for (ahead.item = find_first(take(), &ahead.rows[0]); ahead.item != nullptr; ahead.item = ahead.next_item)
      run_item(&ahead);
  }

  int64_t first_key(const Item& item) const { return std::max<int64_t>(0, item.range) * kKeyRange; }
  int64_t last_key(const Item& item) const {
    const int64_t keys = tiles_[item.tile].keys;
    return item.range < 0 ? keys : std::min(keys, (item.range + 1) * kKeyRange);
  }

  // The rows of the keys from `begin` on, after finding those that come next. The next item is taken with the last tile of
  // the one at hand, no earlier: another thread may be out of work before.
  const KeyRows& rows_at(int64_t begin, Ahead* ahead) {
    const Item& item = *ahead->item;
    KeyRows *now = &ahead->rows[ahead->turn], *next = &ahead->rows[ahead->turn ^= 1];
    if (begin + kKeyTile < last_key(item)) find_rows_of(item, begin + kKeyTile, next);
    else ahead->next_item = find_first(take(), next);
    return *now;
  }

  // The first rows of an item, none of no item; gives the item back.
  const Item* find_first(const Item* item, KeyRows* rows) const {
    if (item == nullptr) rows->count = 0;
    else find_rows_of(*item, first_key(*item), rows);
    return item;
  }

  void find_rows_of(const Item& item, int64_t begin, KeyRows* rows) const {
    find_rows(p_, tiles_[item.tile], begin, std::min<int64_t>(kKeyTile, last_key(item) - begin), rows);
  }

  void run_item(Ahead* ahead) {
    const Item& item = *ahead->item;
    const RowTile& tile = tiles_[item.tile];
    const Scratch s = scratch(tile);
    const int64_t states = States::floats(tile.rows, p_.width());
    load_rows(tile, s);
    if (item.range < 0) {
      const States done(s.states, tile.rows), fresh(s.states + states, tile.rows);
      walk_range(tile, 0, s, done, ahead);
      for (int64_t r = 1; r < tile.ranges(); ++r) {
        walk_range(tile, r, s, fresh, ahead);
        merge(tile, r, s, done, fresh);
      }
      finish(tile, done);
      return;
    }
    Shared& shared = shared_[item.tile];
    float* first = shared_states_ + shared.first_state;
    walk_range(tile, item.range, s, States(first + item.range * states, tile.rows), ahead);
    // Whoever finishes last merges, in the order of the ranges.
    if (shared.pending.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const States done(first, tile.rows);
    for (int64_t r = 1; r < tile.ranges(); ++r) merge(tile, r, s, done, States(first + r * states, tile.rows));
    finish(tile, done);
  }

  int64_t offset(const RowTile& tile, int64_t row) const {
    const int64_t r = tile.first_row + row, token = p_.cu_seqlens[tile.sequence] + r / p_.group();
    return (token * p_.heads + tile.kv_head * p_.group() + r % p_.group()) * p_.d;
  }

  void load_rows(const RowTile& tile, const Scratch& s) const {
    const int64_t width = p_.width(), n = padded(tile.rows);
    const int64_t past = p_.seq_lens[tile.sequence] - (p_.cu_seqlens[tile.sequence + 1] - p_.cu_seqlens[tile.sequence]);
    float* const rows = s.lanes ? s.acc : s.q;
    float* q = rows;
    for (int64_t r = 0; r < tile.rows; ++r, q += width) {
      const float* from = p_.q + offset(tile, r);
      for (int64_t i = 0; i < p_.d; ++i) q[i] = from[i] * p_.scale;
      for (int64_t i = p_.d; i < width; ++i) q[i] = 0.0f;
      s.position[r] = static_cast<int32_t>(past + (tile.first_row + r) / p_.group());
    }
    if (!s.lanes) return;
    std::fill(q, rows + n * width, 0.0f);
    std::fill(s.position + tile.rows, s.position + n, -1);
    bodies_.transpose(s.q, n, rows, width, static_cast<int>(n), static_cast<int>(width));
  }

  void walk_range(const RowTile& tile, int64_t range, const Scratch& s, States states, Ahead* ahead) {
    const int64_t width = p_.width(), n = padded(tile.rows);
    states.clear(tile.rows, width);
    if (s.lanes) std::fill(s.acc, s.acc + n * width, 0.0f);
    const int64_t begin = range * kKeyRange, end = std::min(tile.keys, begin + kKeyRange);
    for (int64_t key = begin; key < end; key += kKeyTile) {
      const int64_t count = std::min<int64_t>(kKeyTile, end - key);
      const int64_t rows = s.lanes ? n : tile.rows;
      for (int64_t r = 0; r < rows; ++r)
        s.visible[r] = static_cast<int32_t>(std::clamp<int64_t>(s.position[r] + 1 - key, 0, count));
      const KeyRows& found = rows_at(key, ahead);
      if (s.lanes)
        attend_lanes(tile, found, s, states);
      else
        attend_rows(tile, found, s, states, &ahead->rows[ahead->turn]);
    }
    if (s.lanes) turn_back(tile, s, states);
  }

  void attend_rows(const RowTile& tile, const KeyRows& found, const Scratch& s, const States& states,
                   const KeyRows* next) const {
    const int64_t width = p_.width();
    const bool in_place = width == p_.d && (p_.floats() || tile.rows <= bodies_.register_rows);
    const void *keys[kKeyTile], *values[kKeyTile];
    if (!in_place) widen(found, s.rows);
    for (int64_t j = 0; j < kKeyTile && !in_place; ++j) {
      keys[j] = s.rows + (j < found.count ? j : 0) * width;
      values[j] = s.rows + (kKeyTile + (j < found.count ? j : 0)) * width;
    }
    const Real key_real = in_place ? p_.key_real : Real::f32, value_real = in_place ? p_.value_real : Real::f32;
    bodies_.attend({in_place ? found.keys : keys, in_place ? found.values : values, key_real, value_real, s.visible,
                    static_cast<int>(tile.rows), static_cast<int>(width), s.q, s.score, s.factor, states.peak,
                    states.total, states.acc, next});
  }

  void attend_lanes(const RowTile& tile, const KeyRows& found, const Scratch& s, const States& states) const {
    const int64_t width = p_.width();
    widen(found, s.rows);
    bodies_.attend_lanes({s.rows, s.rows + kKeyTile * width, s.visible, static_cast<int>(padded(tile.rows)),
                          static_cast<int>(width), s.q, s.score, s.factor, states.peak, states.total, s.acc});
  }

  // The transposed sums into the state's rows.
  void turn_back(const RowTile& tile, const Scratch& s, const States& states) const {
    const int64_t width = p_.width(), n = padded(tile.rows), whole = tile.rows / 8 * 8;
    bodies_.transpose(states.acc, width, s.acc, n, static_cast<int>(width), static_cast<int>(whole));
    for (int64_t r = whole; r < tile.rows; ++r)
      for (int64_t i = 0; i < width; ++i) states.acc[r * width + i] = s.acc[i * n + r];
  }

  // A tile's keys as floats from `wide` on, its values kKeyTile rows further. Rows that lie together go together.
  void widen(const KeyRows& rows, float* wide) const {
    const int d = static_cast<int>(p_.d), width = static_cast<int>(p_.width());
    for (int j = 0, count; j < rows.count; j += count) {
      for (count = 1; j + count < rows.count && follows(rows, j + count);) ++count;
      bodies_.widen(wide + j * width, rows.keys[j], p_.key_real, count, d, width);
      bodies_.widen(wide + (kKeyTile + j) * width, rows.values[j], p_.value_real, count, d, width);
    }
  }

  static bool follows(const KeyRows& rows, int j) {
    return static_cast<const char*>(rows.keys[j - 1]) + rows.key_bytes == rows.keys[j] &&
           static_cast<const char*>(rows.values[j - 1]) + rows.value_bytes == rows.values[j];
  }

  void merge(const RowTile& tile, int64_t range, const Scratch& s, const States& done, const States& next) const {
    const int64_t width = p_.width();
    for (int64_t r = 0; r < tile.rows; ++r)
      if (s.position[r] >= range * kKeyRange)
        bodies_.merge(done.peak + r, done.total + r, done.acc + r * width, next.peak[r], next.total[r],
                      next.acc + r * width, static_cast<int>(width));
  }

  void finish(const RowTile& tile, const States& done) const {
    for (int64_t r = 0; r < tile.rows; ++r)
      bodies_.finish(p_.out + offset(tile, r), done.acc + r * p_.width(), done.total[r], static_cast<int>(p_.d));
  }

  const Problem p_;
  const VecBodies& bodies_;
  std::vector<RowTile> tiles_;
  std::vector<Item> items_;
  std::atomic<int64_t> taken_{0};
  std::unique_ptr<Shared[]> shared_;
  float* shared_states_ = nullptr;
};

// Everything that an address is computed from, before anything is read or written.
Status check(const Problem& p) {
  if (p.cu_seqlens[0] != 0 || p.cu_seqlens[p.sequences] != p.tokens) return kBadCuSeqlens;
  for (int64_t b = 0; b < p.sequences; ++b)
    if (p.cu_seqlens[b + 1] < p.cu_seqlens[b]) return kBadCuSeqlens;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t tokens = p.cu_seqlens[b + 1] - p.cu_seqlens[b], length = p.seq_lens[b];
    if (tokens == 0) continue;
    if (length < tokens || length > p.table_width * p.block_size) return kBadSeqLen;
    const int32_t* table = p.block_tables + b * p.table_stride;
    for (int64_t i = 0; i < (length + p.block_size - 1) / p.block_size; ++i)
      if (table[i] < 0 || table[i] >= p.blocks) return kBadBlock;
  }
  return kOk;
}

}  // namespace
}  // namespace dibit

// Shapes in kernels/attention.py; block_tables has table_stride elements from row to row.
DIBIT_API int dibit_paged_attention(float* out, const float* q, const void* k_cache, const void* v_cache,
                                    const int32_t* cu_seqlens, const int32_t* seq_lens, const int32_t* block_tables,
                                    int64_t tokens, int64_t sequences, int64_t table_stride, int64_t table_width,
                                    int64_t heads, int64_t kv_heads, int64_t d, int64_t blocks, int64_t block_size,
                                    int64_t key_real, int64_t value_real, float scale) {
  const auto keys = static_cast<dibit::Real>(key_real), values = static_cast<dibit::Real>(value_real);
  const dibit::Problem problem = {out,       q,         k_cache,      v_cache,     cu_seqlens, seq_lens, block_tables,
                                  tokens,    sequences, table_stride, table_width, heads,      kv_heads, d,
                                  blocks,    block_size, keys,        values,      scale};
  const dibit::Status status = dibit::check(problem);
  if (status == dibit::kOk) dibit::Step(problem).run();
  return status;
}
