// Attention of packed documents (Dao et al., "FlashAttention", 2022; Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018), for each document and head:
//
//      s = softmax_scale q k^T, masked        m, l, O: the rows' running maximum, sum and output
//      m' = max(m, row max of s)              p = 2^(s - m'), with scores in units of log2
//      l  = l 2^(m - m') + row sum of p       O = O 2^(m - m') + p V
//      out = O / l                            lse = m + log l
//
//                       keys of the document, kForwardKeys at a time
//                      ┌────────┬────────┬────────┐
//      queries of      │ packed │        │        │   A unit is kUnitRows rows (all heads that share a key head, some
//      the heads that  │ once a │   →    │   →    │   blocks of kBlockRows queries): it walks over its keys once, packs
//      share a key     │  unit  │        │        │   a block of them, and takes every row through it. Nothing is of
//      head            └────────┴────────┴────────┘   the size of queries times keys.
//
// Blocks outside of the mask are skipped; in those that its edge crosses, every tile of rows has its own range of
// columns. What lies in memory around a document is never read: short blocks are padded with zeros.
#pragma once
#include "parallel.h"
#include "varlen_attn_tile.kernel.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

constexpr int kBlockRows = 64;
constexpr int kBlockTiles = kBlockRows / kTileRows;
constexpr int kForwardKeys = 128;
constexpr int kUnitBlocks = 8;  // blocks of rows that share packed keys: their state stays in the 2nd-level cache
constexpr float kLog2e = 1.44269504088896341f;

inline float negative_infinity() { return -__builtin_inff(); }

template <class T>
inline T* head_row(const HeadsView& x, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

// Rows that are about to be packed: they lie far apart, where the hardware does not foresee them.
template <class T>
inline void prefetch_rows(const HeadsView& x, int64_t token, int64_t head, int64_t rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < head_dim; i += 64 / int64_t(sizeof(T))) vprefetch(head_row<T>(x, token + r, head) + i);
}

// One document: where its tokens stand, and which keys a query may attend to.
struct Document {
  int64_t q_begin, q_count, k_begin, k_count, window_left, window_right;

  Document(const VarlenAttn& a, int64_t doc)
      : q_begin(a.cu_q[doc]),
        q_count(a.cu_q[doc + 1] - q_begin),
        k_begin(a.cu_k[doc]),
        k_count(a.cu_k[doc + 1] - k_begin),
        window_left(a.window_left),
        window_right(a.window_right) {}

  // Keys [first, last) of query i; both grow with i.
  int64_t first_key(int64_t i) const { return min64(k_count, max64(0, i + k_count - q_count - window_left)); }
  int64_t last_key(int64_t i) const { return max64(0, min64(k_count, i + k_count - q_count + window_right + 1)); }
};

// The mask of a block of rows and a block of keys. Columns are relative to the block; a tile's range is rounded to
// kColStep and what it holds beyond a row's own range is zero.
struct BlockMask {
  int rows, tiles, cols;  // cols: with padding
  bool full;              // no row is masked anywhere
  int first[kBlockRows], last[kBlockRows];
  int tile_first[kBlockTiles], tile_last[kBlockTiles];

  BlockMask(const Document& doc, int64_t q, int64_t q_rows, int64_t key, int64_t keys)
      : rows(int(q_rows)), tiles(int(round_up(q_rows, kTileRows) / kTileRows)), cols(int(round_up(keys, kColStep))) {
    full = cols == keys && doc.first_key(q + q_rows - 1) <= key && doc.last_key(q) >= key + keys;
    for (int t = 0; t < tiles; ++t) {
      tile_first[t] = 0;
      tile_last[t] = cols;
    }
    if (full) return;
    for (int r = 0; r < tiles * kTileRows; ++r) {
      const int64_t i = q + min64(r, q_rows - 1);
      last[r] = int(max64(0, min64(keys, doc.last_key(i) - key)));
      first[r] = int(max64(0, min64(last[r], doc.first_key(i) - key)));
      const int t = r / kTileRows;
      if (r % kTileRows == 0) tile_first[t] = first[r] / kColStep * kColStep;
      tile_last[t] = int(round_up(last[r], kColStep));
    }
  }

  // C is [rows, keys]: only what is not masked.
  TileRange cols_of(int64_t row, int64_t begin, int64_t end) const {
    return {tile_first[row / kTileRows], tile_last[row / kTileRows], begin, end};
  }
  // C is [rows, lanes], summed over keys.
  template <class Words>
  TileRange keys_of(int64_t row, int64_t lanes) const {
    return {0, lanes, tile_first[row / kTileRows] / Words::kPair, tile_last[row / kTileRows] / Words::kPair};
  }
};

