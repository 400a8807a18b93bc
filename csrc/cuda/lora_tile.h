// What the 4-bit products share: the arguments on the device, rows of x on their way to shared memory, single weights,
// the adapter's part, and sums over warps.
#pragma once
#include "device.h"
#include "launch.h"
#include "lora_linear.h"

namespace pyfinetune {
namespace cuda {

// x [rows, depth] times the weight's [depth, cols], plus the adapter.
template <class T>
struct Product {
  Packed4bit w;
  int64_t rows, depth, cols, in_features, rank;
  const T* x;
  T* y;
  const T* s;
  const T* factor;
  const T* bias;
  int64_t x_stride, y_stride, s_stride;
  int64_t factor_col, factor_rank;  // strides of the factor's [cols, rank]
  unsigned row_tiles;
  float scaling;
  bool x_vectors, y_vectors;  // whether rows begin at multiples of 16 bytes
};

constexpr int kMapBytes = 16 * int(sizeof(float));

__device__ __forceinline__ float* load_map(const Packed4bit& w) {
  float* map = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < 16) map[threadIdx.x] = w.quant_map[threadIdx.x];
  __syncthreads();
  return map;
}

// The j-th of the 8 codes in a word of codes.
__device__ __forceinline__ int code_of(uint32_t word, int j) {
  return (word >> (8 * (j >> 1) + ((j & 1) ? 0 : 4))) & 15;
}

// Any element by itself, for weights whose rows do not begin at whole words of codes.
__device__ __forceinline__ float weight_at(const Packed4bit& w, const float* map, int64_t flat) {
  return rounded_mul(map[code_at(w.codes, flat)], block_scale(w, flat >> w.block_shift));
}

// Rows [row, row + kRows) and columns [at, at + 8 kUnits) of x into a stage of shared memory, zeros where there are
// none. A unit is 16 bytes; where it stands in its row is Swizzle's, so that a warp's loads meet no bank twice.
template <class Swizzle, int kRows, int kUnits, int kThreads, class T>
__device__ __forceinline__ void stage_rows(const Product<T>& p, int64_t row, int64_t at, unsigned char* stage) {
  for (int i = int(threadIdx.x); i < kRows * kUnits; i += kThreads) {
    const int r = i / kUnits, unit = i % kUnits;
    const int64_t col = at + 8 * unit, left = row + r < p.rows ? p.depth - col : 0;
    const int count = left <= 0 ? 0 : left < 8 ? int(left) : 8;
    const T* from = count > 0 ? p.x + (row + r) * p.x_stride + col : p.x;
    unsigned char* to = stage + 16 * (r * kUnits + Swizzle::place(r, unit));
    if (p.x_vectors) {
      copy_async(to, from, count * int(sizeof(T)));
    } else {
      Vector<T> vector;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < count)
          vector.values[j] = from[j];
        else
          narrow(0.0f, vector.values[j]);
      }
      store_as(to, vector);
    }
  }
}

// Elements i and i + 1 of a vector of n, `stride` apart, zeros where there are none.
template <class T>
__device__ __forceinline__ uint32_t pair_at(const T* p, int64_t i, int64_t n, int64_t stride) {
  const uint32_t low = i < n ? load_as<uint16_t>(p + i * stride) : 0;
  return low | (i + 1 < n ? uint32_t(load_as<uint16_t>(p + (i + 1) * stride)) << 16 : 0);
}

// scaling * s factor^T, for kMT tiles of 16 rows from `row` and kNT of 8 columns; this lane's of tile j is
// col + j * col_step. Accumulators begin with it, so that it costs no others.
template <int kMT, int kNT, class T>
__device__ __forceinline__ void begin_with_adapter(const Product<T>& p, int64_t row, int64_t col, int col_step,
                                                   float (&sums)[kMT * kNT][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  if (p.s == nullptr) return;
  for (int64_t first = 0; first < p.rank; first += 16) {
    const int64_t r = first + 2 * t;
    uint32_t b[kNT][2];
#pragma unroll
    for (int j = 0; j < kNT; ++j) {
      const int64_t c = col + j * col_step, n = c < p.cols ? p.rank : 0;
      const T* factor = p.factor + (n > 0 ? c * p.factor_col : 0);
      b[j][0] = pair_at(factor, r, n, p.factor_rank);
      b[j][1] = pair_at(factor, r + 8, n, p.factor_rank);
    }
#pragma unroll
    for (int i = 0; i < kMT; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + 16 * i + g + 8 * half, n = m < p.rows ? p.rank : 0;
        const T* s = p.s + (n > 0 ? m * p.s_stride : 0);
        a[half] = pair_at(s, r, n, 1);
        a[half + 2] = pair_at(s, r + 8, n, 1);
      }
#pragma unroll
      for (int j = 0; j < kNT; ++j) multiply_add(sums[i * kNT + j], a, b[j][0], b[j][1], T{});
    }
  }
#pragma unroll
  for (int i = 0; i < kMT * kNT; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i][e] *= p.scaling;
}

// Adds the sums of the kWarps warps that share a tile, always in the same order; the first of them gets true, and the
// total. `room` may be what the stages were.
template <int kWarps, int kTiles>
__device__ __forceinline__ bool add_warps(float (&sums)[kTiles][4], float* room, int tile, int warp) {
  if (kWarps == 1) return true;
  const int lane = int(threadIdx.x) % 32;
  room += int64_t(tile) * (kWarps - 1) * kTiles * 4 * 32 + lane;
  __syncthreads();
  if (warp > 0) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) room[(((warp - 1) * kTiles + i) * 4 + e) * 32] = sums[i][e];
  }
  __syncthreads();
  if (warp > 0) return false;
#pragma unroll
  for (int other = 0; other < kWarps - 1; ++other)
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] += room[((other * kTiles + i) * 4 + e) * 32];
  return true;
}

template <class T>
Product<T> product_of(const LoraLinear& p, bool backward) {
  Product<T> q = {};
  q.w = p.w;
  q.rows = p.rows;
  q.depth = backward ? p.out_features : p.in_features;
  q.cols = backward ? p.in_features : p.out_features;
  q.in_features = p.in_features;
  q.rank = p.rank;
  q.x = static_cast<const T*>(p.x);
  q.y = static_cast<T*>(p.y);
  q.s = p.rank > 0 ? static_cast<const T*>(p.s) : nullptr;
  q.factor = static_cast<const T*>(p.factor);
  q.bias = static_cast<const T*>(p.bias);
  q.x_stride = p.x_stride;
  q.y_stride = p.y_stride;
  q.s_stride = p.s_stride;
  q.factor_col = backward ? 1 : p.factor_stride;
  q.factor_rank = backward ? p.factor_stride : 1;
  q.scaling = p.scaling;
  q.x_vectors = aligned_to(p.x, 16) && p.x_stride % 8 == 0;
  q.y_vectors = aligned_to(p.y, 16) && p.y_stride % 8 == 0;
  return q;
}

inline Place place_of(const char* op, const LoraLinear& p, int device, uint64_t stream) {
  return {op,
          std::to_string(p.rows) + " rows, weight [" + std::to_string(p.out_features) + ", " +
              std::to_string(p.in_features) + "], rank " + std::to_string(p.rank),
          device, stream};
}

inline int64_t tiles_of(int64_t n, int tile) { return n / tile + (n % tile != 0); }

}  // namespace cuda
}  // namespace pyfinetune
