// Packed attention, in its plainest form.
#pragma once
#include "parallel.h"
#include "vec_math.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

int64_t varlen_attn_scratch(const VarlenAttn& a, bool) {
  int64_t longest = 0;
  for (int64_t d = 0; d < a.docs; ++d) longest = max64(longest, a.cu_k[d + 1] - a.cu_k[d]);
  return (longest * (2 + a.head_dim + a.head_dim_v) + a.head_dim + a.head_dim_v + 15) / 16 * 16;
}

template <class T>
inline T* head_row(const HeadsView& x, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

inline float scalar_exp(float x) { return vsum(vmul(vexp(vset(x)), vset(1.0f / kLanes))); }
inline float scalar_tanh(float x) {
  const float e = scalar_exp(-2.0f * (x < 0 ? -x : x));
  const float t = (1.0f - e) / (1.0f + e);
  return x < 0 ? -t : t;
}
inline float scalar_log(float x) { return __builtin_logf(x); }

template <class T>
inline float dot_rows_of(const T* a, const T* b, int64_t n) {
  float s = 0;
  for (int64_t i = 0; i < n; ++i) s += to_float(a[i]) * to_float(b[i]);
  return s;
}

template <class T>
void zero_rows(const HeadsView& x, int64_t begin, int64_t end, int64_t heads, int64_t dim) {
  if (!x.data) return;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < dim; ++c) head_row<T>(x, t, h)[c] = from_float<T>(0.0f);
}

template <class T>
void plain_forward(const VarlenAttn& a, int threads) {
  const int64_t group = a.num_heads / a.num_kv_heads, d = a.head_dim, dv = a.head_dim_v;
  parallel_dynamic(a.docs * a.num_heads, 1, threads, [&](int rank, int64_t begin, int64_t) {
    const int64_t doc = a.doc_order[begin / a.num_heads], h = begin % a.num_heads, hk = h / group;
    const int64_t q0 = a.cu_q[doc], lq = a.cu_q[doc + 1] - q0, k0 = a.cu_k[doc], lk = a.cu_k[doc + 1] - k0;
    float* s = a.scratch + rank * a.thread_scratch;
    float* o = s + lk;
    for (int64_t i = 0; i < lq; ++i) {
      const int64_t p = i + lk - lq, lo = max64(0, p - a.window_left), hi = min64(lk - 1, p + a.window_right);
      float m = -__builtin_inff(), l = 0;
      for (int64_t j = lo; j <= hi; ++j) {
        s[j] = a.softmax_scale * dot_rows_of(head_row<T>(a.q, q0 + i, h), head_row<T>(a.k, k0 + j, hk), d);
        if (a.softcap > 0) s[j] = a.softcap * scalar_tanh(s[j] / a.softcap);
        if (!(s[j] <= m)) m = s[j];
      }
      for (int64_t c = 0; c < dv; ++c) o[c] = 0;
      for (int64_t j = lo; j <= hi; ++j) {
        const float e = scalar_exp(s[j] - m);
        l += e;
        for (int64_t c = 0; c < dv; ++c) o[c] += e * to_float(head_row<T>(a.v, k0 + j, hk)[c]);
      }
      a.lse[h * a.total_q + q0 + i] = lo > hi ? -__builtin_inff() : m + scalar_log(l);
      for (int64_t c = 0; c < dv; ++c) head_row<T>(a.out, q0 + i, h)[c] = from_float<T>(lo > hi ? 0.0f : o[c] / l);
    }
  });
  zero_rows<T>(a.out, a.cu_q[a.docs], a.total_q, a.num_heads, dv);
  for (int64_t h = 0; h < a.num_heads; ++h)
    for (int64_t t = a.cu_q[a.docs]; t < a.total_q; ++t) a.lse[h * a.total_q + t] = -__builtin_inff();
}

