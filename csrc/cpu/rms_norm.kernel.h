// Root-mean-square normalisation, each row in one visit: the statistics, then the products while the row is in cache.
//
//      forward    y = x r g,  r = 1 / sqrt(mean(x^2) + eps),  g = offset + weight;  x + residual in x's place, if any
//      backward   dx = r (g dy - x r m) + dsum,  m = mean(g dy x r);  d_weight = sum over rows of dy x r
//
// d_weight is summed in float32 in three short steps that rows alone determine, whatever the number of threads:
//
//      rows of a unit, kRmsNormChunk at a time -> sums [cols] -> the unit's partial [cols] -> all units in order
#pragma once
#include "parallel.h"
#include "rows.kernel.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

template <class W>
inline void fill_gain(const W* weight, float offset, float* gain, int64_t cols) {
  each_vector(cols, [&](int64_t i, int n) { vstore_some(gain + i, vadd(vset(offset), vload_some(weight + i, n)), n); });
}

inline void fill_gain(const void* weight, DType dtype, float offset, float* gain, int64_t cols) {
  if (dtype == DType::f32) fill_gain(static_cast<const float*>(weight), offset, gain, cols);
  if (dtype == DType::f16) fill_gain(static_cast<const fp16*>(weight), offset, gain, cols);
  if (dtype == DType::bf16) fill_gain(static_cast<const bf16*>(weight), offset, gain, cols);
}

// Rows that a thread takes at least, so that small inputs do not pay for waking others up.
inline int64_t row_grain(int64_t cols) { return max64(1, (int64_t(1) << 15) / cols); }

template <class T>
void rms_norm_of(const RmsNorm& p, int threads) {
  const int64_t cols = p.cols;
  const float* gain = p.gain;
  const bool stream = streams<T>(p.rows * cols);
  parallel_for(p.rows, row_grain(cols), threads, [&](int64_t begin, int64_t end) {
    RowCursor x_cursor(p.x, begin), residual_cursor(p.residual, begin);
    for (int64_t row = begin; row < end; ++row, x_cursor.next(), residual_cursor.next()) {
      const T* x = x_cursor.row<T>();
      if (p.total) {
        const T* residual = residual_cursor.row<T>();
        T* total = static_cast<T*>(p.total) + row * cols;
        each_vector(cols, [&](int64_t i, int n) {
          vstore_some(total + i, vadd(vload_some(x + i, n), vload_some(residual + i, n)), n);
        });
        x = total;  // the stream is what it was rounded to
      }
      const float squares = row_sum(cols, [&](int64_t i, int n, Vec sum) {
        const Vec v = vload_some(x + i, n);
        return vfma(v, v, sum);
      });
      const float rstd = 1.0f / __builtin_sqrtf(squares / float(cols) + p.eps);
      p.rstd[row] = rstd;
      T* y = static_cast<T*>(p.y) + row * cols;
      const Vec r = vset(rstd);
      store_row(y, cols, stream,
                [&](int64_t i, int n) { return vmul(vmul(vload_some(x + i, n), r), vload_some(gain + i, n)); });
    }
    if (stream) vfence();
  });
}

void rms_norm(const RmsNorm& p, int threads) {
  fill_gain(p.weight, p.weight_dtype, p.offset, p.gain, p.cols);
  if (p.dtype == DType::f32) rms_norm_of<float>(p, threads);
  if (p.dtype == DType::f16) rms_norm_of<fp16>(p, threads);
  if (p.dtype == DType::bf16) rms_norm_of<bf16>(p, threads);
}

