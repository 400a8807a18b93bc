// y = x W^T + scaling * s B^T + bias, with W [N, K] in 4 bits (format: csrc/nf4_format.h).
//
// Codes go from memory into registers and become fragments of the matrix unit there: W is in no memory but as codes.
// A lane (g = lane / 4, t = lane % 4) loads 16 bytes of one row, 32 neighbours in k, of one block of 32 or more:
//
//     k      | 0 ... 31 | 32 ... 63 | 64 ... 95 | 96 ... 127 |     a warp's step is 128 deep
//     lane t |    0     |     1     |     2     |     3      |     row n = g + 8 j of tile j
//
// The matrix unit takes its 16 k's in any order that is the same for both operands. Product q of the 8 in a step has
// k = 32 t + 4 q + {0, 1} where the unit's own order is 2 t + {0, 1}, and 32 t + 4 q + {2, 3} where it is 2 t + 8 +
// {0, 1}. So two products need 8 neighbours in k of x, which are one 16-byte load from shared memory, too.
//
// x is staged by asynchronous copies, one stage ahead; codes and scales are loaded one stage ahead into registers.
// kWK warps share a tile and split k. Partial tiles are made of zeros.
//
// Few rows (`vector_kernel`): a warp takes two rows of W, each lane 32 neighbours in k; sums by shuffles.
#include "lora_tile.h"

