// The products of a LoRA linear whose one side is the rank, which a library GEMM runs at a fraction of its rate:
//
//   down   S[m, r]  = scale * keep(X)[m, k] A[r, k]^T        one row of S is one vector: no sum across lanes
//   up     Y[m, n] += scale * keep(S[m, r] B[n, r]^T)        with DoRA's factor, where there is one
//   outer  D[r, n]  = scale * T[m, r]^T keep(X)[m, n]        X in slices of kDepth rows, D in floats beside it
//
// keep(...) zeroes the elements whose bit of dropout's mask is not set; its 1 / (1 - p) is in the scale. Every element
// is summed by one thread, in an order that does not depend on how many there are.
#pragma once
#include "lora_panel.kernel.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {
namespace thin {

template <class T>
constexpr int kDepthOf = sizeof(T) == 4 ? 32 : 128;  // rows of X in a slice of `outer`; as kSegmentOf
constexpr int kRankPad = 8;
#if defined(__AVX512F__)
constexpr int kOuterRows[kMaxVectors + 1] = {0, 8, 8, 4, 4};  // divisors of kRankPad
#else
constexpr int kOuterRows[kMaxVectors + 1] = {0, 8, 4, 4, 2};
#endif
constexpr int64_t kRowGrain = 24;  // a multiple of every entry of kLeftRows

template <class Out, int NV>
struct DownDone {
  static constexpr bool kDirect = false;
  const ThinDown& p;
  void block(int64_t row, int rows, int64_t column, const float* sums) const {
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < NV; ++v) {
        const int64_t c = column + v * kLanes;
        if (c >= p.r) break;
        const Vec sum = vmul(vset(p.scale), vload(sums + (m * NV + v) * kLanes));
        put_some(static_cast<Out*>(p.out) + (row + m) * p.out_stride + c, sum, int(min64(kLanes, p.r - c)));
      }
  }
};

template <class T, class Out>
void down_of(const ThinDown& p, int threads) {
  using P = Panel<T>;
  P* packed = static_cast<P*>(p.packed);
  const int vectors = strip_vectors(p.r);
  const int64_t width = vectors * kLanes, strips = (p.r + width - 1) / width;
  pack_operand(p.a, p.k, p.r, width, packed, threads);
  with_vectors(vectors, [&](auto constant) {
    constexpr int NV = decltype(constant)::value;
    parallel_for(p.m, kRowGrain, threads, [&](int64_t begin, int64_t end) {
      multiply_rows<T, NV>({p.x, p.x_stride, p.k, p.mask}, packed, strips, begin, end, DownDone<Out, NV>{p});
    });
  });
}

void down(const ThinDown& p, int threads) {
  const bool wide = p.out_dtype == DType::f32;
  if (p.dtype == DType::f32) down_of<float, float>(p, threads);
  if (p.dtype == DType::f16) wide ? down_of<fp16, float>(p, threads) : down_of<fp16, fp16>(p, threads);
  if (p.dtype == DType::bf16) wide ? down_of<bf16, float>(p, threads) : down_of<bf16, bf16>(p, threads);
}

// y = (base - add) + factor * (add + u) + bias, where `add` is what the update u = scale * sum joins. Without a factor
// y = add + u.
template <class T>
inline void finish_up(const ThinUp& p, int64_t row, int64_t c, int n, Vec sum) {
  const Vec inner = load_some(static_cast<const T*>(p.add) + row * p.add_stride + c, n);
  if (p.mask) sum = vselect(sum, mask_bits(p.mask, row * p.n + c));
  const Vec z = vfma(vset(p.scale), sum, inner);
  T* y = static_cast<T*>(p.y) + row * p.y_stride + c;
  if (!p.factor) return put_some(y, z, n);
  if (p.z) put_some(static_cast<T*>(p.z) + row * p.z_stride + c, z, n);
  Vec result = vmul(load_some(p.factor + c, n), z);
  if (p.base) result = vadd(result, vsub(load_some(static_cast<const T*>(p.base) + row * p.base_stride + c, n), inner));
  if (p.bias) result = vadd(result, load_some(static_cast<const T*>(p.bias) + c, n));
  put_some(y, result, n);
}

template <class T, int NV>
struct UpDone {
  static constexpr bool kDirect = true;
  const ThinUp& p;
  bool direct(int64_t end) const { return end <= p.n; }
  auto taker(int64_t row, int64_t column) const {
    // A copy: what a store to y might change would be loaded anew after each.
    return
        [own = p, row, column](int m, int v, Vec sum) { finish_up<T>(own, row + m, column + v * kLanes, kLanes, sum); };
  }
  void block(int64_t row, int rows, int64_t column, const float* sums) const {
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < NV; ++v) {
        const int64_t c = column + v * kLanes;
        if (c >= p.n) break;
        finish_up<T>(p, row + m, c, int(min64(kLanes, p.n - c)), vload(sums + (m * NV + v) * kLanes));
      }
  }
};

template <class T>
void up_of(const ThinUp& p, int threads) {
  using P = Panel<T>;
  P* packed = static_cast<P*>(p.packed);
  const int vectors = strip_vectors(p.n);
  const int64_t width = vectors * kLanes, strips = (p.n + width - 1) / width;
  pack_operand(p.b, p.r, p.n, width, packed, threads);
  with_vectors(vectors, [&](auto constant) {
    constexpr int NV = decltype(constant)::value;
    parallel_for(p.m, kRowGrain, threads, [&](int64_t begin, int64_t end) {
      multiply_rows<T, NV>({p.s, p.s_stride, p.r, nullptr}, packed, strips, begin, end, UpDone<T, NV>{p});
    });
  });
}

