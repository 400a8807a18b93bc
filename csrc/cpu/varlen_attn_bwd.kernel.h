// Gradients of packed attention, from out and lse alone, for each document and head:
//
//      p  = exp(s - lse)               delta = row sum of dout * out
//      dv = p^T dout                   ds = p * (dout v^T - delta)
//      dq = softmax_scale * ds k       dk = softmax_scale * ds^T q
//
//                  a unit's keys (some blocks of kBackwardKeys), one key head
//                  ┌──────┬──────┬──────┐
//      queries,    │      │      │      │  dk, dv: summed in the unit over all heads and queries
//      kBlockRows  │  →   │  →   │  →   │
//      at a time   │      │      │      │  dq: summed along a row; where a row goes through several units, each goes on
//         ↓        └──────┴──────┴──────┘      from the sums of the unit before it
//
// Every sum has one order, which neither the threads nor the number of units changes: equal inputs give equal bits.
#pragma once
#include "varlen_attn.kernel.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

constexpr int kBackwardKeys = 64;
constexpr int kMaxUnitKeyBlocks = 8;
constexpr int64_t kUnitFloats = 128 << 10;  // what a unit keeps of its keys should fit into half of a 2nd-level cache

struct BackwardScratch {
  int64_t lanes, lanes_v;                                  // head_dim and head_dim_v, padded
  float *keys, *key_pairs, *values, *dk, *dv;              // [unit's keys]
  float *queries, *query_pairs, *douts, *dout_pairs, *dq;  // [kBlockRows]
  float *scores, *dp, *p_pairs, *ds_rows, *ds_pairs;       // [kBlockRows, kBackwardKeys]
  float* columns;                                          // dout and out, transposed
  float *lse, *delta;                                      // [kBlockRows]; lse in units of log2
  bool visited[kMaxUnitKeyBlocks];                         // whether dk and dv of a block hold anything yet
  int64_t used;

  // `pair` is Words::kPair: with floats the two forms of p and ds are one, and take the place of scores and dp.
  BackwardScratch(const VarlenAttn& a, int64_t key_blocks, int pair, float* base)
      : lanes(round_up(a.head_dim, kLanes)), lanes_v(round_up(a.head_dim_v, kLanes)) {
    Arena arena{base};
    const int64_t unit_keys = key_blocks * kBackwardKeys, block = kBlockRows * kBackwardKeys;
    keys = arena.take(unit_keys * a.head_dim);
    key_pairs = arena.take(unit_keys * lanes);
    values = arena.take(unit_keys * a.head_dim_v);
    dk = arena.take(unit_keys * lanes);
    dv = arena.take(unit_keys * lanes_v);
    queries = arena.take(kBlockRows * a.head_dim);
    query_pairs = arena.take(kBlockRows * lanes);
    douts = arena.take(kBlockRows * a.head_dim_v);
    dout_pairs = arena.take(kBlockRows * lanes_v);
    dq = arena.take(kBlockRows * lanes);
    scores = arena.take(block);
    dp = arena.take(block);
    p_pairs = pair == 1 ? scores : arena.take(block / 2);
    ds_rows = pair == 1 ? dp : arena.take(block / 2);
    ds_pairs = pair == 1 ? dp : arena.take(block / 2);
    columns = arena.take(2 * kBlockRows * a.head_dim_v);
    lse = arena.take(kBlockRows);
    delta = arena.take(kBlockRows);
    used = arena.used;
  }
};

inline int64_t key_blocks_of(const Document& doc) { return (doc.k_count + kBackwardKeys - 1) / kBackwardKeys; }

// Units of a document and one key head; one where there are no keys, for the zeros in dq.
inline int64_t ranges_of(const Document& doc, int64_t unit_blocks) {
  return max64(doc.q_count > 0, (key_blocks_of(doc) + unit_blocks - 1) / unit_blocks);
}

// Blocks of keys in a unit: as many as its caches hold, but units enough for all threads.
inline int64_t unit_key_blocks(const VarlenAttn& a, int threads) {
  const int64_t key_floats = 3 * (a.head_dim + a.head_dim_v);
  int64_t blocks = max64(1, min64(kMaxUnitKeyBlocks, kUnitFloats / (key_floats * kBackwardKeys)));
  for (; blocks > 1; blocks = (blocks + 1) / 2) {
    int64_t units = 0;
    for (int64_t doc = 0; doc < a.docs; ++doc) units += ranges_of(Document(a, doc), blocks) * a.num_kv_heads;
    if (units >= 8 * int64_t(threads)) break;
  }
  return blocks;
}