// Carves a thread's scratch memory; with a null base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* p = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return p;
  }
};

inline int64_t group_size(const VarlenAttn& a) { return a.num_heads / a.num_kv_heads; }

// Blocks of queries in a forward unit.
inline int64_t forward_blocks(const VarlenAttn& a) { return max64(1, min64(4, kUnitBlocks / group_size(a))); }

struct ForwardScratch {
  int64_t lanes_v;  // head_dim_v, padded
  float *keys, *values, *scores;
  float *queries, *sums;  // [group, blocks] blocks
  float *top, *total;     // a row's m and l
  int64_t used;

  ForwardScratch(const VarlenAttn& a, float* base) : lanes_v(round_up(a.head_dim_v, kLanes)) {
    Arena arena{base};
    const int64_t rows = group_size(a) * forward_blocks(a) * kBlockRows;
    keys = arena.take(kForwardKeys * a.head_dim);
    values = arena.take(kForwardKeys * lanes_v);
    scores = arena.take(kBlockRows * kForwardKeys);
    queries = arena.take(rows * a.head_dim);
    sums = arena.take(rows * lanes_v);
    top = arena.take(rows);
    total = arena.take(rows);
    used = arena.used;
  }
};

// scores = A B over `words` words, where the mask leaves anything.
template <class Words>
void score_product(const float* a, const float* b, int64_t words, const BlockMask& mask, float* scores,
                   int64_t stride) {
  for (int64_t begin = 0; begin < words; begin += Words::kChain) {
    const int64_t end = min64(words, begin + Words::kChain), rows = mask.tiles * kTileRows;
    const auto range = [&](int64_t row) { return mask.cols_of(row, begin, end); };
    product<Words>({a, words, 1}, b, mask.cols, rows, range, SumTile{scores, stride, begin > 0});
  }
}

// What cannot be left to a positive factor: tanh(x * softmax_scale / softcap), or a scale that turns the order around.
inline void score_block(const VarlenAttn& a, float* scores, int64_t stride, const BlockMask& mask) {
  if (a.softcap <= 0 && a.softmax_scale > 0) return;
  const Vec factor = vset(a.softcap > 0 ? a.softmax_scale / a.softcap : a.softmax_scale);
  for (int r = 0; r < mask.rows; ++r)
    for (int c = mask.tile_first[r / kTileRows]; c < mask.tile_last[r / kTileRows]; c += kLanes) {
      float* p = scores + r * stride + c;
      const Vec x = vmul(vload(p), factor);
      vstore(p, a.softcap > 0 ? vtanh(x) : x);
    }
}

// The factor that is left.
inline float score_factor(const VarlenAttn& a) {
  return a.softcap > 0 ? a.softcap : a.softmax_scale > 0 ? a.softmax_scale : 1.0f;
}

// Turns scores into words of p, in place, and brings top (of the scores) and total up to date; scale[row] is what O has
// to be multiplied with. The maximum is subtracted before to_log2 takes the
// scores to units of log2: so the largest p is 1, and no rounding is larger than the difference makes it.
template <class Words>
void softmax_block(float* scores, const BlockMask& mask, float to_log2, float* top, float* total, float* scale) {
  const Vec factor = vset(to_log2), lowest = vset(negative_infinity());
  const int rows = mask.tiles * kTileRows;
  for (int group = 0; group < rows; group += kLanes) {
    Vec each[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      each[i] = lowest;
      const int r = group + i;
      if (r >= rows) continue;
      float* row = scores + r * kForwardKeys;
      for (int c = mask.tile_first[r / kTileRows]; c < mask.tile_last[r / kTileRows]; c += kLanes) {
        Vec x = vload(row + c);
        if (!mask.full) {
          x = vbetween(x, mask.first[r] - c, mask.last[r] - c, lowest);
          vstore(row + c, x);
        }
        each[i] = vmax(each[i], x);
      }
    }
    const Vec old_top = vload(top + group), new_top = vmax(old_top, vmax_each(each));
    // Anything finite for a row without a key so far, whose p are zero.
    const Vec base = vwhere_less(lowest, new_top, new_top, vzero());
    alignas(64) float bases[kLanes];
    vstore(bases, base);
    for (int i = 0; i < kLanes; ++i) {
      each[i] = vzero();
      const int r = group + i;
      if (r >= rows) continue;
      float* row = scores + r * kForwardKeys;
      for (int c = mask.tile_first[r / kTileRows]; c < mask.tile_last[r / kTileRows]; c += kLanes) {
        const Vec p = vexp2(vmul(vsub(vload(row + c), vset(bases[i])), factor));
        each[i] = vadd(each[i], p);
        Words::store_row(row, c, p);
      }
    }
    const Vec shrink = vexp2(vmul(vsub(old_top, base), factor));
    vstore(top + group, new_top);
    vstore(total + group, vfma(vload(total + group), shrink, vsum_each(each)));
    vstore(scale + group, shrink);
  }
}