template <class T>
void plain_backward(const VarlenAttn& a, int threads) {
  const int64_t group = a.num_heads / a.num_kv_heads, d = a.head_dim, dv = a.head_dim_v;
  parallel_dynamic(a.docs * a.num_kv_heads, 1, threads, [&](int rank, int64_t begin, int64_t) {
    const int64_t doc = a.doc_order[begin / a.num_kv_heads], hk = begin % a.num_kv_heads;
    const int64_t q0 = a.cu_q[doc], lq = a.cu_q[doc + 1] - q0, k0 = a.cu_k[doc], lk = a.cu_k[doc + 1] - k0;
    float* dkacc = a.scratch + rank * a.thread_scratch;
    float* dvacc = dkacc + lk * d;
    float* dqacc = dvacc + lk * dv;
    for (int64_t i = 0; i < lk * (d + dv); ++i) dkacc[i] = 0;
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t i = 0; i < lq; ++i) {
        const T* q = head_row<T>(a.q, q0 + i, h);
        const T* dout = head_row<T>(a.dout, q0 + i, h);
        const float delta = dot_rows_of(dout, head_row<T>(a.out, q0 + i, h), dv);
        const float lse = a.lse[h * a.total_q + q0 + i];
        const int64_t p = i + lk - lq, lo = max64(0, p - a.window_left), hi = min64(lk - 1, p + a.window_right);
        for (int64_t c = 0; c < d; ++c) dqacc[c] = 0;
        for (int64_t j = lo; j <= hi; ++j) {
          const T* k = head_row<T>(a.k, k0 + j, hk);
          float s = a.softmax_scale * dot_rows_of(q, k, d), slope = a.softmax_scale;
          if (a.softcap > 0) {
            const float t = scalar_tanh(s / a.softcap);
            s = a.softcap * t;
            slope *= 1 - t * t;
          }
          const float e = scalar_exp(s - lse);
          const float ds = slope * e * (dot_rows_of(dout, head_row<T>(a.v, k0 + j, hk), dv) - delta);
          for (int64_t c = 0; c < d; ++c) dqacc[c] += ds * to_float(k[c]);
          for (int64_t c = 0; c < d; ++c) dkacc[j * d + c] += ds * to_float(q[c]);
          for (int64_t c = 0; c < dv; ++c) dvacc[j * dv + c] += e * to_float(dout[c]);
        }
        if (a.dq.data)
          for (int64_t c = 0; c < d; ++c) head_row<T>(a.dq, q0 + i, h)[c] = from_float<T>(dqacc[c]);
      }
    for (int64_t j = 0; j < lk; ++j) {
      if (a.dk.data)
        for (int64_t c = 0; c < d; ++c) head_row<T>(a.dk, k0 + j, hk)[c] = from_float<T>(dkacc[j * d + c]);
      if (a.dv.data)
        for (int64_t c = 0; c < dv; ++c) head_row<T>(a.dv, k0 + j, hk)[c] = from_float<T>(dvacc[j * dv + c]);
    }
  });
  zero_rows<T>(a.dq, a.cu_q[a.docs], a.total_q, a.num_heads, d);
  zero_rows<T>(a.dk, a.cu_k[a.docs], a.total_k, a.num_kv_heads, d);
  zero_rows<T>(a.dv, a.cu_k[a.docs], a.total_k, a.num_kv_heads, dv);
}

void varlen_attn(const VarlenAttn& a, int threads) {
  if (a.dtype == DType::f32) plain_forward<float>(a, threads);
  if (a.dtype == DType::f16) plain_forward<fp16>(a, threads);
  if (a.dtype == DType::bf16) plain_forward<bf16>(a, threads);
}

void varlen_attn_bwd(const VarlenAttn& a, int threads) {
  if (a.dtype == DType::f32) plain_backward<float>(a, threads);
  if (a.dtype == DType::f16) plain_backward<fp16>(a, threads);
  if (a.dtype == DType::bf16) plain_backward<bf16>(a, threads);
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