// For tiles of keys, the steps of a sum over the rows of a block that see any of them.
struct RowSteps {
  int begin[kBackwardKeys / kTileRows], end[kBackwardKeys / kTileRows];  // in tiles of rows

  explicit RowSteps(const BlockMask& mask) {
    int low = 0, high = 0;
    for (int key = 0; key < mask.cols; key += kTileRows) {
      while (low < mask.tiles && mask.tile_last[low] <= key) ++low;
      while (high < mask.tiles && mask.tile_first[high] <= key) ++high;
      begin[key / kTileRows] = low;
      end[key / kTileRows] = high;
    }
  }

  template <class Words>
  TileRange rows_of(int64_t key, int64_t lanes) const {
    return {0, lanes, begin[key / kTileRows] * (kTileRows / Words::kPair),
            end[key / kTileRows] * (kTileRows / Words::kPair)};
  }
};

// p and ds of one vector. With a soft cap, s is the tanh.
struct Gradient {
  Vec p, ds;
};

template <class Words, bool kCapped>
void softmax_gradient(const BackwardScratch& s, const BlockMask& mask, float score_factor) {
  const Vec factor = vset(score_factor), to_log2 = vset(kLog2e);
  const auto gradient = [&](int r, int c) {
    const Vec x = vload(s.scores + r * kBackwardKeys + c);
    Gradient g;
    // lse is subtracted before the units are changed, which would round it a second time.
    g.p = vexp2(vmul(vfma(x, factor, vset(-s.lse[r])), to_log2));
    g.ds = vmul(g.p, vsub(vload(s.dp + r * kBackwardKeys + c), vset(s.delta[r])));
    if (kCapped) g.ds = vmul(g.ds, vsub(vset(1.0f), vmul(x, x)));
    if (!mask.full) {
      g.p = vbetween(g.p, mask.first[r] - c, mask.last[r] - c, vzero());
      g.ds = vbetween(g.ds, mask.first[r] - c, mask.last[r] - c, vzero());
    }
    return g;
  };
  for (int r = 0; r < mask.tiles * kTileRows; r += 2)
    for (int c = mask.tile_first[r / kTileRows]; c < mask.tile_last[r / kTileRows]; c += kLanes) {
      const Gradient even = gradient(r, c), odd = gradient(r + 1, c);
      Words::store_pair(s.p_pairs, r / 2, kBackwardKeys, c, even.p, odd.p);
      Words::store_pair(s.ds_pairs, r / 2, kBackwardKeys, c, even.ds, odd.ds);
      if (Words::kPair > 1) {
        Words::store_row(s.ds_rows + r * (kBackwardKeys / Words::kPair), c, even.ds);
        Words::store_row(s.ds_rows + (r + 1) * (kBackwardKeys / Words::kPair), c, odd.ds);
      }
    }
}

// Whether the sums of a block begin here.
struct FirstVisit {
  bool of_rows, of_keys;
};

// One block of rows and one block of keys, whose packed forms begin at `key` of the unit's.
template <class Words>
void backward_block(const VarlenAttn& a, const BackwardScratch& s, const BlockMask& mask, int64_t key,
                    FirstVisit first) {
  const int64_t rows = mask.tiles * kTileRows, cols = mask.cols;
  const int64_t words = a.head_dim / Words::kPair, words_v = a.head_dim_v / Words::kPair;
  const RowSteps steps(mask);
  score_product<Words>(s.queries, s.keys + key * words, words, mask, s.scores, kBackwardKeys);
  score_product<Words>(s.douts, s.values + key * words_v, words_v, mask, s.dp, kBackwardKeys);
  score_block(a, s.scores, kBackwardKeys, mask);
  if (a.softcap > 0) softmax_gradient<Words, true>(s, mask, score_factor(a));
  if (a.softcap <= 0) softmax_gradient<Words, false>(s, mask, score_factor(a));
  if (a.dv.data)
    product<Words>(
        {s.p_pairs, 1, kBackwardKeys}, s.dout_pairs, s.lanes_v, cols,
        [&](int64_t n) { return steps.rows_of<Words>(n, s.lanes_v); },
        SumTile{s.dv + key * s.lanes_v, s.lanes_v, !first.of_keys});
  if (a.dk.data)
    product<Words>(
        {s.ds_pairs, 1, kBackwardKeys}, s.query_pairs, s.lanes, cols,
        [&](int64_t n) { return steps.rows_of<Words>(n, s.lanes); },
        SumTile{s.dk + key * s.lanes, s.lanes, !first.of_keys});
  if (a.dq.data)
    product<Words>(
        {s.ds_rows, kBackwardKeys / Words::kPair, 1}, s.key_pairs + key / Words::kPair * s.lanes, s.lanes, rows,
        [&](int64_t row) { return mask.keys_of<Words>(row, s.lanes); }, SumTile{s.dq, s.lanes, !first.of_rows});
}