namespace pyfinetune {
namespace cuda {
namespace {

// Unit u of row r, within the 16 units of a step. Lanes 4 i to 4 i + 7 of a load have two rows and, with t, every
// fourth unit: the first exclusive-or spreads the latter, the second keeps the rows apart.
struct StepSwizzle {
  __device__ static __forceinline__ int place(int row, int unit) { return unit ^ ((unit >> 2) & 3) ^ (row & 1); }
};

// 32 neighbours of one row and of one block; elements behind the end have a scale of zero.
struct Span {
  uint4 codes;
  float scale;
};

__device__ __forceinline__ Span load_span(const Packed4bit& w, int64_t flat, bool inside) {
  if (!inside) return {make_uint4(0x77777777u, 0x77777777u, 0x77777777u, 0x77777777u), 0.0f};
  return {load_as<uint4>(w.codes + (flat >> 1)), block_scale(w, flat >> w.block_shift)};
}

__device__ __forceinline__ uint32_t word_of(const uint4& codes, int i) {
  return i == 0 ? codes.x : i == 1 ? codes.y : i == 2 ? codes.z : codes.w;
}

template <class T, int kMT_, int kNT_, int kWN_, int kWK_, bool kRagged_>
struct Shape {
  using Element = T;
  static constexpr int kMT = kMT_, kNT = kNT_, kWN = kWN_, kWK = kWK_;
  static constexpr bool kRagged = kRagged_;  // rows of W do not begin at multiples of 32 elements
  static constexpr int kThreads = 32 * kWN * kWK, kRows = 16 * kMT, kCols = 8 * kNT * kWN;
  static constexpr int kStep = 128, kDepth = kStep * kWK, kUnits = kDepth / 8;
  static constexpr int kStageBytes = kRows * kDepth * int(sizeof(T));
  static constexpr int kSumBytes = kWN * (kWK - 1) * kMT * kNT * 4 * 32 * int(sizeof(float));
  static constexpr int kShared = kMapBytes + (2 * kStageBytes > kSumBytes ? 2 * kStageBytes : kSumBytes);
};

// The products of one step of this warp: x from `stage`, W as `spans`, or by elements where rows are ragged.
template <class S, class T>
__device__ __forceinline__ void multiply_step(const Product<T>& p, const float* map, const unsigned char* stage,
                                              const Span (&spans)[S::kNT], int step, int64_t n, int64_t k,
                                              float (&sums)[S::kMT * S::kNT][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t b[S::kNT][4];
#pragma unroll
    for (int j = 0; j < S::kNT; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float low, high;
        if (S::kRagged) {
          const int64_t row = n + 8 * j, col = k + 8 * i + 2 * q, flat = row * p.in_features + col;
          low = row < p.cols && col < p.depth ? weight_at(p.w, map, flat) : 0.0f;
          high = row < p.cols && col + 1 < p.depth ? weight_at(p.w, map, flat + 1) : 0.0f;
        } else {
          const uint32_t word = word_of(spans[j].codes, i);
          low = rounded_mul(map[code_of(word, 2 * q)], spans[j].scale);
          high = rounded_mul(map[code_of(word, 2 * q + 1)], spans[j].scale);
        }
        b[j][q] = pack_pair(low, high, T{});
      }
    }
    const int unit = step * (S::kStep / 8) + StepSwizzle::place(g, 4 * t + i);
#pragma unroll
    for (int m = 0; m < S::kMT; ++m) {
      const uint4 upper = load_as<uint4>(stage + 16 * ((16 * m + g) * S::kUnits + unit));
      const uint4 lower = load_as<uint4>(stage + 16 * ((16 * m + g + 8) * S::kUnits + unit));
      const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
      const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int j = 0; j < S::kNT; ++j) {
        multiply_add(sums[m * S::kNT + j], first, b[j][0], b[j][1], T{});
        multiply_add(sums[m * S::kNT + j], second, b[j][2], b[j][3], T{});
      }
    }
  }
}

template <class S, class T>
__device__ __forceinline__ void store_tile(const Product<T>& p, int64_t row, int64_t col,
                                           const float (&sums)[S::kMT * S::kNT][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < S::kNT; ++j) {
    const int64_t n = col + 8 * j + 2 * t;
    const float low_bias = p.bias && n < p.cols ? widen(p.bias[n]) : 0.0f;
    const float high_bias = p.bias && n + 1 < p.cols ? widen(p.bias[n + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < S::kMT; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + 16 * i + g + 8 * half;
        if (m >= p.rows || n >= p.cols) continue;
        const float low = sums[i * S::kNT + j][2 * half] + low_bias;
        const float high = sums[i * S::kNT + j][2 * half + 1] + high_bias;
        T* y = p.y + m * p.y_stride + n;
        if (p.y_vectors && n + 1 < p.cols) {
          store_as(y, pack_pair(low, high, T{}));
        } else {
          narrow(low, y[0]);
          if (n + 1 < p.cols) narrow(high, y[1]);
        }
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2) lora_linear_kernel(Product<typename S::Element> p) {
  const float* map = load_map(p.w);
  unsigned char* stages = dynamic_shared() + kMapBytes;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int step = warp % S::kWK, tile = warp / S::kWK;
  // Tiles of the same rows of W run side by side.
  const int64_t row = int64_t(blockIdx.x % p.row_tiles) * S::kRows;
  const int64_t col = int64_t(blockIdx.x / p.row_tiles) * S::kCols + 8 * S::kNT * tile;
  const int64_t n = col + g, k = S::kStep * step + 32 * t;
  const auto load_spans = [&](int64_t at, Span(&spans)[S::kNT]) {
#pragma unroll
    for (int j = 0; j < S::kNT; ++j) {
      const bool inside = n + 8 * j < p.cols && at + k < p.depth;
      if (!S::kRagged) spans[j] = load_span(p.w, (n + 8 * j) * p.in_features + at + k, inside);
    }
  };
  stage_rows<StepSwizzle, S::kRows, S::kUnits, S::kThreads>(p, row, 0, stages);
  close_copies();
  Span next[S::kNT] = {}, spans[S::kNT];
  load_spans(0, next);
  float sums[S::kMT * S::kNT][4] = {};
  if (step == 0) begin_with_adapter<S::kMT, S::kNT>(p, row, n, 8, sums);
  int current = 0;
  for (int64_t at = 0; at < p.depth; at += S::kDepth, current ^= 1) {
    const int64_t after = at + S::kDepth;
    if (after < p.depth)
      stage_rows<StepSwizzle, S::kRows, S::kUnits, S::kThreads>(p, row, after, stages + (current ^ 1) * S::kStageBytes);
    close_copies();
#pragma unroll
    for (int j = 0; j < S::kNT; ++j) spans[j] = next[j];
    if (after < p.depth) load_spans(after, next);
    wait_copies<1>();
    __syncthreads();
    multiply_step<S>(p, map, stages + current * S::kStageBytes, spans, step, n, at + k, sums);
    __syncthreads();
  }
  if (add_warps<S::kWK>(sums, reinterpret_cast<float*>(stages), tile, step)) store_tile<S>(p, row, col, sums);
}

constexpr int kVectorThreads = 128, kRowsOfWarp = 2;

// Elements [k, k + 8) of row m of x as floats, zeros where there are none.
template <class T>
__device__ __forceinline__ void load_x(const Product<T>& p, int64_t m, int64_t k, float (&x)[8]) {
  const T* from = p.x + m * p.x_stride + k;
  if (p.x_vectors && k + 8 <= p.depth) {
    const Vector<T> vector = load_as<Vector<T>>(from);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = widen(vector.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = k + j < p.depth ? widen(from[j]) : 0.0f;
  }
}

// Codes 8 i to 8 i + 7 of the span at k of row n: the values, or, ragged, the weights themselves.
template <bool kRagged, class T>
__device__ __forceinline__ void load_w(const Product<T>& p, const float* map, const Span& span, int i, int64_t n,
                                       int64_t k, float (&w)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (kRagged)
      w[j] = n < p.cols && k + 8 * i + j < p.depth ? weight_at(p.w, map, n * p.in_features + k + 8 * i + j) : 0.0f;
    else
      w[j] = map[code_of(word_of(span.codes, i), j)];
  }
}

// A scale multiplies the sum of its 32 products: there is one multiplication a weight instead of two.
template <class T, int kM, bool kRagged>
__global__ void __launch_bounds__(kVectorThreads, 4) vector_kernel(Product<T> p) {
  const float* map = load_map(p.w);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t n = (int64_t(blockIdx.x) * (kVectorThreads / 32) + warp) * kRowsOfWarp;
  float sums[kM][kRowsOfWarp] = {};
  for (int64_t k = 32 * lane; k < p.depth; k += 32 * 32) {
    Span spans[kRowsOfWarp] = {};
    float parts[kM][kRowsOfWarp] = {};
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r)
      if (!kRagged) spans[r] = load_span(p.w, (n + r) * p.in_features + k, n + r < p.cols);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float w[kRowsOfWarp][8], x[8];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) load_w<kRagged>(p, map, spans[r], i, n + r, k, w[r]);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (m >= p.rows) continue;
        load_x(p, m, k + 8 * i, x);
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r)
#pragma unroll
          for (int j = 0; j < 8; ++j) parts[m][r] = rounded_fma(x[j], w[r][j], parts[m][r]);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r)
        sums[m][r] = rounded_fma(parts[m][r], kRagged ? 1.0f : spans[r].scale, sums[m][r]);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const bool inside = m < p.rows && n + r < p.cols;
      float low = 0.0f;
      for (int64_t i = lane; p.s && inside && i < p.rank; i += 32)
        low = rounded_fma(widen(p.s[m * p.s_stride + i]), widen(p.factor[(n + r) * p.factor_col + i]), low);
      float sum = rounded_fma(low, p.scaling, sums[m][r]);
#pragma unroll
      for (int w = 16; w > 0; w >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, w);
      if (inside && lane == 0) {
        if (p.bias) sum += widen(p.bias[n + r]);
        narrow(sum, p.y[m * p.y_stride + n + r]);
      }
    }
  }
}

