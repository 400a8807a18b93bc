// dx = dy W + scaling * t A, with W [N, K] in 4 bits, whose rows lie along the output here.
//
// As in lora_linear.cu, codes become fragments in registers. A lane (g = lane / 4, t = lane % 4) loads 4 bytes, which
// are 8 neighbours in k of one block, from each of 8 neighbouring rows n of W:
//
//     rows     lane t has n = 8 t ... 8 t + 7 of a step's 32
//     columns  lane g has k = 8 g ... 8 g + 7 of a warp's 64; the j-th of each lane are tile j
//
// Product q of the 2 in a step has n = 8 t + 4 q + {0, 1} where the matrix unit's own order is 2 t + {0, 1}, and
// 8 t + 4 q + {2, 3} where it is 2 t + 8 + {0, 1}; so both need 8 neighbours in n of dy: one load of 16 bytes. A lane
// ends up with columns 16 t ... 16 t + 15 of its rows, which are two stores of 16 bytes.
#include "lora_tile.h"

namespace pyfinetune {
namespace cuda {
namespace {

constexpr int kTiles = 8, kStep = 32, kStepsOfStage = 2;

// Two steps are 8 units. Lanes of two rows and four units meet no bank twice where odd rows swap the steps.
struct PairSwizzle {
  __device__ static __forceinline__ int place(int row, int unit) { return unit ^ (4 * (row & 1)); }
};

// This lane's part of a step: 8 rows of 8 codes.
struct Patch {
  uint32_t words[8];
  float scales[8];
};

template <class T, int kMT_, int kWC_, int kWK_, bool kRagged_>
struct Shape {
  using Element = T;
  static constexpr int kMT = kMT_, kWC = kWC_, kWK = kWK_;
  static constexpr bool kRagged = kRagged_;  // rows of W do not begin at multiples of 8 elements
  static constexpr int kThreads = 32 * kWC * kWK, kRows = 16 * kMT, kCols = 64 * kWC;
  static constexpr int kDepth = kStep * kStepsOfStage * kWK, kUnits = kDepth / 8;
  static constexpr int kStageBytes = kRows * kDepth * int(sizeof(T));
  static constexpr int kSumBytes = kWC * (kWK - 1) * kMT * kTiles * 4 * 32 * int(sizeof(float));
  static constexpr int kShared = kMapBytes + (2 * kStageBytes > kSumBytes ? 2 * kStageBytes : kSumBytes);
};

template <class T>
__device__ __forceinline__ void load_patch(const Product<T>& p, int64_t n, int64_t k, Patch& patch) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t flat = (n + i) * p.in_features + k;
    const bool inside = n + i < p.depth && k < p.cols;
    patch.words[i] = inside ? load_as<uint32_t>(p.w.codes + (flat >> 1)) : 0x77777777u;
    patch.scales[i] = inside ? block_scale(p.w, flat >> p.w.block_shift) : 0.0f;
  }
}

// Rows n + i and n + i + 1 of column j of this lane's patch.
template <class S, class T>
__device__ __forceinline__ uint32_t weight_pair(const Product<T>& p, const float* map, const Patch& patch, int i, int j,
                                                int64_t n, int64_t k) {
  if (S::kRagged) {
    const bool column = k + j < p.cols;
    const int64_t flat = (n + i) * p.in_features + k + j;
    const float low = column && n + i < p.depth ? weight_at(p.w, map, flat) : 0.0f;
    const float high = column && n + i + 1 < p.depth ? weight_at(p.w, map, flat + p.in_features) : 0.0f;
    return pack_pair(low, high, T{});
  }
  return pack_pair(rounded_mul(map[code_of(patch.words[i], j)], patch.scales[i]),
                   rounded_mul(map[code_of(patch.words[i + 1], j)], patch.scales[i + 1]), T{});
}

template <class S, class T>
__device__ __forceinline__ void multiply_step(const Product<T>& p, const float* map, const unsigned char* stage,
                                              const Patch& patch, int unit, int64_t n, int64_t k,
                                              float (&sums)[S::kMT * kTiles][4]) {
  const int g = int(threadIdx.x) % 32 / 4;
  uint32_t b[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int q = 0; q < 4; ++q) b[j][q] = weight_pair<S>(p, map, patch, 2 * q, j, n, k);
#pragma unroll
  for (int m = 0; m < S::kMT; ++m) {
    const uint4 upper = load_as<uint4>(stage + 16 * ((16 * m + g) * S::kUnits + unit));
    const uint4 lower = load_as<uint4>(stage + 16 * ((16 * m + g + 8) * S::kUnits + unit));
    const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
    const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      multiply_add(sums[m * kTiles + j], first, b[j][0], b[j][1], T{});
      multiply_add(sums[m * kTiles + j], second, b[j][2], b[j][3], T{});
    }
  }
}

