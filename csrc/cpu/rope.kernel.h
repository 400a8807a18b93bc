// Rotary position embedding of all heads of q and k: the halves x1, x2 of a row's first rotary_dim features become
//
//      forward    y1 = x1 c1 - x2 s1,   y2 = x2 c2 + x1 s2       c1, c2 (s1, s2) the halves of the token's cos (sin)
//      backward   dx1 = dy1 c1 + dy2 s2,  dx2 = dy2 c2 - dy1 s1  the transpose
//
// Both are x1' = x1 a + x2 b, x2' = x2 c + x1 d with a table (a, b, c, d) made once per token, in float32, and used for
// every head:
//
//      tokens of a block      table [4, pairs] of each     heads of q, then of k, in the order they have in memory
#pragma once
#include "parallel.h"
#include "rows.kernel.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

constexpr int64_t kRopeTokens = 8;   // tokens in a block
constexpr int64_t kRopePairs = 128;  // pairs of features rotated at a time: what a table holds

// The pairs [begin, begin + pairs) of one token's table.
template <class C>
inline void fill_table(const C* cos, const C* sin, int64_t half, int64_t begin, int64_t pairs, bool backward,
                       float* table) {
  const C* plus = sin + begin + half;
  const C* minus = sin + begin;
  each_vector(pairs, [&](int64_t i, int n) {
    const Vec positive = vload_some(plus + i, n), negative = vsub(vzero(), vload_some(minus + i, n));
    vstore_some(table + i, vload_some(cos + begin + i, n), n);
    vstore_some(table + pairs + i, backward ? positive : negative, n);
    vstore_some(table + 2 * pairs + i, vload_some(cos + begin + half + i, n), n);
    vstore_some(table + 3 * pairs + i, backward ? negative : positive, n);
  });
}

template <class T>
inline void rotate_row(const T* x, T* y, const float* table, int64_t half, int64_t begin, int64_t pairs, bool stream) {
  const T *x1 = x + begin, *x2 = x + half + begin;
  store_two_rows(y + begin, y + half + begin, pairs, stream, [&](int64_t i, int n, Vec* y1) {
    const Vec first = vload_some(x1 + i, n), second = vload_some(x2 + i, n);
    const Vec a = vload_some(table + i, n), b = vload_some(table + pairs + i, n);
    const Vec c = vload_some(table + 2 * pairs + i, n), d = vload_some(table + 3 * pairs + i, n);
    *y1 = vfma(second, b, vmul(first, a));
    return vfma(first, d, vmul(second, c));
  });
}

// What a block does to all heads of one tensor [batch, heads, tokens, head_dim].
template <class T>
void rotate_heads(const TensorView& x, const TensorView& y, int64_t batch, int64_t token, int64_t tokens,
                  const float* tables, int64_t half, int64_t begin, int64_t pairs, bool stream) {
  const T* source = static_cast<const T*>(x.data) + batch * x.strides[0] + token * x.strides[2];
  T* target = static_cast<T*>(y.data) + batch * y.strides[0] + token * y.strides[2];
  const int64_t heads = x.shape[1], passed = x.shape[3] - 2 * half;
  const auto rotate = [&](int64_t head, int64_t t) {
    const T* from = source + head * x.strides[1] + t * x.strides[2];
    T* to = target + head * y.strides[1] + t * y.strides[2];
    rotate_row(from, to, tables + t * 4 * kRopePairs, half, begin, pairs, stream);
    if (begin == 0 && passed > 0) __builtin_memcpy(to + 2 * half, from + 2 * half, uint64_t(passed) * sizeof(T));
  };
  if (y.strides[1] <= y.strides[2]) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t head = 0; head < heads; ++head) rotate(head, t);
  } else {
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t t = 0; t < tokens; ++t) rotate(head, t);
  }
}

template <class T, class C>
void rope_of(const Rope& p, int threads) {
  const int64_t tokens = p.q.shape[2], half = p.cos.shape[2] / 2;
  const int64_t blocks = (tokens + kRopeTokens - 1) / kRopeTokens;
  const bool stream = streams<T>(p.q.shape[0] * p.q.shape[1] * tokens * p.q.shape[3]);
  const int64_t work = kRopeTokens * (p.q.shape[1] + p.k.shape[1]) * p.q.shape[3];
  parallel_for(
      p.q.shape[0] * blocks, max64(1, (int64_t(1) << 14) / max64(work, 1)), threads, [&](int64_t first, int64_t last) {
        alignas(64) float tables[kRopeTokens * 4 * kRopePairs];
        for (int64_t block = first; block < last; ++block) {
          const int64_t batch = block / blocks, token = block % blocks * kRopeTokens;
          const int64_t count = min64(kRopeTokens, tokens - token);
          const C* cos = static_cast<const C*>(p.cos.data) + batch * p.cos.strides[0] + token * p.cos.strides[1];
          const C* sin = static_cast<const C*>(p.sin.data) + batch * p.sin.strides[0] + token * p.sin.strides[1];
          for (int64_t begin = 0; begin < half; begin += kRopePairs) {
            const int64_t pairs = min64(kRopePairs, half - begin);
            for (int64_t t = 0; t < count; ++t)
              fill_table(cos + t * p.cos.strides[1], sin + t * p.sin.strides[1], half, begin, pairs, p.backward,
                         tables + t * 4 * kRopePairs);
            rotate_heads<T>(p.q, p.q_out, batch, token, count, tables, half, begin, pairs, stream);
            rotate_heads<T>(p.k, p.k_out, batch, token, count, tables, half, begin, pairs, stream);
          }
        }
        if (stream) vfence();
      });
}

template <class T>
void rope_in(const Rope& p, int threads) {
  if (p.table_dtype == DType::f32) rope_of<T, float>(p, threads);
  if (p.table_dtype == DType::f16) rope_of<T, fp16>(p, threads);
  if (p.table_dtype == DType::bf16) rope_of<T, bf16>(p, threads);
}

void rope(const Rope& p, int threads) {
  if (p.dtype == DType::f32) rope_in<float>(p, threads);
  if (p.dtype == DType::f16) rope_in<fp16>(p, threads);
  if (p.dtype == DType::bf16) rope_in<bf16>(p, threads);
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