template <class Words, class T>
void pack_keys(const VarlenAttn& a, const Document& doc, int64_t kv_head, int64_t begin, int64_t end,
               const BackwardScratch& s) {
  for (int64_t key = begin; key < end; key += kBackwardKeys) {
    const int64_t keys = min64(kBackwardKeys, end - key), cols = round_up(keys, kColStep), at = key - begin;
    const T* k = head_row<const T>(a.k, doc.k_begin + key, kv_head);
    const T* v = head_row<const T>(a.v, doc.k_begin + key, kv_head);
    pack_columns<Words>(k, a.k.token_stride, keys, cols, a.head_dim, s.keys + at * a.head_dim / Words::kPair);
    pack_pairs<Words>(k, a.k.token_stride, keys, cols, a.head_dim, s.lanes, s.key_pairs + at / Words::kPair * s.lanes);
    pack_columns<Words>(v, a.v.token_stride, keys, cols, a.head_dim_v, s.values + at * a.head_dim_v / Words::kPair);
  }
}

// delta, added up in the order of the product that makes dp: a row with one key has dp = delta, and ds exactly zero.
template <class Words, class T>
void row_dots(const VarlenAttn& a, const T* dout, const T* out, int64_t rows, const BackwardScratch& s) {
  const int64_t lanes = round_up(rows, kColStep), words = a.head_dim_v / Words::kPair;
  pack_columns<Words>(dout, a.dout.token_stride, rows, lanes, a.head_dim_v, s.columns);
  pack_columns<Words>(out, a.out.token_stride, rows, lanes, a.head_dim_v, s.columns + words * lanes);
  for (int64_t r = 0; r < lanes; r += kLanes) {
    Vec total = vzero();
    for (int64_t begin = 0; begin < words; begin += Words::kChain) {
      Vec sum = vzero();
      for (int64_t i = begin; i < min64(words, begin + Words::kChain); ++i)
        sum = Words::dot(vload(s.columns + i * lanes + r), vload(s.columns + (words + i) * lanes + r), sum);
      total = vadd(total, sum);
    }
    vstore(s.delta + r, total);
  }
}

template <class Words, class T>
void pack_queries(const VarlenAttn& a, int64_t token, int64_t head, int64_t rows, const BackwardScratch& s) {
  const int64_t padded = round_up(rows, kTileRows);
  const T* q = head_row<const T>(a.q, token, head);
  const T* dout = head_row<const T>(a.dout, token, head);
  pack_rows<Words>(q, a.q.token_stride, rows, padded, a.head_dim, s.queries);
  pack_pairs<Words>(q, a.q.token_stride, rows, padded, a.head_dim, s.lanes, s.query_pairs);
  pack_rows<Words>(dout, a.dout.token_stride, rows, padded, a.head_dim_v, s.douts);
  pack_pairs<Words>(dout, a.dout.token_stride, rows, padded, a.head_dim_v, s.lanes_v, s.dout_pairs);
  for (int64_t r = 0; r < padded; ++r) {
    const float lse = r < rows ? a.lse[head * a.total_q + token + r] : negative_infinity();
    // Infinity makes p zero: in rows of padding, and where a row may attend to nothing.
    s.lse[r] = lse == negative_infinity() ? __builtin_inff() : lse;
  }
  row_dots<Words>(a, dout, head_row<const T>(a.out, token, head), rows, s);
}