template <class S>
void launch_tiles(const Place& place, Product<typename S::Element> q) {
  static_assert(S::kShared <= kMostShared, "more shared memory than every GPU has");
  const int64_t row_tiles = tiles_of(q.rows, S::kRows);
  const int64_t blocks = checked_mul(row_tiles, tiles_of(q.cols, S::kCols), place.op);
  q.row_tiles = unsigned(row_tiles);  // the launch refuses more blocks than 31 bits hold
  launch(place, lora_linear_kernel<S>, blocks, S::kThreads, S::kShared, q);
}

template <class T, int kM, bool kRagged>
void launch_vector(const Place& place, const Product<T>& q) {
  const int64_t blocks = tiles_of(q.cols, kVectorThreads / 32 * kRowsOfWarp);
  launch(place, vector_kernel<T, kM, kRagged>, blocks, kVectorThreads, kMapBytes, q);
}

template <class T>
void run(const Place& place, const LoraLinear& p, Path path) {
  const Product<T> q = product_of<T>(p, false);
  const bool ragged = q.in_features % 32 != 0 || !aligned_to(q.w.codes, 16);
  if (path == Path::vector || (path == Path::chosen && q.rows <= kVectorRows)) {
    if (ragged) return launch_vector<T, kVectorRows, true>(place, q);
    if (q.rows == 1) return launch_vector<T, 1, false>(place, q);
    if (q.rows == 2) return launch_vector<T, 2, false>(place, q);
    if (q.rows <= 4) return launch_vector<T, 4, false>(place, q);
    return launch_vector<T, kVectorRows, false>(place, q);
  }
  if (ragged) return launch_tiles<Shape<T, 1, 2, 1, 4, true>>(place, q);
  if (q.rows <= 16) return launch_tiles<Shape<T, 1, 2, 1, 4, false>>(place, q);
  if (q.rows <= 32) return launch_tiles<Shape<T, 2, 2, 1, 4, false>>(place, q);
  return launch_tiles<Shape<T, 4, 4, 2, 2, false>>(place, q);
}

}  // namespace

void lora_linear(const LoraLinear& p, Path path, int device, uint64_t stream) {
  const Place place = place_of("lora_linear", p, device, stream);
  PYFINETUNE_CHECK(path != Path::vector || p.rows <= kVectorRows,
                   "lora_linear (" + place.shape + "): the path for few rows takes at most 8");
  if (p.rows == 0 || p.out_features == 0) return;
  const DeviceGuard guard(place);
  if (p.dtype == DType::f16) run<__half>(place, p, path);
  if (p.dtype == DType::bf16) run<__nv_bfloat16>(place, p, path);
}

}  // namespace cuda
}  // namespace pyfinetune
