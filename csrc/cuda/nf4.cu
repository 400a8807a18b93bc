// 4-bit decode and encode on the GPU (format: csrc/nf4_format.h). Memory-bound: half a byte and two (four) an element.
//
// A warp takes tiles of 1024 elements, which are 512 bytes of codes, 16 to a lane:
//
//     codes     lane 0: 16 B | lane 1: 16 B | ...      one 128-bit access a lane
//     shared    512 B, as the way between the two orders
//     elements  step s: lane 0: 16 B | lane 1: 16 B    one 128-bit access a lane and step, four (fp32: eight) steps
//
// so both sides of the copy are whole lines. A tile has at most 32 scales: lane l decodes the l-th, which costs a
// double-quantized one three loads a block, and a shuffle hands it to the elements. Encoding goes the other way, with
// the block's largest magnitude by shuffles; blocks above 1024 elements are read twice, the second time from the cache.
#include "device.h"
#include "launch.h"
#include "nf4.h"

namespace pyfinetune {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 1024;  // elements of a warp's step
constexpr int kTileShift = 10, kTileBytes = kTile / 2;

struct Lane {
  int lane, warp;
  int64_t first_tile, tile_stride;
  __device__ __forceinline__ Lane()
      : lane(int(threadIdx.x) % 32),
        warp(int(threadIdx.x) / 32),
        first_tile(int64_t(blockIdx.x) * kWarps + warp),
        tile_stride(int64_t(gridDim.x) * kWarps) {}
};

// Rows of `cols` elements, `stride` apart.
struct Rows {
  int64_t cols, stride;
};

// Where the elements of a tile go. One division in 64 bits a tile; behind the end of its first row, 32 bits hold what
// is left of it.
struct TilePlace {
  int64_t first, col, base, cols, stride;
  unsigned step;
  __device__ __forceinline__ TilePlace(const Rows& rows, int64_t first) : first(first), col(0), base(0) {
    cols = rows.cols;
    stride = rows.stride;
    step = cols < kTile ? unsigned(cols) : unsigned(kTile);
    if (stride == cols) return;
    const int64_t row = first / cols;
    col = first - row * cols;
    base = row * stride;
  }
  __device__ __forceinline__ int64_t operator()(int within) const {
    if (stride == cols) return first + within;
    const int64_t at = col + within;
    if (at < cols) return base + at;
    const unsigned behind = unsigned(at - cols), more = behind / step;
    return base + (more + int64_t(1)) * stride + (behind - more * step);
  }
};

template <class T>
__device__ void decode_whole_tile(const Packed4bit& w, const float* map, unsigned char* stage, int64_t first,
                                  float scale, int lane, T* out, const TilePlace& place) {
  constexpr int kCount = Vector<T>::kCount, kSteps = kTile / (32 * kCount);
  store_as(stage + 16 * lane, load_as<uint4>(w.codes + (first >> 1) + 16 * lane));
  __syncwarp();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int within = (s * 32 + lane) * kCount;
    const float factor = __shfl_sync(kAllLanes, scale, within >> w.block_shift);
    uint32_t word;
    if (kCount == 8)
      word = load_as<uint32_t>(stage + within / 2);
    else
      word = load_as<uint16_t>(stage + within / 2);
    Vector<T> vector;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int code = (word >> (8 * (j >> 1) + ((j & 1) ? 0 : 4))) & 15;
      narrow(rounded_mul(map[code], factor), vector.values[j]);
    }
    store_as(out + place(within), vector);
  }
  __syncwarp();
}

template <class T, class Value>
__device__ void write_adapter(const Adapter& a) {
  const int64_t total = a.rows * a.width, stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const int64_t row = i / a.width, col = i % a.width, from = col - a.first;
    float value = 0.0f;
    if (from >= 0 && from < a.count)
      value = rounded_mul(widen(static_cast<const Value*>(a.values)[row * a.value_stride + from]), a.scaling);
    narrow(value, static_cast<T*>(a.data)[row * a.row_stride + col]);
  }
}