void up(const ThinUp& p, int threads) {
  if (p.dtype == DType::f32) up_of<float>(p, threads);
  if (p.dtype == DType::f16) up_of<fp16>(p, threads);
  if (p.dtype == DType::bf16) up_of<bf16>(p, threads);
}

// Rows [row, row + rows) of one strip of x, as the right operand.
template <class T, int NV>
inline void pack_slice(const ThinOuter& p, int64_t row, int rows, int64_t column, Panel<T>* out) {
  using P = Panel<T>;
  const T* x = static_cast<const T*>(p.x);
  int i = 0;
  if (!p.mask && column + NV * kLanes <= p.n) {
    for (; i + kStep<P> <= rows; i += kStep<P>) {
      const T* lo = x + (row + i) * p.x_stride + column;
      for (int v = 0; v < NV; ++v, out += kLanes * kStep<P>) pack_full(out, lo + v * kLanes, p.x_stride);
    }
  }
  for (; i < rows; i += kStep<P>) {
    const T* lo = x + (row + i) * p.x_stride;
    const bool pair = i + kStep<P> <= rows;
    const int64_t bit = (row + i) * p.n;
    for (int v = 0; v < NV; ++v, out += kLanes * kStep<P>) {
      const int64_t c = column + v * kLanes;
      if (c >= p.n) {
        for (int j = 0; j < kLanes * kStep<P>; ++j) out[j] = P{};
        continue;
      }
      const uint32_t lo_bits = p.mask ? mask_bits(p.mask, bit + c) : ~0u;
      const uint32_t hi_bits = p.mask && pair ? mask_bits(p.mask, bit + p.n + c) : ~0u;
      pack_step(out, lo + c, pair ? lo + p.x_stride + c : nullptr, int(min64(kLanes, p.n - c)), lo_bits, hi_bits);
    }
  }
}

template <class Out>
void store_outer(const ThinOuter& p, const float* sums, int64_t width, int64_t column) {
  Out* out = static_cast<Out*>(p.out);
  const int64_t columns = min64(width, p.n - column);
  if (p.out_n_stride == 1) {
    for (int64_t i = 0; i < p.r; ++i)
      for (int64_t c = 0; c < columns; c += kLanes)
        put_some(out + i * p.out_r_stride + column + c, vmul(vset(p.scale), vload(sums + i * width + c)),
                 int(min64(kLanes, columns - c)));
    return;
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t i = 0; i < p.r; ++i)
      out[i * p.out_r_stride + (column + c) * p.out_n_stride] = from_float<Out>(p.scale * sums[i * width + c]);
}

template <class T, int NV>
void outer_strips(const ThinOuter& p, const Panel<T>* left, int threads) {
  using P = Panel<T>;
  constexpr int MB = kOuterRows[NV], kDepth = kDepthOf<T>;
  constexpr int64_t kWidth = NV * kLanes;
  const int64_t rank = padded(p.r, kRankPad), left_row = padded(p.r, max64(kLanes, kRankPad)) * kStep<P>;
  parallel_for((p.n + kWidth - 1) / kWidth, 1, threads, [&](int64_t begin, int64_t end) {
    alignas(64) P right[kDepth * kWidth];
    for (int64_t i = begin * rank * kWidth; i < end * rank * kWidth; i += kLanes) vstore(p.sums + i, vzero());
    for (int64_t row = 0; row < p.m; row += kDepth) {
      const int rows = int(min64(kDepth, p.m - row));
      for (int64_t strip = begin; strip < end; ++strip) {
        pack_slice<T, NV>(p, row, rows, strip * kWidth, right);
        for (int64_t i = 0; i < rank; i += MB)
          tile<MB, NV>(left + row / kStep<P> * left_row + i * kStep<P>, kStep<P>, left_row, right,
                       (rows + kStep<P> - 1) / kStep<P>, p.sums + (strip * rank + i) * kWidth);
      }
    }
    for (int64_t strip = begin; strip < end; ++strip) {
      const float* sums = p.sums + strip * rank * kWidth;
      if (p.out_dtype == DType::f32) store_outer<float>(p, sums, kWidth, strip * kWidth);
      if (p.out_dtype == DType::f16) store_outer<fp16>(p, sums, kWidth, strip * kWidth);
      if (p.out_dtype == DType::bf16) store_outer<bf16>(p, sums, kWidth, strip * kWidth);
    }
  });
}

template <class T>
void outer_of(const ThinOuter& p, int threads) {
  Panel<T>* left = static_cast<Panel<T>*>(p.packed);
  pack_matrix(static_cast<const T*>(p.t), p.t_stride, 1, p.m, p.r, padded(p.r, max64(kLanes, kRankPad)), left, threads);
  // The widest strips that still share the columns out evenly; how wide they are does not change a sum.
  const int64_t vectors = (p.n + kLanes - 1) / kLanes;
  int best = kMaxVectors;
  int64_t least = -1;
  for (int nv = kMaxVectors; nv >= 2; --nv) {
    const int64_t strips = (vectors + nv - 1) / nv, share = (strips + threads - 1) / threads * nv;
    if (least < 0 || share < least) least = share, best = nv;
  }
  with_vectors(best, [&](auto constant) { outer_strips<T, decltype(constant)::value>(p, left, threads); });
}

void outer(const ThinOuter& p, int threads) {
  if (p.dtype == DType::f32) outer_of<float>(p, threads);
  if (p.dtype == DType::f16) outer_of<fp16>(p, threads);
  if (p.dtype == DType::bf16) outer_of<bf16>(p, threads);
}

}  // namespace thin
}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
