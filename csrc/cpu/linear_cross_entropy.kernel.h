// Cross-entropy over a tile of logits, and the sums over rows around the products with it.
//
//        W [V, H]                one tile of the vocabulary at a time, for all rows of a chunk:
//       ┌────────┐               z = x tile(W)^T                        (the caller's GEMM)
//   x   │ tile j │ ──▶ z, e      e = exp(z - peak_j) / total_j, in z's place
//  rows ├────────┤               (peak, total) merged over tiles as in online softmax
//       │        │               acc = keep * acc + add * (e tile(W))   (the caller's GEMM, combine_rows)
//       └────────┘
//
// The label is left out of e and total. At the end, with E = exp(z[label] - peak) and S = total + E, the loss is
// peak + log S - z[label], and the gradient of a row of x is (acc - total * W[label]) / S: were the label in the 16-bit e,
// the little that a token certain of its label still has to learn would be lost in the rounding of a probability near 1.
// Logits are read and written once, while they are in cache, and one exponential is taken of each. Dividing e by the
// tile's own total bounds the product by the largest weight, so that 16-bit results cannot overflow.
//
// With a softcap c, z becomes c tanh(z / c), and its slope 1 - tanh^2 is multiplied into e and into W[label].
#pragma once
#include "parallel.h"
#include "vec_math.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kChain = 16;  // vectors added up before they join a double: a long chain gathers rounding errors
constexpr int64_t kWorthAThread = 1 << 13;  // elements

inline float exp_of(float x) { return vhmax(vexp(vset(x))); }

// What one row's pass keeps in the first-level cache.
struct RowScratch {
  alignas(64) float z[kCrossEntropyCols + kLanes];
  alignas(64) float slope[kCrossEntropyCols + kLanes];  // of the softcap; untouched without one
};

// z[0, n) = logits of one row, padded to whole vectors with -inf; returns the largest. NaN stays in z and is no maximum.
template <class T, bool kPlain>
inline float load_logits(const T* x, const float* bias, int64_t n, float cap, RowScratch& scratch) {
  const bool capped = !kPlain && cap > 0.0f;
  const Vec scale = vset(cap), one = vset(1.0f);
  const auto load = [&](int64_t i, int lanes) {
    Vec v = lanes == kLanes ? vload(x + i) : vload_n(x + i, lanes);
    if (kPlain) return v;
    if (bias) v = vadd(v, lanes == kLanes ? vload(bias + i) : vload_n(bias + i, lanes));
    if (!capped) return v;
    const Vec t = vtanh(vdiv(v, scale));
    vstore(scratch.slope + i, vsub(one, vmul(t, t)));
    return vmul(scale, t);
  };
  float* z = scratch.z;
  Vec peak = vset(-kInfinity), other = peak;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec a = load(i, kLanes), b = load(i + kLanes, kLanes);
    vstore(z + i, a);
    vstore(z + i + kLanes, b);
    peak = vmax(a, peak);
    other = vmax(b, other);
  }
  for (; i < n; i += kLanes) {
    const int lanes = int(min64(kLanes, n - i));
    vstore(z + i, vset(-kInfinity));
    vstore_n(z + i, load(i, lanes), lanes);
    peak = vmax(vload(z + i), peak);
  }
  return vhmax(vmax(peak, other));
}

// z = exp(z - peak), times the softcap's slope; returns the sum without the slope.
template <bool kCapped>
inline double exponentials(RowScratch& scratch, int64_t n, float peak) {
  float* z = scratch.z;
  const Vec top = vset(peak);
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kChain * kLanes) {
    const int64_t end = min64(n, begin + kChain * kLanes);
    Vec sum = vzero();
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec e = vexp(vsub(vload(z + i), top));
      sum = vadd(sum, e);
      vstore(z + i, kCapped ? vmul(e, vload(scratch.slope + i)) : e);
    }
    total += double(vsum(sum));
  }
  return total;
}