// Rows of sums to a gradient.
template <class T>
void store_rows(const HeadsView& x, int64_t token, int64_t head, int64_t rows, int64_t head_dim, const float* sums,
                int64_t lanes, float factor) {
  if (!x.data) return;
  for (int64_t r = 0; r < rows; ++r, sums += lanes) {
    T* out = head_row<T>(x, token + r, head);
    for (int64_t i = 0; i < head_dim; i += kLanes) {
      const Vec y = vmul(vload(sums + i), vset(factor));
      head_dim - i >= kLanes ? vstore(out + i, y) : vstore_n(out + i, y, int(head_dim - i));
    }
  }
}

inline void copy_floats(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) vstore(to + i, vload(from + i));
}

// Key blocks [begin, end) of a document, one key head.
template <class Words, class T>
struct BackwardUnit {
  const VarlenAttn& a;
  const Document& doc;
  BackwardScratch& s;
  int64_t doc_index, range, begin, end;

  // The sums of dq that units of lower key blocks have left, and how many of those units are through.
  float* left_sums(int64_t head, int64_t q) const { return a.dq_sums + (head * a.total_q + doc.q_begin + q) * s.lanes; }
  int32_t* progress(int64_t head, int64_t q) const {
    const int64_t blocks = a.total_q / kBlockRows + a.docs + 1;
    return a.dq_progress + head * blocks + doc.q_begin / kBlockRows + doc_index + q / kBlockRows;
  }

  void prefetch_next(int64_t head, int64_t q) const {
    if (q >= doc.q_count) {  // the unit's next head; the last one's is of another unit, which may be the next
      ++head;
      for (q = 0; q < doc.q_count && doc.last_key(q) <= begin * kBackwardKeys;) q += kBlockRows;
    }
    const int64_t rows = min64(kBlockRows, doc.q_count - q);
    if (head >= a.num_heads) return;
    prefetch_rows<T>(a.q, doc.q_begin + q, head, rows, a.head_dim);
    prefetch_rows<T>(a.dout, doc.q_begin + q, head, rows, a.head_dim_v);
    prefetch_rows<T>(a.out, doc.q_begin + q, head, rows, a.head_dim_v);
  }

  void query_block(int64_t head, int64_t q, int64_t rows) const {
    const int64_t first_key = doc.first_key(q), last_key = doc.last_key(q + rows - 1);
    const int64_t token = doc.q_begin + q;
    if (last_key <= first_key) {  // no row of it may attend to anything
      if (range == 0) zero_tokens<T>(a.dq, token, token + rows, head, head + 1, a.head_dim);
      return;
    }
    const int64_t first = max64(begin, first_key / kBackwardKeys);
    const int64_t last = min64(end, (last_key + kBackwardKeys - 1) / kBackwardKeys);
    if (first >= last) return;
    const bool from_zero = first_key / kBackwardKeys >= begin,
               to_end = (last_key + kBackwardKeys - 1) / kBackwardKeys <= end;
    pack_queries<Words, T>(a, token, head, rows, s);
    prefetch_next(head, q + kBlockRows);
    const int64_t floats = rows * s.lanes;
    if (a.dq.data && !from_zero) {
      while (__atomic_load_n(progress(head, q), __ATOMIC_ACQUIRE) != int32_t(range)) a.yield();
      copy_floats(s.dq, left_sums(head, q), floats);
    }
    for (int64_t block = first; block < last; ++block) {
      const int64_t key = block * kBackwardKeys;
      const BlockMask mask(doc, q, rows, key, min64(kBackwardKeys, doc.k_count - key));
      bool& visited = s.visited[block - begin];
      backward_block<Words>(a, s, mask, key - begin * kBackwardKeys, {from_zero && block == first, !visited});
      visited = true;
    }
    if (!a.dq.data) return;
    if (to_end) {
      for (int64_t r = 0; r < rows; ++r)  // zero times an infinite key is not zero
        for (int64_t i = 0; i < s.lanes && s.lse[r] == __builtin_inff(); ++i) s.dq[r * s.lanes + i] = 0.0f;
      store_rows<T>(a.dq, token, head, rows, a.head_dim, s.dq, s.lanes, a.softmax_scale);
    } else {
      copy_floats(left_sums(head, q), s.dq, floats);
      __atomic_store_n(progress(head, q), int32_t(range + 1), __ATOMIC_RELEASE);
    }
  }

