// What DoRA adds to a LoRA linear: the norms of the merged rows, and the pass over dout in front of its backward.
//
//   ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T        W is read once, B A is never formed
#pragma once
#include "lora_thin.kernel.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {
namespace thin {

// 2 s b . cross + s^2 b G b^T of one row, where cross = A w and G = A A^T.
inline float low_rank_square(const DoraNorms& p, int64_t row) {
  const float *b = p.b + row * p.r, *cross = p.cross + row * p.r;
  const Vec scaling = vset(float(p.scaling));
  Vec total = vzero();
  for (int64_t j = 0; j < p.r; j += kLanes) {
    const int n = int(min64(kLanes, p.r - j));
    Vec bg = vzero();
    for (int64_t i = 0; i < p.r; ++i) bg = vfma(vset(b[i]), load_some(p.gram + i * p.r + j, n), bg);
    const Vec twice = load_some(cross + j, n);
    total = vfma(load_some(b + j, n), vfma(scaling, bg, vadd(twice, twice)), total);
  }
  return float(p.scaling) * vsum(total);
}

template <class T>
inline float row_square(const T* row, int64_t cols) {
  Vec sum0 = vzero(), sum1 = vzero();  // two chains hide the latency of the multiply-add
  int64_t k = 0;
  for (; k + 2 * kLanes <= cols; k += 2 * kLanes) {
    const Vec x0 = vload(row + k), x1 = vload(row + k + kLanes);
    sum0 = vfma(x0, x0, sum0);
    sum1 = vfma(x1, x1, sum1);
  }
  float total = vsum(vadd(sum0, sum1));
  for (; k < cols; ++k) total += to_float(row[k]) * to_float(row[k]);
  return total;
}

#if defined(__AVX512BF16__)
inline float row_square(const bf16* row, int64_t cols) {
  Vec sum0 = vzero(), sum1 = vzero();
  int64_t k = 0;
  for (; k + 64 <= cols; k += 64) {
    const __m512bh x0 = right_unit(row + k), x1 = right_unit(row + k + 32);
    sum0 = multiply_add(x0, x0, sum0);
    sum1 = multiply_add(x1, x1, sum1);
  }
  float total = vsum(vadd(sum0, sum1));
  for (; k < cols; ++k) total += to_float(row[k]) * to_float(row[k]);
  return total;
}
#endif

template <int NV>
struct CrossDone {
  static constexpr bool kDirect = false;
  const DoraNorms& p;
  void block(int64_t row, int rows, int64_t column, const float* sums) const {
    for (int m = 0; m < rows; ++m)
      for (int64_t c = 0; c < min64(NV * kLanes, p.r - column); ++c)
        p.cross[(row + m) * p.r + column + c] = sums[m * NV * kLanes + c];
  }
};

template <class T>
void norms_of(const DoraNorms& p, int threads) {
  using P = Panel<T>;
  P* packed = static_cast<P*>(p.packed);
  const T* w = static_cast<const T*>(p.w);
  const int vectors = strip_vectors(p.r);
  const int64_t width = vectors * kLanes, strips = (p.r + width - 1) / width;
  pack_operand(p.a, p.k, p.r, width, packed, threads);
  with_vectors(vectors, [&](auto constant) {
    constexpr int NV = decltype(constant)::value;
    parallel_for(p.n, kRowGrain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk += kRowGrain) {
        const int64_t stop = min64(end, chunk + kRowGrain);
        multiply_rows<T, NV>({w, p.w_stride, p.k, nullptr}, packed, strips, chunk, stop, CrossDone<NV>{p});
        for (int64_t row = chunk; row < stop; ++row) {
          const float square = row_square(w + row * p.w_stride, p.k) + low_rank_square(p, row);
          // Rounding may leave less than nothing where an adapter points against its weight; NaN stays NaN.
          p.norms[row] = __builtin_sqrtf(square < 0.0f ? 0.0f : square);
        }
      }
    });
  });
}

void dora_norms(const DoraNorms& p, int threads) {
  if (p.dtype == DType::f32) norms_of<float>(p, threads);
  if (p.dtype == DType::f16) norms_of<fp16>(p, threads);
  if (p.dtype == DType::bf16) norms_of<bf16>(p, threads);
}

template <class T>
void grad_of(const DoraGrad& p, int threads) {
  const T *dout = static_cast<const T*>(p.dout), *z = static_cast<const T*>(p.z);
  T* g = static_cast<T*>(p.g);
  const int64_t blocks = (p.m + kDoraBlock - 1) / kDoraBlock;
  parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* sums = p.partial + block * p.n;
      for (int64_t row = block * kDoraBlock; row < min64(p.m, (block + 1) * kDoraBlock); ++row) {
        const bool first = row == block * kDoraBlock;
        for (int64_t c = 0; c < p.n; c += kLanes) {
          const int n = int(min64(kLanes, p.n - c));
          const Vec d = load_some(dout + row * p.dout_stride + c, n);
          if (g) put_some(g + row * p.n + c, vmul(d, load_some(p.factor + c, n)), n);
          if (!p.dz) continue;
          const Vec product = vmul(d, load_some(z + row * p.n + c, n));
          put_some(sums + c, first ? product : vadd(load_some(sums + c, n), product), n);
        }
      }
    }
  });
  if (!p.dz) return;
  parallel_for(p.n, 256, threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kLanes) {
      const int n = int(min64(kLanes, end - c));
      Vec sum = vzero();
      for (int64_t block = 0; block < blocks; ++block) sum = vadd(sum, load_some(p.partial + block * p.n + c, n));
      put_some(p.dz + c, sum, n);
    }
  });
}

// g = dout * factor by column, and dz[n] = sum over m of dout * z, either of which may be left out (null).
void dora_grad(const DoraGrad& p, int threads) {
  if (p.dtype == DType::f32) grad_of<float>(p, threads);
  if (p.dtype == DType::f16) grad_of<fp16>(p, threads);
  if (p.dtype == DType::bf16) grad_of<bf16>(p, threads);
}

}  // namespace thin
}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