template <class T>
inline void store_scaled(const float* z, int64_t n, float scale, T* out) {
  const Vec factor = vset(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vstore(out + i, vmul(vload(z + i), factor));
  if (i < n) vstore_n(out + i, vmul(vload(z + i), factor), int(n - i));
}

template <class T, bool kPlain>
inline void tile_row(const CrossEntropyTile& p, int64_t row, RowScratch& scratch) {
  T* x = static_cast<T*>(p.logits) + row * p.stride;
  const bool capped = !kPlain && p.softcap > 0.0f;
  const float peak = load_logits<T, kPlain>(x, p.bias, p.cols, p.softcap, scratch);
  const int64_t label = p.targets[row] - p.first;
  if (label >= 0 && label < p.cols) {
    p.picked[row] = scratch.z[label];
    p.slope[row] = capped ? scratch.slope[label] : 1.0f;
    scratch.z[label] = -kInfinity;
  }
  // A tile of nothing but -inf sums to 0 (or to NaN, where it holds one) against any finite peak.
  const bool some = peak > -kInfinity;
  const float top = some ? peak : 0.0f;
  const double total = capped ? exponentials<true>(scratch, p.cols, top) : exponentials<false>(scratch, p.cols, top);
  // Below the smallest normal number the reciprocal would be infinite; such shares are zero beside the label's.
  if (p.write) store_scaled(scratch.z, p.cols, total < 0x1p-126 ? 0.0f : float(1.0 / total), x);
  const float before = p.peak[row], now = before > peak ? before : peak;
  const float keep = before > -kInfinity ? exp_of(before - now) : 0.0f;
  const double add = total * double(some ? exp_of(peak - now) : 1.0f);
  p.peak[row] = now;
  p.total[row] = p.total[row] * double(keep) + add;
  p.keep[row] = keep;
  p.add[row] = float(add);
  if (p.tile_peak) {
    p.tile_peak[row] = peak;
    p.tile_total[row] = float(total);
  }
}

template <class T>
void tile_rows(const CrossEntropyTile& p, int threads) {
  const bool plain = !p.bias && !(p.softcap > 0.0f);
  parallel_for(p.rows, max64(1, kWorthAThread / max64(p.cols, 1)), threads, [&](int64_t begin, int64_t end) {
    RowScratch scratch;
    for (int64_t row = begin; row < end; ++row) {
      if (plain)
        tile_row<T, true>(p, row, scratch);
      else
        tile_row<T, false>(p, row, scratch);
    }
  });
}

void cross_entropy_tile(const CrossEntropyTile& p, int threads) {
  if (p.dtype == DType::f32) tile_rows<float>(p, threads);
  if (p.dtype == DType::f16) tile_rows<fp16>(p, threads);
  if (p.dtype == DType::bf16) tile_rows<bf16>(p, threads);
}

// out[rows[i]] = a[i] * x[i] + b[i] * y[i]. Where a is 0, x is not read: it may hold nothing yet, or a NaN that a
// gradient of zero must not meet.
template <class Out, class X, class Y>
void combine(const RowCombination& p, int threads) {
  parallel_for(p.count, max64(1, kWorthAThread / max64(p.cols, 1)), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Out* out = static_cast<Out*>(p.out) + (p.rows ? p.rows[i] : i) * p.out_stride;
      const X* x = static_cast<const X*>(p.x) + i * p.x_stride;
      const Y* y = static_cast<const Y*>(p.y) + (p.y ? i * p.y_stride : 0);
      const float a = p.a[i * p.a_step], b = p.y ? p.b[i * p.b_step] : 0.0f;
      const Vec va = vset(a), vb = vset(b);
      int64_t k = 0;
      for (; k + kLanes <= p.cols; k += kLanes) {
        Vec sum = a != 0.0f ? vmul(va, vload(x + k)) : vzero();
        if (p.y) sum = vfma(vb, vload(y + k), sum);
        vstore(out + k, sum);
      }
      if (k < p.cols) {
        const int lanes = int(p.cols - k);
        Vec sum = a != 0.0f ? vmul(va, vload_n(x + k, lanes)) : vzero();
        if (p.y) sum = vfma(vb, vload_n(y + k, lanes), sum);
        vstore_n(out + k, sum, lanes);
      }
    }
  });
}