// vectors: the pointers and the rows are multiples of 16 bytes, so that no vector is torn.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_4bit_kernel(Packed4bit w, T* out, Rows rows, bool vectors, Adapter adapter) {
  float* map = reinterpret_cast<float*>(dynamic_shared());
  const Lane at;
  unsigned char* stage = dynamic_shared() + 16 * sizeof(float) + at.warp * kTileBytes;
  if (threadIdx.x < 16) map[threadIdx.x] = w.quant_map[threadIdx.x];
  __syncthreads();
  const int64_t tiles = (w.numel + kTile - 1) >> kTileShift, last_block = (w.numel - 1) >> w.block_shift;
  for (int64_t tile = at.first_tile; tile < tiles; tile += at.tile_stride) {
    const int64_t first = tile << kTileShift;
    int64_t block = (first >> w.block_shift) + at.lane;
    block = block < last_block ? block : last_block;
    const float scale = block_scale(w, block);
    const TilePlace place(rows, first);
    if (vectors && first + kTile <= w.numel) {
      decode_whole_tile(w, map, stage, first, scale, at.lane, out, place);
      continue;
    }
    for (int within = at.lane; within < kTile; within += 32) {
      const float factor = __shfl_sync(kAllLanes, scale, within >> w.block_shift);
      const int64_t i = first + within;
      if (i < w.numel) narrow(rounded_mul(map[code_at(w.codes, i)], factor), out[place(within)]);
    }
  }
  if (adapter.data == nullptr) return;
  if (adapter.dtype == DType::f32)
    write_adapter<T, float>(adapter);
  else
    write_adapter<T, T>(adapter);
}