// Softmax of a block of rows over a block of packed keys, and its product with the values, added to `sums`.
template <class Words>
void forward_block(const VarlenAttn& a, const ForwardScratch& s, const BlockMask& mask, const float* queries,
                   bool first, float* sums, float* top, float* total) {
  alignas(64) float scale[kBlockRows];
  score_product<Words>(queries, s.keys, a.head_dim / Words::kPair, mask, s.scores, kForwardKeys);
  score_block(a, s.scores, kForwardKeys, mask);
  softmax_block<Words>(s.scores, mask, score_factor(a) * kLog2e, top, total, scale);
  const auto range = [&](int64_t row) { return mask.keys_of<Words>(row, s.lanes_v); };
  product<Words>({s.scores, kForwardKeys, 1}, s.values, s.lanes_v, mask.tiles * kTileRows, range,
                 ScaledSumTile{sums, s.lanes_v, !first, scale});
}

// lse is rounded once, where the dtype can tell: the backward pass rests on exp(s - lse).
template <class T>
inline double natural_log(float x) {
  return sizeof(T) == 4 ? __builtin_log(double(x)) : double(__builtin_logf(x));
}

// out = O / l and lse of `rows` rows; zero and -inf for a row that may attend to nothing.
template <class T>
void finish_rows(const VarlenAttn& a, int64_t token, int64_t head, int64_t rows, const float* sums, int64_t lanes_v,
                 const float* top, const float* total) {
  const double factor = score_factor(a);
  for (int64_t r = 0; r < rows; ++r, sums += lanes_v) {
    const bool empty = total[r] == 0.0f;  // its sums may never have been written
    const Vec inverse = vset(1.0f / total[r]);
    T* out = head_row<T>(a.out, token + r, head);
    for (int64_t i = 0; i < a.head_dim_v; i += kLanes) {
      const Vec x = empty ? vzero() : vmul(vload(sums + i), inverse);
      a.head_dim_v - i >= kLanes ? vstore(out + i, x) : vstore_n(out + i, x, int(a.head_dim_v - i));
    }
    const double lse = top[r] * factor + natural_log<T>(total[r]);
    a.lse[head * a.total_q + token + r] = empty ? negative_infinity() : float(lse);
  }
}

// Queries [q_begin, q_end) of a document, all heads of one key head.
template <class Words, class T>
void forward_unit(const VarlenAttn& a, const Document& doc, int64_t kv_head, int64_t q_begin, int64_t q_end,
                  const ForwardScratch& s) {
  const int64_t group = group_size(a), blocks = (q_end - q_begin + kBlockRows - 1) / kBlockRows;
  const int64_t block_words = kBlockRows * a.head_dim / Words::kPair, block_sums = kBlockRows * s.lanes_v;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i = g * blocks + b, q = q_begin + b * kBlockRows, rows = min64(kBlockRows, q_end - q);
      pack_rows<Words>(head_row<const T>(a.q, doc.q_begin + q, kv_head * group + g), a.q.token_stride, rows,
                       round_up(rows, kTileRows), a.head_dim, s.queries + i * block_words);
      for (int64_t r = 0; r < kBlockRows; ++r) {
        s.top[i * kBlockRows + r] = negative_infinity();
        s.total[i * kBlockRows + r] = 0.0f;
      }
    }
  const int64_t key_end = doc.last_key(q_end - 1);
  for (int64_t key = doc.first_key(q_begin) / kForwardKeys * kForwardKeys; key < key_end; key += kForwardKeys) {
    const int64_t keys = min64(kForwardKeys, doc.k_count - key), cols = round_up(keys, kColStep);
    pack_columns<Words>(head_row<const T>(a.k, doc.k_begin + key, kv_head), a.k.token_stride, keys, cols, a.head_dim,
                        s.keys);
    pack_pairs<Words>(head_row<const T>(a.v, doc.k_begin + key, kv_head), a.v.token_stride, keys, cols, a.head_dim_v,
                      s.lanes_v, s.values);
    const int64_t next_keys = min64(kForwardKeys, key_end - key - kForwardKeys);
    prefetch_rows<T>(a.k, doc.k_begin + key + kForwardKeys, kv_head, next_keys, a.head_dim);
    prefetch_rows<T>(a.v, doc.k_begin + key + kForwardKeys, kv_head, next_keys, a.head_dim_v);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t q = q_begin + b * kBlockRows, rows = min64(kBlockRows, q_end - q);
      if (doc.last_key(q + rows - 1) <= key || doc.first_key(q) >= key + keys) continue;
      const BlockMask mask(doc, q, rows, key, keys);
      const bool first = doc.first_key(q) >= key;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t i = g * blocks + b;
        forward_block<Words>(a, s, mask, s.queries + i * block_words, first, s.sums + i * block_sums,
                             s.top + i * kBlockRows, s.total + i * kBlockRows);
      }
    }
  }
  for (int64_t g = 0; g < group; ++g)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i = g * blocks + b, q = q_begin + b * kBlockRows;
      finish_rows<T>(a, doc.q_begin + q, kv_head * group + g, min64(kBlockRows, q_end - q), s.sums + i * block_sums,
                     s.lanes_v, s.top + i * kBlockRows, s.total + i * kBlockRows);
    }
}