void combine_rows(const RowCombination& p, int threads) {
  if (p.out_dtype == DType::bf16)
    return p.x_dtype == DType::f32 ? combine<bf16, float, bf16>(p, threads) : combine<bf16, bf16, bf16>(p, threads);
  if (p.out_dtype == DType::f16)
    return p.x_dtype == DType::f32 ? combine<fp16, float, fp16>(p, threads) : combine<fp16, fp16, fp16>(p, threads);
  if (p.y_dtype == DType::f32) combine<float, float, float>(p, threads);
  if (p.y_dtype == DType::f16) combine<float, float, fp16>(p, threads);
  if (p.y_dtype == DType::bf16) combine<float, float, bf16>(p, threads);
}

// out[rows[i]] += b[i] * y[i], in the order of i; a row may come more than once, so threads share columns, not rows.
template <class Y>
void add_rows(const RowCombination& p, int threads) {
  parallel_for(p.cols, 4 * kLanes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < p.count; ++i) {
      float* out = static_cast<float*>(p.out) + p.rows[i] * p.out_stride;
      const Y* y = static_cast<const Y*>(p.y) + i * p.y_stride;
      const Vec b = vset(p.b[i * p.b_step]);
      int64_t k = begin;
      for (; k + kLanes <= end; k += kLanes) vstore(out + k, vfma(b, vload(y + k), vload(out + k)));
      if (k < end) {
        const int lanes = int(end - k);
        vstore_n(out + k, vfma(b, vload_n(y + k, lanes), vload_n(out + k, lanes)), lanes);
      }
    }
  });
}

void add_rows_at(const RowCombination& p, int threads) {
  if (p.y_dtype == DType::f32) add_rows<float>(p, threads);
  if (p.y_dtype == DType::f16) add_rows<fp16>(p, threads);
  if (p.y_dtype == DType::bf16) add_rows<bf16>(p, threads);
}

// out[c] += sum of b[i] * y[i, c] over i, in blocks, as one long chain would gather rounding errors.
template <class Y>
void column_sums(const RowCombination& p, int threads) {
  constexpr int64_t kCols = 16 * kLanes, kBlock = 32;
  parallel_for(p.cols, kCols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kCols) {
      const int64_t cols = min64(kCols, end - first), whole = cols / kLanes, rest = cols % kLanes;
      Vec total[17];
      for (Vec& t : total) t = vzero();
      for (int64_t i0 = 0; i0 < p.count; i0 += kBlock) {
        Vec part[17];
        for (Vec& t : part) t = vzero();
        for (int64_t i = i0; i < min64(p.count, i0 + kBlock); ++i) {
          const Y* y = static_cast<const Y*>(p.y) + i * p.y_stride + first;
          const Vec b = vset(p.b[i * p.b_step]);
          for (int64_t v = 0; v < whole; ++v) part[v] = vfma(b, vload(y + v * kLanes), part[v]);
          if (rest) part[whole] = vfma(b, vload_n(y + whole * kLanes, int(rest)), part[whole]);
        }
        for (int v = 0; v < 17; ++v) total[v] = vadd(total[v], part[v]);
      }
      float* out = static_cast<float*>(p.out) + first;
      for (int64_t v = 0; v < whole; ++v) vstore(out + v * kLanes, vadd(vload(out + v * kLanes), total[v]));
      if (rest) {
        float* last = out + whole * kLanes;
        vstore_n(last, vadd(vload_n(last, int(rest)), total[whole]), int(rest));
      }
    }
  });
}

void weighted_column_sums(const RowCombination& p, int threads) {
  if (p.y_dtype == DType::f32) column_sums<float>(p, threads);
  if (p.y_dtype == DType::f16) column_sums<fp16>(p, threads);
  if (p.y_dtype == DType::bf16) column_sums<bf16>(p, threads);
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