// Elements [i, i + kCount) as floats, zeros behind the end.
template <class T>
__device__ __forceinline__ void load_floats(const T* weight, int64_t i, int64_t numel, bool vectors, float* values) {
  constexpr int kCount = Vector<T>::kCount;
  if (vectors && i + kCount <= numel) {
    const Vector<T> vector = load_as<Vector<T>>(weight + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = widen(vector.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = i + j < numel ? widen(weight[i + j]) : 0.0f;
  }
}

// Without its sign bit a float orders like an integer, with NaN above infinity.
template <int kCount>
__device__ __forceinline__ uint32_t largest_of(const float* values, uint32_t largest) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const uint32_t magnitude = __float_as_uint(values[j]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Turns each step's and lane's magnitude into that of the whole block it belongs to, by butterflies over the lanes and
// the steps that share a block.
template <int kCount, int kSteps>
__device__ __forceinline__ void share_largest(uint32_t (&largest)[kSteps], int block_size) {
#pragma unroll
  for (int w = 1; w < 32; w <<= 1) {
    if (w * kCount >= block_size) break;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) largest[s] = larger(largest[s], __shfl_xor_sync(kAllLanes, largest[s], w));
  }
#pragma unroll
  for (int w = 1; w < kSteps; w <<= 1) {
    if (w * 32 * kCount >= block_size) break;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      if (!(s & w)) largest[s] = largest[s + w] = larger(largest[s], largest[s + w]);
  }
}

// What encoding one tile needs to know beside its values.
struct Encoder {
  const float* pivots;
  uint32_t order_low, order_high;  // the code of each interval, four bits each
  int64_t numel;
  int block_shift;
  uint8_t* codes;
  float* absmax;

  __device__ __forceinline__ uint32_t code(float normalised) const {
    const int interval = encode_interval(pivots, normalised);
    return ((interval & 8 ? order_high : order_low) >> (4 * (interval & 7))) & 15;
  }
};

// Codes and scales of the tile at `first`, whose vectors are in `values`.
template <int kCount, int kSteps>
__device__ void encode_tile(const Encoder& e, int64_t first, const float (&values)[kSteps][kCount],
                            const uint32_t (&largest)[kSteps], unsigned char* stage, int lane, bool vectors) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int within = (s * 32 + lane) * kCount;
    const int64_t i = first + within, block = i >> e.block_shift;
    // The last block of a size that is no multiple is divided, and stores the clamped scale.
    const bool partial = ((block + 1) << e.block_shift) > e.numel;
    const float magnitude = __uint_as_float(largest[s]), divisor = encode_divisor(magnitude);
    const float reciprocal = rounded_div(1.0f, divisor);
    float normalised[kCount];
    if (partial) {
      // What fills the last byte is zero, whatever the scale: NaN and infinity would not leave it one.
#pragma unroll
      for (int j = 0; j < kCount; ++j) normalised[j] = i + j < e.numel ? rounded_div(values[s][j], divisor) : 0.0f;
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) normalised[j] = rounded_mul(values[s][j], reciprocal);
    }
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) word |= e.code(normalised[j]) << (8 * (j >> 1) + ((j & 1) ? 0 : 4));
    if (kCount == 8)
      store_as(stage + within / 2, word);
    else
      store_as(stage + within / 2, uint16_t(word));
    if ((i & ((int64_t(1) << e.block_shift) - 1)) == 0 && i < e.numel) e.absmax[block] = partial ? divisor : magnitude;
  }
  __syncwarp();
  const int64_t bytes = e.numel / 2 + (e.numel & 1), begin = (first >> 1) + 16 * lane;
  if (vectors && begin + 16 <= bytes) {
    store_as(e.codes + begin, load_as<uint4>(stage + 16 * lane));
  } else {
    for (int b = 0; b < 16; ++b)
      if (begin + b < bytes) e.codes[begin + b] = stage[16 * lane + b];
  }
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    quantize_4bit_kernel(EncodeTable table, const T* weight, int64_t numel, int block_shift, uint8_t* codes,
                         float* absmax, bool vectors) {
  constexpr int kCount = Vector<T>::kCount, kSteps = kTile / (32 * kCount);
  float* pivots = reinterpret_cast<float*>(dynamic_shared());
  const Lane at;
  unsigned char* stage = dynamic_shared() + 16 * sizeof(float) + at.warp * kTileBytes;
  if (threadIdx.x < 15) pivots[threadIdx.x] = table.pivots[threadIdx.x];
  __syncthreads();
  Encoder e = {pivots, 0, 0, numel, block_shift, codes, absmax};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    e.order_low |= uint32_t(table.order[i]) << (4 * i);
    e.order_high |= uint32_t(table.order[i + 8]) << (4 * i);
  }
  // A warp takes whole blocks: a tile, or the tiles of one large block.
  const int unit_shift = block_shift > kTileShift ? block_shift : kTileShift;
  const int64_t units = (numel + (int64_t(1) << unit_shift) - 1) >> unit_shift;
  for (int64_t unit = at.first_tile; unit < units; unit += at.tile_stride) {
    const int64_t begin = unit << unit_shift;
    const int64_t end = begin + (int64_t(1) << unit_shift) < numel ? begin + (int64_t(1) << unit_shift) : numel;
    uint32_t of_unit = 0;
    if (block_shift > kTileShift) {
      for (int64_t i = begin + at.lane * kCount; i < end; i += 32 * kCount) {
        float values[kCount];
        load_floats(weight, i, numel, vectors, values);
        of_unit = largest_of<kCount>(values, of_unit);
      }
#pragma unroll
      for (int w = 1; w < 32; w <<= 1) of_unit = larger(of_unit, __shfl_xor_sync(kAllLanes, of_unit, w));
    }
    for (int64_t first = begin; first < end; first += kTile) {
      float values[kSteps][kCount];
      uint32_t largest[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        load_floats(weight, first + (s * 32 + at.lane) * kCount, numel, vectors, values[s]);
        largest[s] = largest_of<kCount>(values[s], of_unit);
      }
      if (block_shift <= kTileShift) share_largest<kCount>(largest, 1 << block_shift);
      encode_tile(e, first, values, largest, stage, at.lane, vectors);
    }
  }
}

// A warp takes a block of scales.
__global__ void __launch_bounds__(kThreads, 4)
    quantize_absmax_kernel(const float* centred, int64_t numel, int block_shift, const uint8_t* nearest, uint8_t* codes,
                           float* absmax) {
  const Lane at;
  const int64_t blocks = (numel + (int64_t(1) << block_shift) - 1) >> block_shift;
  for (int64_t block = at.first_tile; block < blocks; block += at.tile_stride) {
    const int64_t begin = block << block_shift;
    const int64_t whole = begin + (int64_t(1) << block_shift), end = whole < numel ? whole : numel;
    uint32_t bits = 0;
    for (int64_t i = begin + at.lane; i < end; i += 32) bits = larger(bits, __float_as_uint(centred[i]) & 0x7fffffffu);
#pragma unroll
    for (int w = 1; w < 32; w <<= 1) bits = larger(bits, __shfl_xor_sync(kAllLanes, bits, w));
    const float largest = __uint_as_float(bits);
    if (at.lane == 0) absmax[block] = largest;
    const float reciprocal = rounded_div(1.0f, largest);
    for (int64_t i = begin + at.lane; i < end; i += 32) {
      const float position = nested_position(centred[i], reciprocal);
      // NaN and a block of zeros take code 0.
      codes[i] = largest > 0.0f && position >= 0.0f ? nearest[int(position)] : 0;
    }
  }
}