  void run(int64_t kv_head) const {
    const int64_t group = group_size(a), key = begin * kBackwardKeys, key_end = min64(doc.k_count, end * kBackwardKeys);
    pack_keys<Words, T>(a, doc, kv_head, key, key_end, s);
    for (bool& visited : s.visited) visited = false;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t q = 0; q < doc.q_count; q += kBlockRows) query_block(head, q, min64(kBlockRows, doc.q_count - q));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = (block - begin) * kBackwardKeys, token = doc.k_begin + key + at;
      const int64_t keys = min64(kBackwardKeys, key_end - key - at);
      if (s.visited[block - begin]) {
        store_rows<T>(a.dk, token, kv_head, keys, a.head_dim, s.dk + at * s.lanes, s.lanes, a.softmax_scale);
        store_rows<T>(a.dv, token, kv_head, keys, a.head_dim_v, s.dv + at * s.lanes_v, s.lanes_v, 1.0f);
      } else {
        zero_tokens<T>(a.dk, token, token + keys, kv_head, kv_head + 1, a.head_dim);
        zero_tokens<T>(a.dv, token, token + keys, kv_head, kv_head + 1, a.head_dim_v);
      }
    }
  }
};

template <class Words, class T>
void backward(const VarlenAttn& a, int threads) {
  const int64_t blocks = unit_key_blocks(a, threads);
  const int64_t thread_floats = BackwardScratch(a, blocks, Words::kPair, nullptr).used;
  const int64_t units = number_units(a, [&](const Document& doc) { return ranges_of(doc, blocks) * a.num_kv_heads; });
  parallel_dynamic(units, grain_of(units, threads), threads, [&](int rank, int64_t first, int64_t last) {
    BackwardScratch scratch(a, blocks, Words::kPair, a.scratch + rank * thread_floats);
    for (int64_t unit = first; unit < last; ++unit) {
      // Units are handed out in order, so that the one which this one may wait for has always been begun.
      const int64_t position = position_of(a, unit), local = unit - a.first_unit[position];
      const Document doc(a, a.doc_order[position]);
      const int64_t range = local / a.num_kv_heads;
      const BackwardUnit<Words, T> one{a,
                                       doc,
                                       scratch,
                                       a.doc_order[position],
                                       range,
                                       range * blocks,
                                       min64(key_blocks_of(doc), (range + 1) * blocks)};
      one.run(local % a.num_kv_heads);
    }
  });
  zero_tokens<T>(a.dq, a.cu_q[a.docs], a.total_q, 0, a.num_heads, a.head_dim);
  zero_tokens<T>(a.dk, a.cu_k[a.docs], a.total_k, 0, a.num_kv_heads, a.head_dim);
  zero_tokens<T>(a.dv, a.cu_k[a.docs], a.total_k, 0, a.num_kv_heads, a.head_dim_v);
}

void varlen_attn_bwd(const VarlenAttn& a, int threads) {
  if (a.dtype == DType::f32) backward<FloatWords, float>(a, threads);
  if (a.dtype == DType::f16) backward<FloatWords, fp16>(a, threads);
#if defined(__AVX512BF16__)
  if (a.dtype == DType::bf16) backward<PairWords, bf16>(a, threads);
#else
  if (a.dtype == DType::bf16) backward<FloatWords, bf16>(a, threads);
#endif
}

VarlenAttnScratch varlen_attn_scratch(const VarlenAttn& a, bool backward, int threads) {
  if (!backward) return {ForwardScratch(a, nullptr).used * threads, 0, 0};
  const int64_t blocks = unit_key_blocks(a, threads);
  bool shared = false;
  for (int64_t doc = 0; doc < a.docs; ++doc) shared = shared || ranges_of(Document(a, doc), blocks) > 1;
  VarlenAttnScratch need = {BackwardScratch(a, blocks, 2, nullptr).used * threads, 0, 0};
  if (!shared || !a.dq.data) return need;
  need.dq_floats = a.num_heads * a.total_q * round_up(a.head_dim, kLanes);
  need.dq_counters = a.num_heads * (a.total_q / kBlockRows + a.docs + 1);
  return need;
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
