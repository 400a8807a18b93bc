// y = x W^T for at most 32 rows of x and a weight in 4 bits:
//
//      x [m, k], packed once          four rows of W, kDepth columns at a time
//      ┌──────────────┐               ┌──────────────┐   decoded into a 1st-level-cache scratch, then every row of x
//      └──────────────┘               └──────────────┘   is multiplied with it; 4 x MB accumulators stay in registers
//
// A library GEMM would need the whole decoded weight, 4 times the bytes of the codes, before its first multiply.
#pragma once
#include "nf4.kernel.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

constexpr int kRows = 4;      // rows of W in a group
constexpr int kDepth = 1024;  // columns decoded at a time: a multiple of every step below
constexpr int kBlockM = 6;    // rows of x in registers

#if defined(__AVX512BF16__)
constexpr bool kPacksBf16 = true;
#else
constexpr bool kPacksBf16 = false;
#endif

// acc[row][m] += dot of `depth` columns (a multiple of the step) of one scratch row with one row of x, in vector lanes.
template <int MB, class T>
inline void dot_block(const T* scratch, const float* x, int64_t x_stride, int depth, Vec (*acc)[kSmallMatmulRows]) {
  constexpr int kSegment = 64 * kLanes;  // short chains: with one lane a single sum would gather rounding errors
  for (int begin = 0; begin < depth; begin += kSegment) {
    const int end = int(min64(depth, begin + kSegment));
    Vec sum[kRows][MB];
    for (int r = 0; r < kRows; ++r)
      for (int m = 0; m < MB; ++m) sum[r][m] = vzero();
    for (int k = begin; k < end; k += kLanes) {
      Vec w[kRows];
      for (int r = 0; r < kRows; ++r) w[r] = vload(scratch + r * kDepth + k);
      for (int m = 0; m < MB; ++m) {
        const Vec xm = vload(x + m * x_stride + k);
        for (int r = 0; r < kRows; ++r) sum[r][m] = vfma(w[r], xm, sum[r][m]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int m = 0; m < MB; ++m) acc[r][m] = vadd(acc[r][m], sum[r][m]);
  }
}

#if defined(__AVX512BF16__)
template <int MB>
inline void dot_block(const bf16* scratch, const bf16* x, int64_t x_stride, int depth, Vec (*acc)[kSmallMatmulRows]) {
  Vec sum[kRows][MB];
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < MB; ++m) sum[r][m] = acc[r][m];
  for (int k = 0; k < depth; k += 32) {
    __m512bh w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = (__m512bh)_mm512_loadu_si512(scratch + r * kDepth + k);
    for (int m = 0; m < MB; ++m) {
      const __m512bh xm = (__m512bh)_mm512_loadu_si512(x + m * x_stride + k);
      for (int r = 0; r < kRows; ++r) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], w[r], xm);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < MB; ++m) acc[r][m] = sum[r][m];
}
#endif

// The register-blocked product needs MB at compile time; the last block of rows of x may be shorter.
template <class T, class X>
inline void dot_rows(const T* scratch, const X* x, int64_t x_stride, int m_count, int depth,
                     Vec (*acc)[kSmallMatmulRows]) {
  int m = 0;
  for (; m + kBlockM <= m_count; m += kBlockM)
    dot_block<kBlockM>(scratch, x + m * x_stride, x_stride, depth, (Vec(*)[kSmallMatmulRows])(&acc[0][m]));
  const X* rest = x + m * x_stride;
  auto* rest_acc = (Vec(*)[kSmallMatmulRows])(&acc[0][m]);
  switch (m_count - m) {
    case 1: dot_block<1>(scratch, rest, x_stride, depth, rest_acc); break;
    case 2: dot_block<2>(scratch, rest, x_stride, depth, rest_acc); break;
    case 3: dot_block<3>(scratch, rest, x_stride, depth, rest_acc); break;
    case 4: dot_block<4>(scratch, rest, x_stride, depth, rest_acc); break;
    case 5: dot_block<5>(scratch, rest, x_stride, depth, rest_acc); break;
    default: break;
  }
}

#if defined(__AVX512BF16__)
constexpr int kFusedRows = 4;  // up to here decoded words go from register to dot product, without a scratch

