// Gated linear units: h = f(gate) up, and dgate = dout up f'(gate), dup = dout f(gate), each in one pass over memory.
//
//      silu        f = x s,    f' = s + x s (1 - s),          s = sigmoid(x)
//      gelu_tanh   f = x s,    f' = s + x s (1 - s) u',       s = sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
//      gelu        f = x P,    f' = P + x p,                  P and p the normal distribution and its density
#pragma once
#include "parallel.h"
#include "rows.kernel.h"
#include "vec_math.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

constexpr float kTanhLinear = 1.59576912160573071f;  // 2 sqrt(2 / pi)
constexpr float kTanhCubic = 0.0713548162726f;       // that times 0.044715

// f(x), and f'(x), whose instructions vanish where it is not used.
template <Activation A, bool kRough>
inline Vec activate(Vec x, Vec* slope) {
  if (A == Activation::gelu) {
    Vec density;
    const Vec cumulative = kRough ? vnormal_rough(x, &density) : vnormal(x, &density);
    *slope = vfma(x, density, cumulative);
    return vmul(x, cumulative);
  }
  const Vec square = vmul(x, x);
  const Vec inner = A == Activation::silu ? x : vmul(x, vfma(square, vset(kTanhCubic), vset(kTanhLinear)));
  Vec complement;
  const Vec s = kRough ? vsigmoid_rough(inner, &complement) : vsigmoid(inner, &complement), value = vmul(x, s);
  const Vec steep = vmul(value, vfma(square, vset(3.0f * kTanhCubic), vset(kTanhLinear)));
  *slope = vfma(A == Activation::silu ? value : steep, complement, s);
  return value;
}

// Calls f(row_begin, row_end, begin, end) on the columns [begin, end) of rows, all of them, spread over the threads.
constexpr int64_t kGluBlock = 1 << 14;

template <class F>
void each_piece(int64_t rows, int64_t cols, int threads, const F& f) {
  const int64_t blocks = (cols + kGluBlock - 1) / kGluBlock;
  const int64_t grain = max64(1, kGluBlock / cols);
  parallel_for(rows * blocks, grain, threads, [&](int64_t begin, int64_t end) {
    // Whole rows in the middle, and pieces of one at either end.
    for (int64_t unit = begin; unit < end;) {
      const int64_t row = unit / blocks, block = unit % blocks;
      if (blocks == 1) {
        f(row, end, int64_t(0), cols);
        return;
      }
      const int64_t last = min64(blocks, block + end - unit);
      f(row, row + 1, block * kGluBlock, min64(cols, last * kGluBlock));
      unit += last - block;
    }
  });
}

template <class T, Activation A>
void glu_of(const Glu& p, int threads) {
  constexpr bool kRough = sizeof(T) == 2;
  const bool stream = streams<T>(p.rows * p.cols);
  each_piece(p.rows, p.cols, threads, [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    RowCursor gate_cursor(p.gate, row_begin), up_cursor(p.up, row_begin);
    for (int64_t row = row_begin; row < row_end; ++row, gate_cursor.next(), up_cursor.next()) {
      const T* gate = gate_cursor.row<T>() + begin;
      const T* up = up_cursor.row<T>() + begin;
      store_row(static_cast<T*>(p.out) + row * p.cols + begin, end - begin, stream, [&](int64_t i, int n) {
        Vec slope;
        return vmul(activate<A, kRough>(vload_some(gate + i, n), &slope), vload_some(up + i, n));
      });
    }
    if (stream) vfence();
  });
}

template <class T, Activation A>
void glu_bwd_of(const GluBwd& p, int threads) {
  constexpr bool kRough = sizeof(T) == 2;
  const bool stream = streams<T>(p.rows * p.cols);
  each_piece(p.rows, p.cols, threads, [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    RowCursor dout_cursor(p.dout, row_begin), gate_cursor(p.gate, row_begin), up_cursor(p.up, row_begin);
    for (int64_t row = row_begin; row < row_end; ++row, dout_cursor.next(), gate_cursor.next(), up_cursor.next()) {
      const T* dout = dout_cursor.row<T>() + begin;
      const T* gate = gate_cursor.row<T>() + begin;
      const T* up = up_cursor.row<T>() + begin;
      const int64_t first = row * p.cols + begin;
      T *dgate = static_cast<T*>(p.dgate) + first, *dup = static_cast<T*>(p.dup) + first;
      store_two_rows(dgate, dup, end - begin, stream, [&](int64_t i, int n, Vec* gate_grad) {
        Vec slope;
        const Vec value = activate<A, kRough>(vload_some(gate + i, n), &slope), g = vload_some(dout + i, n);
        *gate_grad = vmul(vmul(g, vload_some(up + i, n)), slope);
        return vmul(g, value);
      });
    }
    if (stream) vfence();
  });
}

template <class T>
void glu_in(const Glu& p, int threads) {
  if (p.activation == Activation::silu) glu_of<T, Activation::silu>(p, threads);
  if (p.activation == Activation::gelu_tanh) glu_of<T, Activation::gelu_tanh>(p, threads);
  if (p.activation == Activation::gelu) glu_of<T, Activation::gelu>(p, threads);
}

template <class T>
void glu_bwd_in(const GluBwd& p, int threads) {
  if (p.activation == Activation::silu) glu_bwd_of<T, Activation::silu>(p, threads);
  if (p.activation == Activation::gelu_tanh) glu_bwd_of<T, Activation::gelu_tanh>(p, threads);
  if (p.activation == Activation::gelu) glu_bwd_of<T, Activation::gelu>(p, threads);
}

void glu(const Glu& p, int threads) {
  if (p.dtype == DType::f32) glu_in<float>(p, threads);
  if (p.dtype == DType::f16) glu_in<fp16>(p, threads);
  if (p.dtype == DType::bf16) glu_in<bf16>(p, threads);
}

void glu_bwd(const GluBwd& p, int threads) {
  if (p.dtype == DType::f32) glu_bwd_in<float>(p, threads);
  if (p.dtype == DType::f16) glu_bwd_in<fp16>(p, threads);
  if (p.dtype == DType::bf16) glu_bwd_in<bf16>(p, threads);
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