// Rows [begin, end); adds their part of d_weight to `sums` where there are any.
template <class T, bool kWithSum, bool kWithWeight>
void rms_norm_bwd_rows(const RmsNormBwd& p, int64_t begin, int64_t end, float* sums) {
  const int64_t cols = p.cols;
  const float* gain = p.gain;
  const bool stream = streams<T>(p.rows * cols);
  RowCursor x_cursor(p.x, begin), dout_cursor(p.dout, begin), dsum_cursor(p.dsum, begin);
  for (int64_t row = begin; row < end; ++row, x_cursor.next(), dout_cursor.next(), dsum_cursor.next()) {
    const T* x = x_cursor.row<T>();
    const T* dout = dout_cursor.row<T>();
    const T* dsum = dsum_cursor.row<T>();
    const float rstd = p.rstd[row];
    const Vec r = vset(rstd);
    if (!p.dx) {
      each_vector(cols, [&](int64_t i, int n) {
        const Vec normal = vmul(vload_some(x + i, n), r);
        vstore_some(sums + i, vfma(vload_some(dout + i, n), normal, vload_some(sums + i, n)), n);
      });
      continue;
    }
    const float dot = row_sum(cols, [&](int64_t i, int n, Vec sum) {
      return vfma(vmul(vload_some(dout + i, n), vload_some(gain + i, n)), vload_some(x + i, n), sum);
    });
    const Vec mean = vset(dot * rstd / float(cols));
    T* dx = static_cast<T*>(p.dx) + row * cols;
    store_row(dx, cols, stream, [&](int64_t i, int n) {
      const Vec g = vload_some(dout + i, n), normal = vmul(vload_some(x + i, n), r);
      if (kWithWeight) vstore_some(sums + i, vfma(g, normal, vload_some(sums + i, n)), n);
      const Vec grad = vmul(r, vsub(vmul(g, vload_some(gain + i, n)), vmul(normal, mean)));
      return kWithSum ? vadd(grad, vload_some(dsum + i, n)) : grad;
    });
  }
  if (stream) vfence();
}

template <class W>
void sum_units(const float* partial, int64_t units, int64_t cols, W* dweight, int threads) {
  parallel_for(cols, 4096, threads, [&](int64_t begin, int64_t end) {
    each_vector(end - begin, [&](int64_t j, int n) {
      const int64_t i = begin + j;
      Vec sum = vzero();
      for (int64_t unit = 0; unit < units; ++unit) sum = vadd(sum, vload_some(partial + unit * 2 * cols + i, n));
      vstore_some(dweight + i, sum, n);
    });
  });
}

template <class T, bool kWithSum>
void rms_norm_bwd_of(const RmsNormBwd& p, int threads) {
  if (!p.dweight) {
    parallel_for(p.rows, row_grain(p.cols), threads,
                 [&](int64_t begin, int64_t end) { rms_norm_bwd_rows<T, kWithSum, false>(p, begin, end, nullptr); });
    return;
  }
  const int64_t grain = max64(1, row_grain(p.cols) / p.unit_rows);
  parallel_for(p.units, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      float* partial = p.scratch + unit * 2 * p.cols;
      float* sums = partial + p.cols;
      const auto clear = [&](float* target) {
        each_vector(p.cols, [&](int64_t i, int n) { vstore_some(target + i, vzero(), n); });
      };
      clear(partial);
      const int64_t end = min64(p.rows, (unit + 1) * p.unit_rows);
      for (int64_t row = unit * p.unit_rows; row < end; row += kRmsNormChunk) {
        clear(sums);
        rms_norm_bwd_rows<T, kWithSum, true>(p, row, min64(end, row + kRmsNormChunk), sums);
        each_vector(p.cols, [&](int64_t i, int n) {
          vstore_some(partial + i, vadd(vload_some(partial + i, n), vload_some(sums + i, n)), n);
        });
      }
    }
  });
  const DType dtype = p.weight_dtype;
  if (dtype == DType::f32) sum_units(p.scratch, p.units, p.cols, static_cast<float*>(p.dweight), threads);
  if (dtype == DType::f16) sum_units(p.scratch, p.units, p.cols, static_cast<fp16*>(p.dweight), threads);
  if (dtype == DType::bf16) sum_units(p.scratch, p.units, p.cols, static_cast<bf16*>(p.dweight), threads);
}

template <class T>
void rms_norm_bwd_of(const RmsNormBwd& p, int threads) {
  if (p.dsum.data)
    rms_norm_bwd_of<T, true>(p, threads);
  else
    rms_norm_bwd_of<T, false>(p, threads);
}

void rms_norm_bwd(const RmsNormBwd& p, int threads) {
  fill_gain(p.weight, p.weight_dtype, p.offset, p.gain, p.cols);
  if (p.dtype == DType::f32) rms_norm_bwd_of<float>(p, threads);
  if (p.dtype == DType::f16) rms_norm_bwd_of<fp16>(p, threads);
  if (p.dtype == DType::bf16) rms_norm_bwd_of<bf16>(p, threads);
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