template <class S, class T>
__device__ __forceinline__ void store_tile(const Product<T>& p, int64_t row, int64_t col,
                                           const float (&sums)[S::kMT * kTiles][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < S::kMT; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t r = row + 16 * m + g + (e < 2 ? 0 : 8), k = col + 16 * t + 8 * (e & 1);
      Vector<T> vector;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) narrow(sums[m * kTiles + j][e], vector.values[j]);
      if (r >= p.rows) continue;
      T* y = p.y + r * p.y_stride + k;
      if (p.y_vectors && k + 8 <= p.cols) {
        store_as(y, vector);
      } else {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (k + j < p.cols) y[j] = vector.values[j];
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads) lora_linear_bwd_kernel(Product<typename S::Element> p) {
  const float* map = load_map(p.w);
  unsigned char* stages = dynamic_shared() + kMapBytes;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int share = warp % S::kWK, tile = warp / S::kWK;
  const int64_t row = int64_t(blockIdx.x % p.row_tiles) * S::kRows;
  const int64_t col = int64_t(blockIdx.x / p.row_tiles) * S::kCols + 64 * tile;
  const int64_t k = col + 8 * g, n = kStep * kStepsOfStage * share + 8 * t;
  stage_rows<PairSwizzle, S::kRows, S::kUnits, S::kThreads>(p, row, 0, stages);
  close_copies();
  Patch next = {};
  if (!S::kRagged) load_patch(p, n, k, next);
  float sums[S::kMT * kTiles][4] = {};
  if (share == 0) begin_with_adapter<S::kMT, kTiles>(p, row, k, 1, sums);
  int current = 0;
  for (int64_t at = 0; at < p.depth; at += S::kDepth, current ^= 1) {
    const int64_t after = at + S::kDepth;
    if (after < p.depth)
      stage_rows<PairSwizzle, S::kRows, S::kUnits, S::kThreads>(p, row, after, stages + (current ^ 1) * S::kStageBytes);
    close_copies();
    wait_copies<1>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kStepsOfStage; ++i) {
      const Patch patch = next;
      const int64_t ahead = i + 1 < kStepsOfStage ? at + n + kStep * (i + 1) : after + n;
      if (!S::kRagged) load_patch(p, ahead, k, next);
      const int unit = 8 * share + PairSwizzle::place(g, 4 * i + t);
      multiply_step<S>(p, map, stages + current * S::kStageBytes, patch, unit, at + n + kStep * i, k, sums);
    }
    __syncthreads();
  }
  if (add_warps<S::kWK>(sums, reinterpret_cast<float*>(stages), tile, share)) store_tile<S>(p, row, col, sums);
}

template <class S>
void launch_tiles(const Place& place, Product<typename S::Element> q) {
  static_assert(S::kShared <= kMostShared, "more shared memory than every GPU has");
  const int64_t row_tiles = tiles_of(q.rows, S::kRows);
  const int64_t blocks = checked_mul(row_tiles, tiles_of(q.cols, S::kCols), place.op);
  q.row_tiles = unsigned(row_tiles);  // the launch refuses more blocks than 31 bits hold
  launch(place, lora_linear_bwd_kernel<S>, blocks, S::kThreads, S::kShared, q);
}

template <class T>
void run(const Place& place, const LoraLinear& p) {
  const Product<T> q = product_of<T>(p, true);
  if (q.in_features % 8 != 0 || !aligned_to(q.w.codes, 4)) return launch_tiles<Shape<T, 1, 1, 8, true>>(place, q);
  if (q.rows <= 16) return launch_tiles<Shape<T, 1, 1, 8, false>>(place, q);
  return launch_tiles<Shape<T, 2, 2, 2, false>>(place, q);
}

}  // namespace

void lora_linear_bwd(const LoraLinear& p, int device, uint64_t stream) {
  const Place place = place_of("lora_linear_bwd", p, device, stream);
  if (p.rows == 0 || p.in_features == 0) return;
  const DeviceGuard guard(place);
  if (p.dtype == DType::f16) run<__half>(place, p);
  if (p.dtype == DType::bf16) run<__nv_bfloat16>(place, p);
}

}  // namespace cuda
}  // namespace pyfinetune