template <class T>
void zero_tokens(const HeadsView& x, int64_t begin, int64_t end, int64_t first_head, int64_t last_head,
                 int64_t head_dim) {
  if (!x.data) return;
  for (int64_t token = begin; token < end; ++token)
    for (int64_t head = first_head; head < last_head; ++head) {
      T* row = head_row<T>(x, token, head);
      for (int64_t i = 0; i < head_dim; ++i) row[i] = from_float<T>(0.0f);
    }
}

// Counts the units of all documents, costly ones first, into a.first_unit, and gives their number.
template <class UnitsOf>
int64_t number_units(const VarlenAttn& a, const UnitsOf& units_of) {
  a.first_unit[0] = 0;
  for (int64_t i = 0; i < a.docs; ++i) a.first_unit[i + 1] = a.first_unit[i] + units_of(Document(a, a.doc_order[i]));
  return a.first_unit[a.docs];
}

// The position in doc_order of a unit's document.
inline int64_t position_of(const VarlenAttn& a, int64_t unit) {
  int64_t low = 0, high = a.docs;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    a.first_unit[middle] <= unit ? low = middle : high = middle;
  }
  return low;
}

// Small units are handed out several at a time.
inline int64_t grain_of(int64_t units, int threads) { return max64(1, min64(64, units / (int64_t(threads) * 32))); }

template <class Words, class T>
void forward(const VarlenAttn& a, int threads) {
  const int64_t rows = forward_blocks(a) * kBlockRows;
  const auto ranges = [&](const Document& doc) { return (doc.q_count + rows - 1) / rows; };
  const int64_t units = number_units(a, [&](const Document& doc) { return ranges(doc) * a.num_kv_heads; });
  parallel_dynamic(units, grain_of(units, threads), threads, [&](int rank, int64_t begin, int64_t end) {
    const ForwardScratch scratch(a, a.scratch + rank * ForwardScratch(a, nullptr).used);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t position = position_of(a, unit), local = unit - a.first_unit[position];
      const Document doc(a, a.doc_order[position]);
      // With a causal mask the last queries have the most keys: they come first.
      const int64_t q = (ranges(doc) - 1 - local / a.num_kv_heads) * rows;
      forward_unit<Words, T>(a, doc, local % a.num_kv_heads, q, min64(doc.q_count, q + rows), scratch);
    }
  });
  zero_tokens<T>(a.out, a.cu_q[a.docs], a.total_q, 0, a.num_heads, a.head_dim_v);
  for (int64_t head = 0; head < a.num_heads; ++head)
    for (int64_t token = a.cu_q[a.docs]; token < a.total_q; ++token)
      a.lse[head * a.total_q + token] = negative_infinity();
}

void varlen_attn(const VarlenAttn& a, int threads) {
  if (a.dtype == DType::f32) forward<FloatWords, float>(a, threads);
  if (a.dtype == DType::f16) forward<FloatWords, fp16>(a, threads);
#if defined(__AVX512BF16__)
  if (a.dtype == DType::bf16) forward<PairWords, bf16>(a, threads);
#else
  if (a.dtype == DType::bf16) forward<FloatWords, bf16>(a, threads);
#endif
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