constexpr int kShared = 16 * int(sizeof(float)) + kWarps * kTileBytes;

template <class T>
void decode(const Place& place, const Packed4bit& w, const Target& target, const Adapter& adapter) {
  T* out = static_cast<T*>(target.data);
  const Rows rows = {target.cols, target.row_stride};
  const bool torn = rows.stride != rows.cols && (rows.cols % Vector<T>::kCount || rows.stride % Vector<T>::kCount);
  const bool vectors = aligned_to(w.codes, 16) && aligned_to(out, 16) && !torn;
  const int64_t spare = adapter.data ? grid_size(adapter.rows * adapter.width, kThreads) : 0;
  const int64_t tiles = grid_size(w.numel, int64_t(kWarps) * kTile);
  launch(place, dequantize_4bit_kernel<T>, tiles > spare ? tiles : spare, kThreads, kShared, w, out, rows, vectors,
         adapter);
}

template <class T>
void encode(const Place& place, const EncodeTable& table, const void* weight, int64_t numel, int block_shift,
            uint8_t* codes, float* absmax) {
  const bool vectors = aligned_to(weight, 16) && aligned_to(codes, 16);
  const int unit_shift = block_shift > kTileShift ? block_shift : kTileShift;
  launch(place, quantize_4bit_kernel<T>, grid_size(numel, int64_t(kWarps) << unit_shift), kThreads, kShared, table,
         static_cast<const T*>(weight), numel, block_shift, codes, absmax, vectors);
}

std::string elements(int64_t numel) { return std::to_string(numel) + " elements"; }

}  // namespace

void dequantize_4bit(const Packed4bit& w, const Target& target, const Adapter* adapter, int device, uint64_t stream) {
  const Adapter beside = adapter && adapter->rows > 0 && adapter->width > 0 ? *adapter : Adapter{};
  if (w.numel == 0 && beside.data == nullptr) return;
  const Place place = {"dequantize_4bit", elements(w.numel), device, stream};
  const DeviceGuard guard(place);
  if (target.dtype == DType::f32) decode<float>(place, w, target, beside);
  if (target.dtype == DType::f16) decode<__half>(place, w, target, beside);
  if (target.dtype == DType::bf16) decode<__nv_bfloat16>(place, w, target, beside);
}

void quantize_4bit(const EncodeTable& table, const void* weight, DType dtype, int64_t numel, int block_shift,
                   uint8_t* codes, float* absmax, int device, uint64_t stream) {
  if (numel == 0) return;
  const Place place = {"quantize_4bit", elements(numel), device, stream};
  const DeviceGuard guard(place);
  if (dtype == DType::f32) encode<float>(place, table, weight, numel, block_shift, codes, absmax);
  if (dtype == DType::f16) encode<__half>(place, table, weight, numel, block_shift, codes, absmax);
  if (dtype == DType::bf16) encode<__nv_bfloat16>(place, table, weight, numel, block_shift, codes, absmax);
}

void quantize_absmax(const float* centred, int64_t numel, int block_shift, const uint8_t* nearest, uint8_t* codes,
                     float* absmax, int device, uint64_t stream) {
  if (numel == 0) return;
  const Place place = {"quantize_absmax", elements(numel), device, stream};
  const DeviceGuard guard(place);
  const int64_t blocks = (numel >> block_shift) + 1;
  launch(place, quantize_absmax_kernel, grid_size(blocks, kWarps), kThreads, 0, centred, numel, block_shift, nearest,
         codes, absmax);
}

}  // namespace cuda
}  // namespace pyfinetune