// One row of W, whole blocks only: sums[m] = dot(W[n], x[m]).
template <int MB>
inline void fused_row(const Packed4bit& w, int64_t flat, int64_t depth, const bf16* x, int64_t x_stride, bool plain,
                      float* sums) {
  Vec even[MB], odd[MB];  // two chains hide the latency of the dot product
  for (int m = 0; m < MB; ++m) even[m] = odd[m] = vzero();
  const int64_t block_size = int64_t(1) << w.block_shift;
  for (int64_t k = 0; k < depth; k += block_size) {
    const auto table = make_table<bf16>(w.quant_map, block_scale(w, (flat + k) >> w.block_shift), plain);
    const uint8_t* bytes = w.codes + ((flat + k) >> 1);
    int64_t j = 0;
    for (; j + 64 <= block_size; j += 64) {
      const __m512bh w0 = (__m512bh)decode_32(table, bytes + (j >> 1));
      const __m512bh w1 = (__m512bh)decode_32(table, bytes + (j >> 1) + 16);
      for (int m = 0; m < MB; ++m) {
        const bf16* xm = x + m * x_stride + k + j;
        even[m] = _mm512_dpbf16_ps(even[m], w0, (__m512bh)_mm512_loadu_si512(xm));
        odd[m] = _mm512_dpbf16_ps(odd[m], w1, (__m512bh)_mm512_loadu_si512(xm + 32));
      }
    }
    if (j < block_size) {  // block size 32
      const __m512bh w0 = (__m512bh)decode_32(table, bytes);
      for (int m = 0; m < MB; ++m)
        even[m] = _mm512_dpbf16_ps(even[m], w0, (__m512bh)_mm512_loadu_si512(x + m * x_stride + k));
    }
  }
  for (int m = 0; m < MB; ++m) sums[m] = vsum(vadd(even[m], odd[m]));
}

// The fewest rows of x, where decoding is the work. False when a row of W is not made of whole blocks.
inline bool fused_matmul(const Packed4bit& w, const SmallMatmul& p, int threads) {
  if (p.m > kFusedRows || (p.k & ((int64_t(1) << w.block_shift) - 1)) != 0) return false;
  const bf16* x = static_cast<const bf16*>(p.x_rows);
  const bf16* bias = static_cast<const bf16*>(p.bias);
  bf16* y = static_cast<bf16*>(p.y);
  const bool plain = plain_map(w.quant_map);
  parallel_for(p.n, 16, threads, [&](int64_t begin, int64_t end) {
    float sums[kFusedRows];
    for (int64_t n = begin; n < end; ++n) {
      if (p.m == 1) fused_row<1>(w, n * p.k, p.k, x, p.x_stride, plain, sums);
      if (p.m == 2) fused_row<2>(w, n * p.k, p.k, x, p.x_stride, plain, sums);
      if (p.m == 3) fused_row<3>(w, n * p.k, p.k, x, p.x_stride, plain, sums);
      if (p.m == 4) fused_row<4>(w, n * p.k, p.k, x, p.x_stride, plain, sums);
      const float b = bias ? to_float(bias[n]) : 0.0f;
      for (int64_t m = 0; m < p.m; ++m) y[m * p.y_stride + n] = from_float<bf16>(sums[m] + b);
    }
  });
  return true;
}
#endif

template <class T, class X>
void small_matmul(const Packed4bit& w, const SmallMatmul& p, int threads) {
  const X* x = static_cast<const X*>(p.x_rows);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  parallel_for(p.n, kRows, threads, [&](int64_t begin, int64_t end) {
    alignas(64) T scratch[kRows * kDepth];
    alignas(64) Vec acc[kRows][kSmallMatmulRows];
    for (int64_t n = begin; n < end; n += kRows) {
      const int rows = int(min64(kRows, end - n));
      for (int r = 0; r < kRows; ++r)
        for (int m = 0; m < p.m; ++m) acc[r][m] = vzero();
      for (int64_t k = 0; k < p.k; k += kDepth) {
        const int depth = int(min64(kDepth, p.k - k));
        const int padded = int((depth + kSmallMatmulPad - 1) / kSmallMatmulPad * kSmallMatmulPad);
        for (int r = 0; r < kRows; ++r) {
          T* row = scratch + r * kDepth;
          const int64_t flat = (n + (r < rows ? r : 0)) * p.k + k;
          decode_range(w, flat, flat + depth, row, false);
          for (int i = depth; i < padded; ++i) row[i] = from_float<T>(0.0f);
        }
        dot_rows(scratch, x + k, p.x_stride, int(p.m), padded, acc);
      }
      for (int r = 0; r < rows; ++r) {
        const float b = bias ? to_float(bias[n + r]) : 0.0f;
        for (int64_t m = 0; m < p.m; ++m) y[m * p.y_stride + n + r] = from_float<T>(vsum(acc[r][m]) + b);
      }
    }
  });
}

void small_matmul_4bit(const Packed4bit& w, const SmallMatmul& p, int threads) {
  if (p.dtype == DType::f32) small_matmul<float, float>(w, p, threads);
  if (p.dtype == DType::f16) small_matmul<fp16, float>(w, p, threads);
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bf16 && !fused_matmul(w, p, threads)) small_matmul<bf16, bf16>(w, p, threads);
#else
  if (p.dtype == DType::bf16) small_matmul<bf16, float>(w, p, threads);
#endif
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
